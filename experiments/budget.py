"""What ten times the tokens change: the paper's settings and our presets, with the masked-LM loss and without it.

Matmuls are in bf16, which changes neither KL nor masked-LM loss at the smaller budget (docs/performance.md).
"""

import experiment
from presets import ARMS

LONG = {"steps": 10_000, "eval_every": 1000, "precision": "bf16"}


def measure(args) -> dict:
    return {"rows": experiment.compare({arm: flags | LONG for arm, flags in ARMS.items()}, args.seeds, args.corpus)}


def draw(result: dict):
    rows = [row | {key: row[key][1:] for key in ("step", "kl", "masked_lm_loss")} for row in result["rows"]]
    figure, axes = experiment.panels(
        "With ten million tokens, the masked-LM loss makes the better language model",
        f"256 → 128, 10,000 steps of 8 x 128 tokens of Wikipedia, bf16; {experiment.over_seeds(rows, 'range')}", 2, 4.2)
    for axis, key in zip(axes, ("kl", "masked_lm_loss"), strict=True):
        experiment.plot_curves(axis, rows, key)
    axes[0].set_ylim(0, 0.65)
    axes[0].legend(frameon=False)
    teacher = result["rows"][0]["masked_lm_loss"][0]  # the student starts as a copy of the teacher
    axes[1].axhline(teacher, color=experiment.GREY, linestyle=":")
    axes[1].text(1000, teacher + 0.01, "teacher", color=experiment.GREY)
    return figure


if __name__ == "__main__":
    experiment.main("budget", __doc__, measure, draw, corpus="Text to train on.")
