"""Shrink a sentence encoder: all-MiniLM-L6-v2, a teacher without a masked-LM head, to half its width.

For the teacher and its students: Spearman correlation on the dev split of STS-B between the labels and the cosines of
mean-pooled embeddings, size, and time per sentence. No student was trained on a pair.
"""

import statistics
import time
from pathlib import Path

import experiment
import numpy as np
import torch
import torch.nn.functional as F

from model import Bert
from support.batches import Example
from support.checkpoint import load_model, load_tokenizer
from support.glue import read_task
from support.metrics import spearman

ARMS = {"paper's settings": {}, "preset imitation": {"preset": "imitation"}}
BUDGET = {"steps": 400, "batch_size": 16, "learning_rate": 4e-4, "eval_every": 100}


@torch.no_grad()
def embed(bert: Bert, encodings) -> torch.Tensor:
    """Unit vectors (N,D): the mean of the last layer's output over the tokens of each sentence."""
    parts = []
    for first in range(0, len(encodings), 64):
        rows = [torch.tensor(encoding.ids) for encoding in encodings[first : first + 64]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B,S)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (B,S)
        hidden = bert(ids, attention_mask=mask).hidden[-1]  # (B,S,D)
        parts.append(F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1))
    return torch.cat(parts)


def judge(folder: Path, pairs: list[Example]) -> dict:
    """Spearman in percent, megabytes in float32, and milliseconds per sentence of one checkpoint."""
    bert = load_model(folder).eval()
    tokenizer = load_tokenizer(folder, bert.config.vocab_size)
    first, second = (tokenizer.encode_batch(list(texts)) for texts in zip(*(pair.texts for pair in pairs), strict=True))
    cosines = (embed(bert, first) * embed(bert, second)).sum(1).numpy()  # (N,)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        embed(bert, first[:256])
        seconds.append(time.perf_counter() - start)
    return {"spearman": 100 * spearman(cosines, np.array([pair.label for pair in pairs])),
            "megabytes": 4e-6 * bert.parameter_count(), "milliseconds": statistics.median(seconds) * 1000 / 256}


def measure(args) -> dict:
    pairs = read_task("stsb", Path(args.data))["dev"]
    rows = [{"arm": "teacher", "seed": 0, **judge(Path(args.teacher), pairs)}]
    for arm, flags in ARMS.items():
        for seed in args.seeds:
            folder = experiment.distil(**flags, **BUDGET, teacher=args.teacher, corpus=args.corpus, seed=seed)
            rows.append({"arm": arm, "seed": seed, **judge(folder / "student", pairs)})
    return {"budget": BUDGET, "pairs": len(pairs), "rows": rows}


def draw(result: dict):
    budget = result["budget"]
    figure, axis = experiment.panels(
        "Half the width: a third of the time, a lower correlation",
        f"all-MiniLM-L6-v2 384 → 192, {budget['steps']} steps of {budget['batch_size']} x 128 tokens of Wikipedia; "
        f"one seed, {result['threads']} thread", 1, 3.6, width=7.5)
    for row in result["rows"]:
        colour = experiment.COLOURS.get(row["arm"], experiment.GREY)
        axis.plot(row["milliseconds"], row["spearman"], "o", color=colour)
        axis.annotate(f"{row['arm']}, {row['megabytes']:.0f} MB", (row["milliseconds"], row["spearman"]), (8, 0),
                      textcoords="offset points", va="center", color=colour)
    axis.set(xlim=(0, 5.5), ylim=(70, 90), xlabel="milliseconds per sentence", ylabel="STS-B, Spearman (percent)")
    axis.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    experiment.main("sentences", __doc__, measure, draw, teacher="folder of all-MiniLM-L6-v2",
                    corpus="text to train on", data="folder of STS-B")
