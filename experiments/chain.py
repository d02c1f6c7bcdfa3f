"""Chaining: is a student better made from the teacher directly, or from the next wider student, with equal tokens?

The chain goes to three quarters, half and a quarter of the width, LINK steps each, with the last student as the next
teacher. The direct students get the steps of the whole chain up to their width. Every student is compared by its
masked-LM loss, because the KL divergence of a chained student is measured from another teacher.
"""

import experiment

WIDTHS, LINK = (192, 128, 64), 500


def measure(args) -> dict:
    common, rows = experiment.MILLION | {"corpus": args.corpus, "preset": "compensated"}, []
    for seed in args.seeds:
        teacher = common["teacher"]
        for links, width in enumerate(WIDTHS, start=1):
            goal = common | {"target_width": width, "seed": seed}
            chained = experiment.distil(**goal | {"teacher": teacher, "steps": LINK})
            direct = experiment.distil(**goal | {"steps": LINK * links})
            rows += [{"arm": arm, "width": width, "seed": seed, **experiment.curve(folder)}
                     for arm, folder in (("chained", chained), ("direct", direct))]
            teacher = chained / "student"
    return {"rows": rows}


def draw(result: dict):
    figure, axis = experiment.panels(
        "Chained and direct students with equal tokens",
        f"bundled teacher (256), {LINK} steps of 8 x 128 tokens of Wikipedia a link, --preset compensated; mean over "
        f"{len({row['seed'] for row in result['rows']})} seeds", 1, 3.8)
    teacher = result["rows"][0]["masked_lm_loss"][0]  # the first student starts as a copy of the teacher
    for arm, rows in experiment.rows_of(result["rows"]).items():
        means = [experiment.mean_and_deviation([row["masked_lm_loss"][-1] for row in group])
                 for group in experiment.rows_of(rows, "width").values()]
        colour = experiment.OURS if arm == "chained" else experiment.PAPER
        axis.errorbar(WIDTHS, *zip(*means, strict=True), fmt="o-", capsize=3, color=colour)
        axis.annotate(arm, (WIDTHS[-1], means[-1][0]), (8, 0), textcoords="offset points", color=colour)
    axis.axhline(teacher, color=experiment.GREY, linestyle=":")
    axis.annotate("teacher", (WIDTHS[0], teacher), (0, -12), textcoords="offset points", color=experiment.GREY)
    axis.set(xlabel="hidden size", ylabel=experiment.LABELS["masked_lm_loss"], xticks=WIDTHS)
    axis.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    experiment.main("chain", __doc__, measure, draw, corpus="text to train on")
