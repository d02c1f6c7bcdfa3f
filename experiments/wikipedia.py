"""The recipes with a larger teacher and real text: as published, single cut and --recipe best, 600 steps of 16 x 128.

--teacher and --corpus as in distill.py; --data names the folder of GLUE, --tasks those on which the students are
fine-tuned.
"""

import experiment
import recipe
from experiment import plt

BUDGET = {"steps": 600, "batch_size": 16, "learning_rate": 4e-4, "eval_every": 60, "eval_rows": 256}
STEPS = 200


def measure(args) -> dict:
    given = BUDGET | {"teacher": args.teacher, "corpus": args.corpus}
    arms = {arm: flags | given for arm, flags in recipe.ARMS.items()}
    rows = [row | {"budget": 600 * 16 * 128} for row in experiment.compare(arms, [0])]
    models = {arm: experiment.distil(**flags, seed=0) / "student" for arm, flags in arms.items()}
    scores = experiment.finetuned(models, args.data, args.tasks, args.seeds, STEPS)
    return {"budget": BUDGET, "tasks": args.tasks, "rows": rows, "gains": recipe.gains(rows), "scores": scores,
            "finetuning_steps": STEPS}


def draw(result: dict):
    figure, axes = plt.subplots(1, 3, figsize=(16, 4), layout="constrained")
    for axis, x in zip(axes, ("tokens", "seconds"), strict=False):
        experiment.plot_curves(axis, result["rows"], x)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    rows = [row | {"arm": f"{row['task']}, {row['arm']}"} for row in result["scores"]]
    rows.sort(key=lambda row: result["tasks"].index(row["task"]))
    experiment.bars(axes[2], rows, lambda row: row["score"], "dev, percent")
    budget = result["budget"]
    figure.suptitle(f"6 x 384 -> 192, {budget['steps']} steps of {budget['batch_size']} x 128 tokens of Wikipedia, one "
                    f"seed; fine-tuned for {result['finetuning_steps']} steps, "
                    f"{len({row['seed'] for row in result['scores']})} seeds")
    return figure


if __name__ == "__main__":
    experiment.main(
        "wikipedia", __doc__, measure, draw,
        ("--teacher", {"help": "folder of the teacher"}), ("--corpus", {"help": "text to learn from"}),
        ("--data", {"help": "folder of GLUE"}),
        ("--tasks", {"nargs": "+", "default": ["sst2", "mrpc", "stsb"]}))
