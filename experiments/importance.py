"""Which neurons to prune: by sensitivity, PLATON, magnitude or chance, to half and to a quarter of the width."""

import experiment

CRITERIA = ("sensitivity", "platon", "magnitude", "random")


def measure(args) -> dict:
    # Defaults are left out, so that their runs are shared with other experiments
    half = {criterion: {} if criterion == "sensitivity" else {"importance": criterion} for criterion in CRITERIA}
    quarter = {criterion: flags | {"target_width": 64} for criterion, flags in half.items()}
    return {"rows": [row for arms in (half, quarter) for row in experiment.compare(arms, args.seeds, args.corpus)]}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Which neurons to prune: PLATON is no better than sensitivity", experiment.BUDGET, 2, 2.8, sharey=True)
    for axis, width in zip(axes, (128, 64), strict=True):
        rows = [row for row in result["rows"] if row["run"].endswith("target-width_64") == (width == 64)]
        experiment.plot_dots(axis, rows, lambda row: row["kl"][-1], experiment.LABELS["kl"])
        axis.set_title(f"256 → {width}; {experiment.over_seeds(rows, 'standard deviation')}")
    return figure


if __name__ == "__main__":
    experiment.main("importance", __doc__, measure, draw, corpus="Text to train on.")
