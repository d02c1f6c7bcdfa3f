"""Downstream accuracy under the schedules (HomoDistil, figure 3): students of schedules.py and recipe.py, fine-tuned.

Every student is fine-tuned on SST-2, MRPC, RTE, CoLA and STS-B with several seeds; --data names the folder of GLUE,
--corpus the text of the largest budget of recipe.py.
"""

import experiment
import recipe
import schedules
from experiment import plt

ARMS = {arm: schedules.ARMS[arm] for arm in (
    "iterative, t_f = 0.7 T (published)", "all at once, T/30", "truncated teacher", "random weights")} | {
    "recipe best": recipe.BEST, "recipe best, with masked-LM": recipe.PARTS["single cut, aligned, compensated"]}
STEPS = 150


def measure(args) -> dict:
    models = {"teacher": experiment.ROOT / "teachers" / "small"}
    models |= {arm: experiment.distil(**flags, seed=0) / "student" for arm, flags in ARMS.items()}
    models |= {f"{arm}, 10 M": experiment.distil(**flags, **recipe.LARGEST, corpus=args.corpus, seed=0) / "student"
               for arm, flags in recipe.ARMS.items()}
    return {"steps": STEPS, "rows": experiment.finetuned(models, args.data, experiment.TASKS, args.seeds, STEPS)}


def draw(result: dict):
    panels = [*experiment.TASKS, "average"]
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 4), layout="constrained", sharey=True)
    averages = []
    for arm, group in experiment.rows_of(result["rows"]).items():
        for seed, rows in experiment.rows_of(group, "seed").items():
            averages.append({"arm": arm, "seed": seed, "task": "average",
                             "score": sum(row["score"] for row in rows) / len(rows)})
    for axis, task in zip(axes, panels, strict=True):
        rows = [row for row in result["rows"] + averages if row["task"] == task]
        experiment.bars(axis, rows, lambda row: row["score"], task)
    figure.suptitle(f"Fine-tuned for {result['steps']} steps, dev, percent, mean and standard deviation over "
                    f"{len({row['seed'] for row in result['rows']})} seeds; students of 0.2 and of 10 million tokens")
    return figure


if __name__ == "__main__":
    experiment.main("downstream", __doc__, measure, draw, ("--data", {"help": "folder of GLUE"}),
                    ("--corpus", {"help": "a large text"}))
