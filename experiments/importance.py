"""What decides which units go: sensitivity, magnitude or chance, at two widths."""

import experiment
from experiment import plt

KINDS, WIDTHS = ("sensitivity", "magnitude", "random"), (128, 64)
ARMS = {f"{kind}, {width}": ({} if kind == "sensitivity" else {"importance": kind})
        | ({} if width == 128 else {"target_width": width}) for width in WIDTHS for kind in KINDS}


def measure(args) -> dict:
    return {"rows": experiment.compare(ARMS, args.seeds)}


def draw(result: dict):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for axis, width in zip(axes, WIDTHS, strict=True):
        rows = [row | {"arm": row["arm"].split(",")[0]} for row in result["rows"] if row["arm"].endswith(f", {width}")]
        experiment.plot_curves(axis, rows)
        axis.legend()
        axis.set_title(f"256 -> {width}")
    seeds = len({row["seed"] for row in result["rows"]})
    figure.suptitle(f"Bundled teacher, {experiment.BUDGET}, seeds: {seeds}")
    return figure


if __name__ == "__main__":
    experiment.main("importance", __doc__, measure, draw)
