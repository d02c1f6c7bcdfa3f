"""Our extensions beside the paper's settings and a single prune, at three budgets.

At every budget also --preset imitation with other pruning times, and at the smallest one what each part of the presets
does. The first three arms have all seeds at the smallest budget; everything else has the first seed. --corpus is the
text of the largest budget.
"""

import experiment
from experiment import SINGLE

IMITATION = {"preset": "imitation"}
ARMS = {"paper's settings": {}, "single prune at T/30": SINGLE, "preset imitation": IMITATION}
PARTS = {
    "paper's, no masked-LM loss": {"alpha_mlm": 0},
    "paper's, aligned, compensated": {"align_heads": True, "compensate": True},
    "single prune, no masked-LM loss": SINGLE | {"alpha_mlm": 0},
    "single prune, aligned": SINGLE | {"align_heads": True},
    "single prune, compensated": SINGLE | {"compensate": True},
    "preset compensated": {"preset": "compensated"},
}
TIMES = {
    "imitation, prune at T/100": IMITATION | {"prune_start": 0.01, "prune_end": 0.01},
    "imitation, prune at T/10": IMITATION | {"prune_start": 0.1, "prune_end": 0.1},
    "imitation, prune until T/5": IMITATION | {"prune_end": 0.2, "granularity": 32},
    "imitation, prune until T/2": IMITATION | {"prune_end": 0.5, "granularity": 32},
}
SMALLEST, LARGEST = "0.2 million tokens", "10 million tokens of Wikipedia, bf16"
BUDGETS = {
    SMALLEST: {},
    "1 million tokens, bf16": {"steps": 1000, "eval_every": 125, "precision": "bf16"},
    LARGEST: {"steps": 5000, "batch_size": 16, "learning_rate": 1e-3, "precision": "bf16", "eval_every": 250},
}


def measure(args) -> dict:
    rows, first = [], args.seeds[:1]
    for budget, flags in BUDGETS.items():
        if budget == LARGEST:
            flags = flags | {"corpus": args.corpus}
        more = TIMES if flags else PARTS | TIMES
        made = experiment.compare({arm: own | flags for arm, own in ARMS.items()}, first if flags else args.seeds)
        made += experiment.compare({arm: own | flags for arm, own in more.items()}, first)
        rows += [row | {"budget": budget} for row in made]
    return {"rows": rows}


def draw(result: dict):
    by_budget = experiment.rows_of(result["rows"], "budget")
    figure, (left, right) = experiment.panels(
        "Closer to the teacher without the masked-LM loss, and with compensated pruning",
        "bundled teacher 256 → 128; three seeds of the paper's settings, single prune and imitation on the right, "
        "otherwise one", 2, 4.4, width_ratios=(1.5, 1))
    experiment.plot_curves(left, [row for row in by_budget[LARGEST] if row["arm"] in ARMS], "tokens")
    left.set_title(LARGEST)
    left.set_ylim(bottom=0)
    arms = experiment.rows_of(by_budget[SMALLEST])
    order = sorted(ARMS | PARTS, key=lambda arm: -arms[arm][0]["kl"][-1])
    experiment.plot_dots(right, [row for arm in order for row in arms[arm]], lambda row: row["kl"][-1],
                         experiment.LABELS["kl"])
    right.set_title(SMALLEST)
    right.set_xlim(left=0)
    return figure


if __name__ == "__main__":
    experiment.main("recipe", __doc__, measure, draw, corpus="a large text")
