"""Which neurons to prune: by sensitivity, PLATON, magnitude or chance, to half and a quarter of the width."""

import experiment

CRITERIA, WIDTHS = ("sensitivity", "platon", "magnitude", "random"), (128, 64)


def measure(args) -> dict:
    # Defaults are left out, so that their runs are shared with other experiments
    arms = {f"{criterion}, {width}": ({} if criterion == "sensitivity" else {"importance": criterion})
            | ({} if width == 128 else {"target_width": width}) for width in WIDTHS for criterion in CRITERIA}
    return {"rows": experiment.compare(arms, args.seeds, args.corpus)}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Which neurons to prune",
        f"{experiment.BUDGET}; {experiment.over_seeds(result['rows'], 'standard deviation')}", 2, 2.8, sharey=True)
    for axis, width in zip(axes, WIDTHS, strict=True):
        rows = [row | {"arm": row["arm"].split(",")[0]} for row in result["rows"] if row["arm"].endswith(f", {width}")]
        experiment.plot_dots(axis, rows, lambda row: row["kl"][-1], experiment.LABELS["kl"])
        axis.set_title(f"hidden size 256 → {width}")
    return figure


if __name__ == "__main__":
    experiment.main("importance", __doc__, measure, draw, corpus="text to train on")
