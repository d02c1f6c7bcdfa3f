"""Our presets against the paper's settings, with the masked-LM loss and without it: how close the students are to their
teacher, how good as language models, and how good when fine-tuned on STS-B.

Each arm has the learning rate, of three, whose short run ends with the lowest KL on its training batches, which are new
text in every step. The held-out rows, on which results are reported, choose nothing.
"""

import statistics

import experiment

ARMS = {
    "paper's settings": {},
    "preset compensated": {"preset": "compensated"},
    "paper's settings, no masked-LM": {"alpha_mlm": 0},
    "preset imitation (no masked-LM)": {"preset": "imitation"},
}
RATES = 5e-4, 1e-3, 2e-3
SEARCH = {"steps": 150, "eval_every": 150, "eval_rows": 16, "log_every": 1}
FINETUNE = ["--precision", "fp32", "--seeds", 0]


def training_kl(run) -> dict:
    """The KL of the last fifth of the steps."""
    lines = experiment.events(run, "train")
    return {"training_kl": statistics.fmean(line["loss_pred"] for line in lines[-(len(lines) // 5) :])}


def finetuned(model, data: str) -> dict:
    """The Spearman correlation on STS-B dev, in percent, of the model fine-tuned with each seed."""
    return {"stsb": [metrics["spearman"] for metrics in experiment.finetuned(model, data, ["stsb"], FINETUNE)["stsb"]]}


def measure(args) -> dict:
    where = {"corpus": args.corpus, "teacher": args.teacher}
    searches = {f"{arm}, {rate:g}": flags | SEARCH | {"learning_rate": rate}
                for arm, flags in ARMS.items() for rate in RATES}
    search = experiment.compare(searches, [0], **where, more=training_kl)
    kl = {row["arm"]: row["training_kl"] for row in search}
    best = {arm: min(RATES, key=lambda rate, arm=arm: kl[f"{arm}, {rate:g}"]) for arm in ARMS}
    arms = {arm: flags | {"eval_every": 250, "learning_rate": best[arm]} for arm, flags in ARMS.items()}
    rows = experiment.compare(arms, args.seeds, **where, more=lambda run: finetuned(run / "student", args.data))
    return {"finetuning": FINETUNE, "rows": rows, "other_rows": search}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Without the masked-LM loss, students are closer to their teacher, and better language models",
        "6 × 384 → 192, 1,000 steps of 8 x 128 tokens of Wikipedia, each at its best of three learning rates; "
        + experiment.over_seeds(result["rows"], "standard deviation"), 3, 3, sharey=True)
    for axis, key in zip(axes, ("kl", "masked_lm_loss"), strict=False):
        experiment.plot_dots(axis, result["rows"], lambda row, key=key: row[key][-1], experiment.LABELS[key])
    experiment.plot_dots(axes[2], result["rows"], lambda row: statistics.fmean(row["stsb"]), "STS-B dev, Spearman, %")
    return figure


if __name__ == "__main__":
    experiment.main("presets", __doc__, measure, draw, teacher="Folder of the teacher.", corpus="Text to train on.",
                    data="Folder of GLUE.")
