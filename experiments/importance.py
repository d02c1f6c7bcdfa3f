"""Pruning criteria: sensitivity, PLATON, magnitude or chance, at half and a quarter of the teacher's width."""

import experiment

CRITERIA, WIDTHS = ("sensitivity", "platon", "magnitude", "random"), (128, 64)
ARMS = {f"{criterion}, {width}": ({} if criterion == "sensitivity" else {"importance": criterion})
        | ({} if width == 128 else {"target_width": width}) for width in WIDTHS for criterion in CRITERIA}


def measure(args) -> dict:
    return {"rows": experiment.compare(ARMS, args.seeds, corpus=args.corpus)}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Sensitivity keeps better units than magnitude, and magnitude better ones than chance",
        f"{experiment.BUDGET}; {experiment.over_seeds(result['rows'], 'range')}", 2, 4)
    for axis, width in zip(axes, WIDTHS, strict=True):
        rows = [row | {"arm": row["arm"].split(",")[0]} for row in result["rows"] if row["arm"].endswith(f", {width}")]
        experiment.plot_curves(axis, rows)
        axis.set_title(f"hidden size 256 → {width}")
        axis.set_ylim(bottom=0)
    axes[1].set_ylabel("")
    return figure


if __name__ == "__main__":
    experiment.main("importance", __doc__, measure, draw, corpus="text to train on")
