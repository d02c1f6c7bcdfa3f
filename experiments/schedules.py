"""The discrepancy over training under different schedules (HomoDistil, figure 2), and the classical ways.

Held-out KL to the teacher: iterative pruning with t_f from 0.3 T to 0.9 T, the cubic against the linear schedule, all
cut at once at the start, and students that begin at their final width, truncated or random. Same steps, same data.
"""

import experiment
from experiment import plt

ARMS = {
    "iterative, t_f = 0.3 T": {"prune_end": 0.3},
    "iterative, t_f = 0.5 T": {"prune_end": 0.5},
    "iterative, t_f = 0.7 T (published)": {},
    "iterative, t_f = 0.9 T": {"prune_end": 0.9},
    "linear, t_f = 0.7 T": {"prune_power": 1},
    "all at once, T/30": {"prune_start": 1 / 30, "prune_end": 1 / 30},
    "truncated teacher": {"init": "truncated"},
    "random weights": {"init": "random"},
}


def measure(args) -> dict:
    return {"rows": experiment.compare(ARMS, args.seeds)}


def draw(result: dict):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(3, 2))
    experiment.plot_curves(left, result["rows"])
    left.set_ylim(0, 2.5)
    left.legend(fontsize="small")
    experiment.bars(right, result["rows"], lambda row: row["kl"][-1], "KL to the teacher at the end, nats")
    seeds = len({row["seed"] for row in result["rows"]})
    figure.suptitle(f"Bundled teacher 256 -> 128, {experiment.BUDGET}, seeds: {seeds}")
    return figure


if __name__ == "__main__":
    experiment.main("schedules", __doc__, measure, draw)
