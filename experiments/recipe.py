"""Beyond the paper: the method as published, the single cut and --recipe best, against tokens and against seconds.

--steps are budgets of 8 x 128 tokens a step. All runs of one budget must be made on the same, equally busy machine.
"""

import experiment
import numpy as np
from experiment import plt

ONCE = {"prune_start": 1 / 30, "prune_end": 1 / 30}
ARMS = {"as published": {}, "single cut at T/30": ONCE, "recipe best": {"recipe": "best"}}
PARTS = {  # with the smallest budget and the first seed: what each part of the recipe does
    "published, no masked-LM loss": {"alpha_mlm": 0},
    "single cut, no masked-LM loss": ONCE | {"alpha_mlm": 0},
    "single cut, aligned": ONCE | {"align_heads": True},
    "single cut, compensated": ONCE | {"compensate": True},
    "single cut, aligned and compensated": ONCE | {"align_heads": True, "compensate": True},
}


def measure(args) -> dict:
    rows = []
    for steps in args.steps:
        budget = {"steps": steps, "eval_every": steps // 8}
        made = experiment.compare({arm: flags | budget for arm, flags in ARMS.items()}, args.seeds)
        if steps == min(args.steps):
            made += experiment.compare({arm: flags | budget for arm, flags in PARTS.items()}, args.seeds[:1])
        rows += [row | {"budget": steps * 8 * 128} for row in made]
    return {"rows": rows, "gains": gains(rows)}


def gains(rows: list[dict]) -> list[dict]:
    """How much less KL the recipe ends with, in percent: at equal tokens, and at the seconds that the other's whole run
    took (or its own end, where that comes earlier), means over the seeds."""
    found = []
    for budget, group in experiment.rows_of(rows, "budget").items():
        arms = experiment.rows_of(group)
        for other in ("as published", "single cut at T/30"):
            theirs, tokens, seconds = [], [], []
            for row, best in zip(arms[other], arms["recipe best"], strict=True):
                theirs.append(row["kl"][-1])
                tokens.append(best["kl"][-1])
                seconds.append(float(np.interp(row["seconds"][-1], best["seconds"], best["kl"])))
            found.append({"budget": budget, "against": other} | {
                f"less_at_equal_{what}": round(100 * (1 - sum(ours) / sum(theirs)), 1)
                for what, ours in (("tokens", tokens), ("seconds", seconds))})
    return found


def draw(result: dict):
    groups = experiment.rows_of(result["rows"], "budget")
    figure, axes = plt.subplots(len(groups), 3, figsize=(15, 4 * len(groups)), layout="constrained", squeeze=False)
    for row, (budget, rows) in zip(axes, groups.items(), strict=True):
        for axis, x in zip(row, ("tokens", "seconds"), strict=False):
            experiment.plot_curves(axis, [r for r in rows if r["arm"] in ARMS], x)
            axis.set_ylim(bottom=0)
        row[0].legend()
        row[0].set_title(f"{budget / 1e6:.1f} million tokens")
        experiment.bars(row[2], rows, lambda r: r["kl"][-1], "KL to the teacher at the end, nats")
    seeds = len({row["seed"] for row in result["rows"]})
    figure.suptitle(f"Bundled teacher 256 -> 128, seeds: {seeds}")
    return figure


if __name__ == "__main__":
    experiment.main("recipe", __doc__, measure, draw,
                ("--steps", {"type": int, "nargs": "+", "default": [200, 1000]}))
