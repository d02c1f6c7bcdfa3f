"""In which order to cut: feed-forward, heads and hidden dimensions of --recipe best at T/30, T/15 and T/10, beside all
of them together at T/30, as the recipe does it, and at T/10.

The program cuts all parts together; here its schedule is replaced. The budgets are those of recipe.py.
"""

import functools

import experiment
import recipe
from experiment import plt

import distill
import prune

NAMES = {"feed-forward": ("intermediate",), "heads": ("heads", "head_size"), "hidden": ("hidden",)}
TIMES = (1 / 30, 1 / 15, 1 / 10)  # of the run
ORDERS = ("feed-forward", "heads", "hidden"), ("heads", "hidden", "feed-forward"), ("hidden", "feed-forward", "heads")
TOGETHER = {"together at T/30": recipe.ARMS["recipe best"], "together at T/10": recipe.WHEN["recipe, cut at T/10"]}


def in_order(times: dict[str, float], steps: int):
    """A schedule with the interface of `prune.scheduled_widths`, which cuts every part at its own time."""
    def widths(step, start, end, first, last, granularity, power):
        cut = [name for part, time in times.items() if step >= time * steps for name in NAMES[part]]
        return first._replace(**{name: getattr(last, name) for name in cut})

    return widths


def distil_in_order(order: tuple[str, ...], *words):
    """distill.py with these words of the command line, the parts of the model cut in this order."""
    args = distill.parse_arguments([str(word) for word in words])
    together = prune.scheduled_widths
    prune.scheduled_widths = in_order(dict(zip(order, TIMES, strict=True)), args.steps)
    try:
        distill.distill(args)
    finally:
        prune.scheduled_widths = together


def measure(args) -> dict:
    one_by_one = {", ".join(order): recipe.BEST | {"label": "-".join(order),
                                                   "call": functools.partial(distil_in_order, order)}
                  for order in ORDERS}
    rows = []
    for budget, flags in recipe.budgets(args.corpus).items():
        made = experiment.compare({arm: own | flags for arm, own in (one_by_one | TOGETHER).items()}, args.seeds)
        rows += [row | {"budget": budget} for row in made]
    return {"rows": rows}


def draw(result: dict):
    groups = experiment.rows_of(result["rows"], "budget")
    figure, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3), layout="constrained", sharey=True)
    for axis, (budget, rows) in zip(axes, groups.items(), strict=True):
        experiment.bars(axis, rows, lambda row: row["kl"][-1], "KL to the teacher at the end, nats")
        axis.margins(x=0.25)
        axis.set_title(budget, fontsize="medium")
    seeds = len({row["seed"] for row in result["rows"]})
    figure.suptitle("Order of the cuts at T/30, T/15 and T/10, recipe best; bundled teacher 256 -> 128, "
                    f"seeds: {seeds}")
    return figure


if __name__ == "__main__":
    experiment.main("order", __doc__, measure, draw, ("--corpus", {"help": "a large text"}))
