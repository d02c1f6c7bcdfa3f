"""Which losses matter: all, without one of them, and one alone."""

import experiment
from experiment import plt

ARMS = {
    "all (published)": {},
    "without hidden": {"alpha_hidn": 0},
    "without embedding": {"alpha_emb": 0},
    "without attention": {"alpha_attn": 0},
    "without masked-LM": {"alpha_mlm": 0},
    "KL alone": {"alpha_mlm": 0, "alpha_hidn": 0, "alpha_emb": 0, "alpha_attn": 0},
    "masked-LM alone": {"alpha_pred": 0, "alpha_hidn": 0, "alpha_emb": 0, "alpha_attn": 0},
}


def measure(args) -> dict:
    return {"rows": experiment.compare(ARMS, args.seeds)}


def draw(result: dict):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", sharey=True)
    experiment.bars(left, result["rows"], lambda row: row["kl"][-1], "KL to the teacher at the end, nats")
    experiment.bars(right, result["rows"], lambda row: row["mlm_loss"][-1], "held-out masked-LM loss at the end")
    seeds = len({row["seed"] for row in result["rows"]})
    figure.suptitle(f"Bundled teacher 256 -> 128, {experiment.BUDGET}, seeds: {seeds}")
    return figure


if __name__ == "__main__":
    experiment.main("losses", __doc__, measure, draw)
