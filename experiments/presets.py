"""Our extensions alone and together, with the masked-LM loss and without it, and how good the students are fine-tuned.

The teacher is 6 x 384, the students have half its width. All arms but the first prune everything at once. Each arm has
the best of three learning rates: that whose short run ends with the lowest KL on its own batches, which are new text in
every step. The held-out rows, on which results are reported, choose nothing.
"""

import json
import statistics
from pathlib import Path

import experiment

SEARCH, RATES = {"steps": 200, "eval_every": 200, "log_every": 1}, (5e-4, 1e-3, 2e-3)
EXTENSIONS = {
    "paper's settings": {},
    "single prune": experiment.SINGLE,
    "aligned heads": experiment.SINGLE | {"align_heads": True},
    "compensated": experiment.SINGLE | {"compensate": True},
    "both": experiment.SINGLE | {"align_heads": True, "compensate": True},
}
ARMS = EXTENSIONS | {f"{arm}, no masked-LM loss": flags | {"alpha_mlm": 0} for arm, flags in EXTENSIONS.items()}
TASKS = ["cola", "mrpc", "stsb", "rte"]


def best_rate(flags: dict) -> tuple[float, dict[float, float]]:
    """The rate with the lowest KL in training, averaged over the last tenth of the steps, and all of these."""
    kl = {}
    for rate in RATES:
        lines = experiment.events(experiment.distil(**flags, **SEARCH, learning_rate=rate, seed=0), "train")
        kl[rate] = statistics.fmean(line["loss_pred"] for line in lines[-SEARCH["steps"] // 10 :])
    return min(kl, key=kl.get), kl


def finetuned(models: dict[str, Path], data: str, tasks: list[str], seeds: list[int]) -> list[dict]:
    """Fine-tune every model (arm -> folder): rows of `arm`, `task`, `seed` and the task's first metric on dev, in
    percent."""
    output = experiment.RUNS / "finetuned"
    experiment.program("finetune.py", "--model", *models.values(), "--task", *tasks, "--data", data, "--seeds", *seeds,
            "--output", output)
    results = [json.loads(path.read_text()) for path in output.glob("*/[!.]*/result.json")]
    scores = {(result["model"], result["task"], result["seed"]): next(iter(result["metrics"].values()))
              for result in results}
    return [{"arm": arm, "task": task, "seed": seed, "score": scores[str(folder), task, seed]}
            for arm, folder in models.items() for task in tasks for seed in seeds]


def measure(args) -> dict:
    arms = {arm: flags | {"teacher": args.teacher, "corpus": args.corpus} for arm, flags in ARMS.items()}
    rates, searches = zip(*map(best_rate, arms.values()), strict=True)
    arms = {arm: flags | {"learning_rate": rate} for (arm, flags), rate in zip(arms.items(), rates, strict=True)}
    rows = experiment.compare(arms, args.seeds)
    models = {"teacher": Path(args.teacher)}
    models |= {arm: experiment.distil(**flags, seed=args.seeds[0]) / "student" for arm, flags in arms.items()}
    return {"rates": dict(zip(arms, rates, strict=True)), "searches": searches, "rows": rows,
            "finetuned": finetuned(models, args.data, TASKS, args.seeds)}


def draw(result: dict):
    figure, axes = experiment.panels(
        "What the extensions and the masked-LM loss are worth",
        "6 x 384 → 192, 1,000 steps of 8 x 128 tokens of Wikipedia; "
        + experiment.over_seeds(result["rows"], "standard deviation"), 3, 4.4, sharey=True)
    for axis, key in zip(axes, ("kl", "masked_lm_loss"), strict=False):
        experiment.plot_dots(axis, result["rows"], lambda row, key=key: row[key][-1], experiment.LABELS[key])
    averages = [{"arm": arm, "score": statistics.fmean(row["score"] for row in group)}
                for arm, rows in experiment.rows_of(result["finetuned"]).items() if arm != "teacher"
                for group in experiment.rows_of(rows, "seed").values()]
    experiment.plot_dots(axes[2], averages, lambda row: row["score"], "mean of CoLA, MRPC, STS-B, RTE (percent)")
    return figure


if __name__ == "__main__":
    experiment.main("presets", __doc__, measure, draw, teacher="folder of the teacher", corpus="text to train on",
                    data="folder of GLUE")
