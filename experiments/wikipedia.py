"""Our presets with a larger teacher and real text, beside the paper's settings and a single prune."""

import experiment

BUDGET = {"steps": 600, "batch_size": 16, "learning_rate": 4e-4, "eval_every": 60, "eval_rows": 256,
          "precision": "bf16"}
ARMS = {"paper's settings": {}, "single prune at T/30": experiment.SINGLE,
        **{f"preset {preset}": {"preset": preset} for preset in ("imitation", "compensated")}}


def measure(args) -> dict:
    rows = experiment.compare(ARMS, args.seeds, **BUDGET, teacher=args.teacher, corpus=args.corpus)
    return {"budget": BUDGET, "rows": rows}


def draw(result: dict):
    rows = result["rows"]
    figure, axes = experiment.panels(
        "With a larger teacher, too, our presets end closer to it, and as better language models",
        f"6 x 384 → 192, {result['budget']['steps']} steps of {result['budget']['batch_size']} x 128 tokens of "
        f"Wikipedia, bf16; {experiment.over_seeds(rows, 'range')}", 2, 4.2)
    for axis, key in zip(axes, ("kl", "masked_lm_loss"), strict=True):
        experiment.plot_curves(axis, rows, "tokens", key)
    axes[0].set_ylim(bottom=0)
    teacher = rows[0]["masked_lm_loss"][0]  # the student starts as a copy of the teacher
    axes[1].axhline(teacher, color=experiment.GREY, linestyle=":")
    axes[1].text(0.5, teacher, "teacher", color=experiment.GREY, va="bottom")
    return figure


if __name__ == "__main__":
    experiment.main("wikipedia", __doc__, measure, draw, teacher="folder of the teacher", corpus="text to train on")
