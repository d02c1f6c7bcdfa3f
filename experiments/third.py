"""The schedules with a larger teacher, to a third of its width, with two learning rates."""

import statistics

import experiment
from schedules import EXTENSIONS, ITERATIVE, SINGLE, TRUNCATED

RUNS = {
    "rows": ({"learning_rate": 2e-3}, ITERATIVE | SINGLE | EXTENSIONS),
    "other_rows": ({"learning_rate": 1e-3}, ITERATIVE | SINGLE | TRUNCATED)}


def measure(args) -> dict:
    return {rows: experiment.compare({arm: flags | rate | {"target_width": 128} for arm, flags in arms.items()},
                                     args.seeds, args.corpus, args.teacher) for rows, (rate, arms) in RUNS.items()}


def draw(result: dict):
    figure, axis = experiment.panels(
        "To a third of its width, gradual pruning ends closer to the teacher, and our extensions closest",
        "6 × 384 → 128, 1,000 steps of 8 x 128 tokens of Wikipedia; " + experiment.over_seeds(result["rows"], "range"),
        1, 4.5)
    experiment.plot_curves(axis, result["rows"])
    labels = [f"{arm}: {statistics.fmean(row['kl'][-1] for row in rows):.3f} at the end"
              for arm, rows in experiment.rows_of(result["rows"]).items()]
    axis.set(xlim=(0, 1015), ylim=(0, 3.5))
    axis.legend(axis.lines, labels, frameon=False)
    return figure


if __name__ == "__main__":
    experiment.main("third", __doc__, measure, draw, teacher="Folder of the teacher.", corpus="Text to train on.")
