"""In which order to cut: feed-forward, heads and hidden dimensions of --recipe best, at T/30, T/15 and T/10.

The program cuts all of them together; here its schedule is replaced, and every run is made anew.
"""

import itertools

import experiment
from experiment import plt

import distill
import prune

NAMES = {"feed-forward": ("intermediate",), "heads": ("heads", "head_size"), "hidden": ("hidden",)}
TIMES = (1 / 30, 1 / 15, 1 / 10)  # of the run
ORDERS = ("feed-forward", "heads", "hidden"), ("heads", "hidden", "feed-forward"), ("hidden", "feed-forward", "heads")
ARMS = {", ".join(order): dict(zip(order, TIMES, strict=True)) for order in ORDERS} | {
    f"together at T/{round(1 / time)}": dict.fromkeys(NAMES, time) for time in TIMES}


def in_order(times: dict[str, float], steps: int):
    """A schedule with the interface of `prune.scheduled_widths`, which cuts every part at its own time."""
    def widths(step, start, end, first, last, granularity, power):
        cut = [name for part, time in times.items() if step >= time * steps for name in NAMES[part]]
        return first._replace(**{name: getattr(last, name) for name in cut})

    return widths


def measure(args) -> dict:
    rows = []
    for seed, (arm, times) in itertools.product(args.seeds, ARMS.items()):
        flags = experiment.BASE | {"recipe": "best", "seed": seed, "output": experiment.RUNS / "order"}
        prune.scheduled_widths = in_order(times, flags["steps"])
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        folder = distill.distill(distill.parse_arguments([*words, "--overwrite"])).parent
        rows.append({"arm": arm, "seed": seed, **experiment.curve(folder)})
    return {"rows": rows}


def draw(result: dict):
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    experiment.bars(axis, result["rows"], lambda row: row["kl"][-1], "KL to the teacher at the end, nats")
    seeds = len({row["seed"] for row in result["rows"]})
    axis.set_title(f"Order of the cuts at T/30, T/15 and T/10, recipe best; bundled teacher 256 -> 128,\n"
                   f"{experiment.BUDGET}, seeds: {seeds}", fontsize="medium")
    return figure


if __name__ == "__main__":
    experiment.main("order", __doc__, measure, draw)
