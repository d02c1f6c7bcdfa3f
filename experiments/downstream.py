"""Fine-tuned students under the schedules (HomoDistil, figure 3), with the teacher and the budget of wikipedia.py.

Each student is fine-tuned on SST-2, MRPC, RTE, CoLA and STS-B with several seeds.
"""

import statistics
from pathlib import Path

import experiment
import schedules
import wikipedia

STEPS = 400
ARMS = wikipedia.ARMS | {arm: flags for arm, flags in schedules.ARMS.items() if flags not in wikipedia.ARMS.values()}


def measure(args) -> dict:
    given = wikipedia.BUDGET | {"teacher": args.teacher, "corpus": args.corpus, "seed": 0}
    models = {"teacher": Path(args.teacher)}
    models |= {arm: experiment.distil(**flags, **given) / "student" for arm, flags in ARMS.items()}
    return {"steps": STEPS, "rows": experiment.finetuned(models, args.data, experiment.TASKS, args.seeds, STEPS)}


def draw(result: dict):
    seeds = len({row["seed"] for row in result["rows"]})
    figure, (left, right) = experiment.panels(
        "After fine-tuning, only STS-B tells the students apart",
        f"6 x 384 and its students of half the width, {result['steps']} steps of fine-tuning; dev split, mean and "
        f"standard deviation over {seeds} seeds", 2, 4.4, sharey=True)
    others = []
    for arm, rows in experiment.rows_of([row for row in result["rows"] if row["task"] != "stsb"]).items():
        others += [{"arm": arm, "score": statistics.fmean(row["score"] for row in group)}
                   for group in experiment.rows_of(rows, "seed").values()]
    sts = [row for row in result["rows"] if row["task"] == "stsb"]
    experiment.plot_dots(left, sts, lambda row: row["score"], "STS-B, Pearson correlation (percent)")
    experiment.plot_dots(right, others, lambda row: row["score"], "mean of CoLA, SST-2, MRPC and RTE (percent)")
    for axis in (left, right):
        axis.set_xlim(0, 100)
    return figure


if __name__ == "__main__":
    experiment.main("downstream", __doc__, measure, draw, teacher="folder of the teacher", corpus="text to train on",
                    data="folder of GLUE")
