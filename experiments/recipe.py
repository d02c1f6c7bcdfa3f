"""Beyond the paper: the method as published, the single cut and --recipe best, against tokens and against seconds.

Three budgets; the largest learns on --corpus, the larger two are made with the first of --seeds alone. With each also
when the recipe had better cut, and with the smallest what each of its parts does. The methods whose seconds are
compared must run on the same, equally busy machine.
"""

import experiment
import numpy as np
from experiment import plt

ONCE, BEST = {"prune_start": 1 / 30, "prune_end": 1 / 30}, {"recipe": "best"}
ARMS = {"as published": {}, "single cut at T/30": ONCE, "recipe best": BEST}
PARTS = {  # what each part of the recipe does
    "published, no masked-LM loss": {"alpha_mlm": 0},
    "published, aligned, compensated": {"align_heads": True, "compensate": True},
    "single cut, no masked-LM loss": ONCE | {"alpha_mlm": 0},
    "single cut, aligned": ONCE | {"align_heads": True},
    "single cut, compensated": ONCE | {"compensate": True},
    "single cut, aligned, compensated": ONCE | {"align_heads": True, "compensate": True},
}
WHEN = {
    "recipe, cut at T/100": BEST | {"prune_start": 0.01, "prune_end": 0.01},
    "recipe, cut at T/10": BEST | {"prune_start": 0.1, "prune_end": 0.1},
    "recipe, cuts until T/5": BEST | {"prune_end": 0.2, "granularity": 32},
    "recipe, cuts until T/2": BEST | {"prune_end": 0.5, "granularity": 32},
}
LARGEST = {"steps": 5000, "batch_size": 16, "learning_rate": 1e-3, "precision": "bf16", "eval_every": 250}


def budgets(corpus: str) -> dict[str, dict]:
    """Flags of every budget; the smallest is that of experiment.BASE."""
    return {"0.2 million tokens": {},
            "1 million tokens, bf16": {"steps": 1000, "eval_every": 125, "precision": "bf16"},
            "10 million tokens of Wikipedia, bf16": LARGEST | {"corpus": corpus}}


def measure(args) -> dict:
    rows = []
    for budget, flags in budgets(args.corpus).items():
        seeds, beside = (args.seeds[:1], WHEN) if flags else (args.seeds, PARTS | WHEN)
        made = experiment.compare({arm: own | flags for arm, own in ARMS.items()}, seeds)
        made += experiment.compare({arm: own | flags for arm, own in beside.items()}, args.seeds[:1])
        rows += [row | {"budget": budget} for row in made]
    return {"largest": LARGEST, "rows": rows, "gains": gains(rows)}


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
    figure, axes = plt.subplots(len(groups), 3, figsize=(15, 4.4 * len(groups)), layout="constrained", squeeze=False)
    for row, (budget, rows) in zip(axes, groups.items(), strict=True):
        for axis, x in zip(row, ("tokens", "seconds"), strict=False):
            experiment.plot_curves(axis, [r for r in rows if r["arm"] in ARMS], x)
            axis.set_ylim(bottom=0)
        row[0].legend()
        seeds = len({r["seed"] for r in rows})
        row[0].set_title(f"{budget}, seeds: {seeds}")
        experiment.bars(row[2], rows, lambda r: r["kl"][-1], "KL to the teacher at the end, nats")
    largest = result["largest"]
    figure.suptitle("Bundled teacher 256 -> 128, 8 x 128 tokens a step of the demonstration's text; of Wikipedia "
                    f"{largest['batch_size']} x 128")
    return figure


if __name__ == "__main__":
    experiment.main("recipe", __doc__, measure, draw, ("--corpus", {"help": "a large text"}))
