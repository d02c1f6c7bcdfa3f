"""The schedules with a larger teacher, to a third of its width: with two learning rates, and for twenty times as long.

The long runs are in bf16. Their students are also fine-tuned on the small tasks of GLUE.
"""

import statistics

import experiment
from schedules import EXTENSIONS, ITERATIVE, SINGLE, TRUNCATED

LONG = {"learning_rate": 2e-3, "steps": 20_000, "eval_every": 1000, "precision": "bf16"}
RUNS = {
    "rows": ({"learning_rate": 2e-3}, ITERATIVE | SINGLE | EXTENSIONS),
    "other_rows": ({"learning_rate": 1e-3}, ITERATIVE | SINGLE | TRUNCATED),
    "long_rows": (LONG, {"iterative, t_f = 0.3 T": {"prune_end": 0.3}} | SINGLE | TRUNCATED)}
TASKS = ["cola", "mrpc", "stsb", "rte"]
FINETUNE = ["--precision", "bf16", "--seeds", 0, 1, 2]


def measure(args) -> dict:
    def glue(run) -> dict:
        return {"glue": experiment.finetuned(run / "student", args.data, TASKS, FINETUNE)}

    result = {}
    for rows, (flags, arms) in RUNS.items():
        arms = {arm: own | flags | {"target_width": 128} for arm, own in arms.items()}
        more = {"more": glue} if rows == "long_rows" else {}
        result[rows] = experiment.compare(arms, args.seeds, args.corpus, args.teacher, **more)
    return result | {"finetuning": FINETUNE}


def draw(result: dict):
    figure, axes = experiment.panels(
        "To a third of its width, gradual pruning ends closer to the teacher, in a long run by little",
        "6 × 384 → 128, steps of 8 x 128 tokens of Wikipedia; " + experiment.over_seeds(result["rows"], "range"),
        2, 4.5, sharey=True)
    for axis, (rows, title) in zip(axes, {"rows": "1,000 steps", "long_rows": "20,000 steps"}.items(), strict=True):
        experiment.plot_curves(axis, result[rows])
        labels = [f"{arm}: {statistics.fmean(row['kl'][-1] for row in group):.3f}"
                  for arm, group in experiment.rows_of(result[rows]).items()]
        axis.set(title=title, ylim=(0, 3.5))
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
        axis.legend(axis.lines, labels, frameon=False, loc="upper right", title="KL at the end")
    axes[1].set_ylabel("")
    return figure


if __name__ == "__main__":
    experiment.main("third", __doc__, measure, draw, teacher="Folder of the teacher.", corpus="Text to train on.",
                    data="Folder of GLUE.")
