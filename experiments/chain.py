"""Chaining: with equal tokens, is a student better if it is made from the teacher or from the next wider student?

The chain goes to three quarters, half and a quarter of the width, LINK steps each, with the last student as the next
teacher. The direct students get the steps of the whole chain up to their width. They are compared by masked-LM loss,
because the KL divergence of a chained student is measured from another teacher.
"""

import experiment

WIDTHS, LINK = (192, 128, 64), 500
COMMON = {"preset": "compensated", "learning_rate": 2e-3}  # that of --preset demo


def measure(args) -> dict:
    rows, bundled = [], experiment.ROOT / "teachers" / "small"
    for seed in args.seeds:
        teacher = bundled
        for links, width in enumerate(WIDTHS, start=1):
            flags = COMMON | {"corpus": args.corpus, "target_width": width, "seed": seed}
            chained = experiment.distil(teacher=teacher, steps=LINK, **flags)
            direct = experiment.distil(teacher=bundled, steps=LINK * links, **flags)
            rows += [{"arm": arm, "width": width, "seed": seed, **experiment.summary(folder)}
                     for arm, folder in (("chained", chained), ("direct", direct))]
            teacher = chained / "student"
    return {"rows": rows}


def draw(result: dict):
    figure, axis = experiment.panels(
        "Students made directly are better than those of a chain",
        f"bundled teacher (256), {LINK} steps of 8 x 128 tokens of Wikipedia a link, equal tokens at every width; "
        + experiment.over_seeds(result["rows"], "standard deviation"), 1, 3.8)
    for arm, rows in experiment.rows_of(result["rows"]).items():
        losses = [[row["masked_lm_loss"][-1] for row in rows if row["width"] == width] for width in WIDTHS]
        means, deviations = zip(*map(experiment.mean_and_deviation, losses), strict=True)
        colour = experiment.OTHER if arm == "chained" else experiment.OURS
        axis.errorbar(WIDTHS, means, deviations, fmt="o-", capsize=3, color=colour)
        axis.annotate(arm, (WIDTHS[-1], means[-1]), (8, 0), textcoords="offset points", color=colour)
    teacher = result["rows"][0]["masked_lm_loss"][0]  # the first student starts as a copy of the teacher
    axis.axhline(teacher, color=experiment.GREY, linestyle=":")
    axis.annotate("teacher", (WIDTHS[-1], teacher), (0, 4), textcoords="offset points", color=experiment.GREY)
    axis.set(xlabel="hidden size", ylabel=experiment.LABELS["masked_lm_loss"], xticks=WIDTHS)
    axis.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    experiment.main("chain", __doc__, measure, draw, corpus="Text to train on.")
