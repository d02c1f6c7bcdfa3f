"""Held-out KL to the teacher over training, under different schedules and starting points (HomoDistil, figure 2).

Iterative pruning with t_f from 0.3 T to 0.9 T, a linear instead of the cubic schedule, everything pruned at once, and
students that start at their final shape, truncated or with random weights. Same steps, same data.
"""

import statistics

import experiment

ARMS = {
    "iterative, t_f = 0.3 T": {"prune_end": 0.3},
    "iterative, t_f = 0.7 T": {},
    "iterative, t_f = 0.9 T": {"prune_end": 0.9},
    "linear, t_f = 0.7 T": {"prune_power": 1},
    "single prune at T/30": experiment.SINGLE,
    "truncated teacher": {"init": "truncated"},
    "random weights": {"init": "random"},
}
DRAWN = {  # arm -> label, and where it stands
    "iterative, t_f = 0.7 T": ("iterative pruning\n(steps 0 to 700)", (210, 0.26)),
    "single prune at T/30": ("single\nprune\n(step 33)", (5, 0.93)),
    "truncated teacher": ("truncated teacher\n(its first units)", (92, 1.55)),
    "random weights": ("random weights", (480, 1.86)),
}


def measure(args) -> dict:
    return {"rows": experiment.compare(ARMS, args.seeds, args.corpus)}


def draw(result: dict):
    rows = experiment.rows_of(result["rows"])
    figure, axis = experiment.panels(
        "Pruned gradually, the student is closer to its teacher at first, but not at the end",
        f"256 → 128, {experiment.BUDGET}; {experiment.over_seeds(result['rows'], 'range')}", 1, 4.8)
    experiment.plot_curves(axis, [row for arm in DRAWN for row in rows[arm]])
    for arm, (text, where) in DRAWN.items():
        axis.text(*where, text, color=experiment.COLOURS.get(arm, experiment.GREY), va="center")
    iterative, single = (statistics.fmean(row["kl"][-1] for row in rows[arm]) for arm in list(DRAWN)[:2])
    axis.text(1000, 0.12, f"at the end: iterative {iterative:.2f}, single prune {single:.2f}", ha="right")
    axis.set(xlim=(0, 1015), ylim=(0, 2.8))
    return figure


if __name__ == "__main__":
    experiment.main("schedules", __doc__, measure, draw, corpus="Text to train on.")
