"""A family in one run (--snapshots): every member beside a student that was trained for its width alone.

A member has learned for the steps until the path leaves its width; a student of its own has the whole run.
"""

import experiment
from experiment import plt

SNAPSHOTS, LAST = (192, 160), 128
ARMS = {"as published": {}, "linear, t_f = 0.9 T": {"prune_power": 1, "prune_end": 0.9}}


def measure(args) -> dict:
    rows = []
    for arm, flags in ARMS.items():
        for seed in args.seeds:
            run = experiment.distil(**flags, seed=seed, snapshots=",".join(map(str, SNAPSHOTS)), eval_cuts=True)
            left = {cut["before"]["hidden"]: cut for cut in experiment.events(run, "cut")}
            for width in (*SNAPSHOTS, LAST):
                own = flags if width == LAST else flags | {"target_width": width}
                alone = experiment.curve(experiment.distil(**own, seed=seed))
                step, kl = alone["step"][-1], experiment.curve(run)["kl"][-1]
                if width != LAST:
                    step, kl = left[width]["step"], left[width]["eval_before"]["kl"]
                rows.append({"arm": f"{arm}, {width}", "seed": seed, "step": step, "kl": kl,
                             "kl_alone": alone["kl"][-1]})
    return {"rows": rows}


def draw(result: dict):
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    groups = experiment.rows_of(result["rows"])
    labels = {"kl": "member of the family", "kl_alone": "trained for its width alone"}
    for i, group in enumerate(groups.values()):
        for key, color, offset in (("kl", "C0", -0.2), ("kl_alone", "C1", 0.2)):
            mean, spread = experiment.mean_and_spread([row[key] for row in group])
            axis.barh(i + offset, mean, 0.38, xerr=spread, color=color, label=None if i else labels[key])
            axis.text(mean + spread, i + offset, f" {mean:.3f}", va="center", fontsize="small")
    axis.set_yticks(range(len(groups)), [f"{arm} (left at step {group[0]['step']})" for arm, group in groups.items()])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("KL to the teacher, nats")
    figure.legend(loc="outside lower center", ncols=2)
    seeds = len({row["seed"] for row in result["rows"]})
    figure.suptitle(f"--snapshots 192,160; bundled teacher, {experiment.BUDGET}, seeds: {seeds}")
    return figure


if __name__ == "__main__":
    experiment.main("family", __doc__, measure, draw)
