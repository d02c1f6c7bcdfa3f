"""The recipes with a larger teacher and real text: as published, single cut and --recipe best, 600 steps of 16 x 128,
in bf16.

--teacher and --corpus as in distill.py.
"""

import experiment
import recipe
from experiment import plt

BUDGET = {"steps": 600, "batch_size": 16, "learning_rate": 4e-4, "eval_every": 60, "eval_rows": 256,
          "precision": "bf16"}
ARMS = recipe.ARMS | {"recipe best, with masked-LM": recipe.PARTS["single cut, aligned, compensated"]}


def measure(args) -> dict:
    given = BUDGET | {"teacher": args.teacher, "corpus": args.corpus}
    rows = experiment.compare({arm: flags | given for arm, flags in ARMS.items()}, args.seeds)
    rows = [row | {"budget": BUDGET["steps"] * BUDGET["batch_size"] * 128} for row in rows]
    return {"budget": BUDGET, "rows": rows, "gains": recipe.gains(rows)}


def draw(result: dict):
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axis, x in zip(axes, ("tokens", "seconds"), strict=False):
        experiment.plot_curves(axis, result["rows"], x)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    experiment.bars(axes[2], result["rows"], lambda row: row["kl"][-1], "KL to the teacher at the end, nats")
    budget, seeds = result["budget"], len({row["seed"] for row in result["rows"]})
    figure.suptitle(f"6 x 384 -> 192, {budget['steps']} steps of {budget['batch_size']} x 128 tokens of Wikipedia, "
                    f"bf16, seeds: {seeds}")
    return figure


if __name__ == "__main__":
    experiment.main("wikipedia", __doc__, measure, draw, ("--teacher", {"help": "folder of the teacher"}),
                    ("--corpus", {"help": "text to learn from"}))
