"""Which neurons to prune: by sensitivity, PLATON, magnitude or chance."""

import experiment

ARMS = {
    "sensitivity": {},
    "PLATON": {"importance": "platon"},
    "magnitude": {"importance": "magnitude"},
    "random": {"importance": "random"},
}


def measure(args) -> dict:
    return {"rows": experiment.compare(ARMS, args.seeds, corpus=args.corpus)}


def draw(result: dict):
    figure, axes = experiment.panels(
        "Sensitivity and PLATON prune equally well; magnitude is a little worse",
        f"256 → 128, {experiment.BUDGET}; {experiment.over_seeds(result['rows'], 'standard deviation')}", 2, 2.8,
        sharey=True)
    for axis, key in zip(axes, ("kl", "masked_lm_loss"), strict=True):
        experiment.plot_dots(axis, result["rows"], lambda row, key=key: row[key][-1], experiment.LABELS[key])
    return figure


if __name__ == "__main__":
    experiment.main("importance", __doc__, measure, draw, corpus="text to train on")
