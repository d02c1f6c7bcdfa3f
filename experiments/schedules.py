"""Held-out KL to the teacher over training, under different schedules and starting points (HomoDistil, figure 2).

Iterative pruning with t_f from 0.3 T to 0.9 T, a linear instead of the cubic schedule, everything pruned at once, and
students that start at their final shape, truncated or with random weights. Same steps, same data. To half and to a
quarter of the width, also with our extensions.
"""

import statistics

import experiment

ITERATIVE = {
    "iterative, t_f = 0.3 T": {"prune_end": 0.3},
    "iterative, t_f = 0.7 T": {},
}
SINGLE = {"single prune at T/30": experiment.SINGLE}
TRUNCATED = {"truncated teacher": {"init": "truncated"}}
EXTENSIONS = {"single prune, both extensions": {"preset": "compensated"}}
HALF = ITERATIVE | {
    "iterative, t_f = 0.9 T": {"prune_end": 0.9},
    "linear, t_f = 0.7 T": {"prune_power": 1},
} | SINGLE | TRUNCATED | {"random weights": {"init": "random"}} | EXTENSIONS
QUARTER = ITERATIVE | SINGLE | TRUNCATED | {
    "iterative, t_f = 0.7 T": {"granularity": 8},  # the default; older runs without it pruned heads in smaller steps
    "iterative, t_f = 0.3 T, both extensions": {"prune_end": 0.3, "align_heads": True, "compensate": True},
} | EXTENSIONS
WIDTHS = {"rows": 128, "other_rows": 64}
RATES = 1e-3, 4e-3  # to compare schedules at their best learning rate: the default is 2e-3
DRAWN = {*SINGLE, *TRUNCATED, *ITERATIVE, *EXTENSIONS, "random weights"}


def measure(args) -> dict:
    quarter = {arm: flags | {"target_width": WIDTHS["other_rows"]} for arm, flags in QUARTER.items()}
    other_rates = {f"{arm}, learning rate {rate:g}": quarter[arm] | {"learning_rate": rate}
                   for arm in ("iterative, t_f = 0.3 T", "single prune at T/30") for rate in RATES}
    half, quarter = (experiment.compare(arms, args.seeds, args.corpus) for arms in (HALF, quarter))
    return {"rows": half, "other_rows": quarter + experiment.compare(other_rates, [0], args.corpus)}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Gradual pruning helps only if much is pruned; our extensions help at both widths",
        f"{experiment.BUDGET}; {experiment.over_seeds(result['rows'], 'range')}", 2, 4.8, sharey=True)
    for axis, (name, width) in zip(axes, WIDTHS.items(), strict=True):
        rows = [row for row in result[name] if row["arm"] in DRAWN]
        experiment.plot_curves(axis, rows)
        ends = [statistics.fmean(row["kl"][-1] for row in rows if row["arm"] == arm) for arm in (
            "single prune at T/30", "iterative, t_f = 0.3 T", "single prune, both extensions")]
        axis.set(xlim=(0, 1015), ylim=(0, 2.8), title="256 → {}; at the end: single prune {:.3f},\n"
                 "iterative (0.3 T) {:.3f}, both extensions {:.3f}".format(width, *ends))
    axes[0].text(480, 1.9, "random weights", color=experiment.GREY)
    axes[1].set_ylabel("")
    axes[1].legend(frameon=False)
    return figure


if __name__ == "__main__":
    experiment.main("schedules", __doc__, measure, draw, corpus="Text to train on.")
