"""Granularity and jumps: the KL to the teacher right before and right after every cut."""

import experiment
from experiment import plt

ARMS = {
    "granularity 8 (published)": {},
    "granularity 32": {"granularity": 32},
    "all at once, T/30": {"prune_start": 1 / 30, "prune_end": 1 / 30},
    "recipe best": {"recipe": "best"},
}


def measure(args) -> dict:
    rows = []
    for arm, flags in ARMS.items():
        for seed in args.seeds:
            folder = experiment.distil(**flags, seed=seed, eval_cuts=True)
            cuts = [{"step": cut["step"], "D": cut["after"]["hidden"], "before": cut["eval_before"]["kl"],
                     "after": cut["eval_after"]["kl"]} for cut in experiment.events(folder, "cut")]
            rows.append({"arm": arm, "seed": seed, "run": folder.name, "cuts": cuts, **experiment.curve(folder)})
    return {"rows": rows}


def draw(result: dict):
    groups = experiment.rows_of(result["rows"])
    figure, axes = plt.subplots(1, len(groups), figsize=(14, 4), layout="constrained", sharey=True)
    for axis, (arm, group) in zip(axes, groups.items(), strict=True):
        row = group[0]  # one seed is drawn
        points = [*zip(row["step"], row["kl"], strict=True)]
        for cut in row["cuts"]:
            points += [(cut["step"] - 0.01, cut["before"]), (cut["step"], cut["after"])]
            axis.plot([cut["step"]] * 2, [cut["before"], cut["after"]], color="C3", linewidth=2)
        axis.plot(*zip(*sorted(points), strict=True), color="C0", linewidth=1)
        largest = max(cut["after"] - cut["before"] for cut in row["cuts"])
        axis.set_title(f"{arm}\ncuts: {len(row['cuts'])}, largest jump {largest:.2f}", fontsize="medium")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL to the teacher, nats")
    figure.suptitle(f"Jumps (red) at the cuts; bundled teacher 256 -> 128, {experiment.BUDGET}, seed 0")
    return figure


if __name__ == "__main__":
    experiment.main("jumps", __doc__, measure, draw)
