"""Which losses matter: all of them, without one of them, one alone, the KL divergence with a larger weight; and our
presets, with the masked-LM loss and without it."""

import experiment

ARMS = {
    "all losses": {},
    "without hidden": {"alpha_hidn": 0},
    "without embedding": {"alpha_emb": 0},
    "without attention": {"alpha_attn": 0},
    "without KL": {"alpha_pred": 0},
    "without masked-LM": {"alpha_mlm": 0},
    "KL with weight 5": {"alpha_pred": 5},
    "KL alone": {"alpha_mlm": 0, "alpha_hidn": 0, "alpha_emb": 0, "alpha_attn": 0},
    "masked-LM alone": {"alpha_pred": 0, "alpha_hidn": 0, "alpha_emb": 0, "alpha_attn": 0},
    "preset compensated": {"preset": "compensated"},
    "preset imitation (no masked-LM)": {"preset": "imitation"},
}


def measure(args) -> dict:
    return {"rows": experiment.compare(ARMS, args.seeds, args.corpus)}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Without the masked-LM loss the student is closer to its teacher",
        f"256 → 128, {experiment.BUDGET}; {experiment.over_seeds(result['rows'], 'standard deviation')}", 2, 4,
        sharey=True)
    for axis, key in zip(axes, ("kl", "masked_lm_loss"), strict=True):
        experiment.plot_dots(axis, result["rows"], lambda row, key=key: row[key][-1], experiment.LABELS[key])
    axes[0].set_xlim(left=0)
    teacher = result["rows"][0]["masked_lm_loss"][0]  # the student starts as a copy of the teacher
    axes[1].axvline(teacher, color=experiment.GREY, linestyle=":")
    axes[1].set_xlim(left=teacher - 0.05)
    axes[1].annotate("teacher", (teacher, 3.5), (-5, 0), textcoords="offset points", rotation=90, va="center",
                     ha="right", color=experiment.GREY)
    return figure


if __name__ == "__main__":
    experiment.main("losses", __doc__, measure, draw, corpus="Text to train on.")
