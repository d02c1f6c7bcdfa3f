"""Downstream accuracy (HomoDistil, figure 3): students of wikipedia.py and of schedules.py, fine-tuned.

Those of wikipedia.py and their teacher on SST-2, MRPC, RTE, CoLA and STS-B; those of schedules.py on SST-2 alone, the
one task of which so small a model learns something in so few steps. --data names the folder of GLUE, --teacher and
--corpus are those of wikipedia.py.
"""

import experiment
import schedules
import wikipedia
from experiment import Path, plt

STEPS = 150


def measure(args) -> dict:
    given = wikipedia.BUDGET | {"teacher": args.teacher, "corpus": args.corpus, "seed": 0}
    models = {"teacher": Path(args.teacher)}
    models |= {arm: experiment.distil(**flags, **given) / "student" for arm, flags in wikipedia.ARMS.items()}
    small = {arm: experiment.distil(**flags, seed=0) / "student" for arm, flags in schedules.ARMS.items()}
    return {"steps": STEPS, "rows": experiment.finetuned(models, args.data, experiment.TASKS, args.seeds, STEPS),
            "schedules": experiment.finetuned(small, args.data, ["sst2"], args.seeds, STEPS)}


def draw(result: dict):
    panels = [*experiment.TASKS, "average"]
    figure = plt.figure(figsize=(16, 6.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    axes = upper.subplots(1, len(panels), sharey=True)
    averages = []
    for arm, group in experiment.rows_of(result["rows"]).items():
        for seed, rows in experiment.rows_of(group, "seed").items():
            averages.append({"arm": arm, "seed": seed, "task": "average",
                             "score": sum(row["score"] for row in rows) / len(rows)})
    for axis, task in zip(axes, panels, strict=True):
        rows = [row for row in result["rows"] + averages if row["task"] == task]
        experiment.bars(axis, rows, lambda row: row["score"], task)
    experiment.bars(lower.subplots(), result["schedules"], lambda row: row["score"], "sst2")
    seeds = len({row["seed"] for row in result["rows"]})
    upper.suptitle(f"6 x 384 and its students of half the width, fine-tuned for {result['steps']} steps; dev, percent, "
                   f"mean and standard deviation over {seeds} seeds")
    lower.suptitle(f"Bundled teacher 256 -> 128, {experiment.BUDGET}, the same")
    return figure


if __name__ == "__main__":
    experiment.main("downstream", __doc__, measure, draw, ("--teacher", {"help": "folder of the teacher"}),
                    ("--corpus", {"help": "text to learn from"}), ("--data", {"help": "folder of GLUE"}))
