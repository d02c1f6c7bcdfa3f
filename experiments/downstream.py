"""Downstream accuracy under the schedules (HomoDistil, figure 3): students of the teacher of wikipedia.py, fine-tuned.

Those of wikipedia.py, and under its budget the schedules and the classical ways of schedules.py. Each is fine-tuned on
SST-2, MRPC, RTE, CoLA and STS-B with several seeds; --data names the folder of GLUE, --teacher and --corpus are those
of wikipedia.py.
"""

import experiment
import schedules
import wikipedia
from experiment import Path, plt

STEPS = 400
# Two of schedules.py are arms of wikipedia.py already.
ARMS = wikipedia.ARMS | {arm: flags for arm, flags in schedules.ARMS.items() if flags not in wikipedia.ARMS.values()}


def measure(args) -> dict:
    given = wikipedia.BUDGET | {"teacher": args.teacher, "corpus": args.corpus, "seed": 0}
    models = {"teacher": Path(args.teacher)}
    models |= {arm: experiment.distil(**flags, **given) / "student" for arm, flags in ARMS.items()}
    return {"steps": STEPS, "rows": experiment.finetuned(models, args.data, experiment.TASKS, args.seeds, STEPS)}


def draw(result: dict):
    panels = [*experiment.TASKS, "average"]
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 4.5), layout="constrained", sharey=True)
    averages = []
    for arm, group in experiment.rows_of(result["rows"]).items():
        for seed, rows in experiment.rows_of(group, "seed").items():
            averages.append({"arm": arm, "seed": seed, "task": "average",
                             "score": sum(row["score"] for row in rows) / len(rows)})
    for axis, task in zip(axes, panels, strict=True):
        rows = [row for row in result["rows"] + averages if row["task"] == task]
        experiment.bars(axis, rows, lambda row: row["score"], task)
    seeds = len({row["seed"] for row in result["rows"]})
    figure.suptitle(f"6 x 384 and its students of half the width, fine-tuned for {result['steps']} steps; dev, "
                    f"percent, mean and standard deviation over {seeds} seeds")
    return figure


if __name__ == "__main__":
    experiment.main("downstream", __doc__, measure, draw, ("--teacher", {"help": "folder of the teacher"}),
                    ("--corpus", {"help": "text to learn from"}), ("--data", {"help": "folder of GLUE"}))
