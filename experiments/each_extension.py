"""What aligned heads and compensated pruning bring, each alone and both, with the masked-LM loss and without it.

Everything is pruned at once, as in our presets. Beside it the paper's settings, which prune gradually.
"""

import experiment

ARMS = {
    "gradually (paper's settings)": {},
    "at once": experiment.SINGLE,
    "at once, aligned heads": experiment.SINGLE | {"align_heads": True},
    "at once, compensated": experiment.SINGLE | {"compensate": True},
    "at once, both": {"preset": "compensated"},
}
NO_MASKED_LM = {arm: flags | {"alpha_mlm": 0} for arm, flags in ARMS.items()}
NO_MASKED_LM["at once, both"] = {"preset": "imitation"}


def measure(args) -> dict:
    rows, other_rows = (experiment.compare(arms, args.seeds, args.corpus) for arms in (ARMS, NO_MASKED_LM))
    return {"rows": rows, "other_rows": other_rows}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Aligned heads bring more than compensated pruning, and both together most",
        f"256 → 128, {experiment.BUDGET}; {experiment.over_seeds(result['rows'], 'standard deviation')}", 2, 2.8,
        sharey=True)
    titles = {"rows": "trained on the masked-LM loss", "other_rows": "without it"}
    for axis, (rows, title) in zip(axes, titles.items(), strict=True):
        experiment.plot_dots(axis, result[rows], lambda row: row["kl"][-1], experiment.LABELS["kl"])
        axis.set_title(title)
    return figure


if __name__ == "__main__":
    experiment.main("each_extension", __doc__, measure, draw, corpus="Text to train on.")
