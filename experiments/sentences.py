"""A sentence encoder made small: all-MiniLM-L6-v2, a teacher without a masked-LM head, to half its width.

Spearman correlation on STS-B's dev pairs between the people's scores and the cosines of mean-pooled embeddings, for the
teacher and its students, with megabytes and milliseconds. No student has seen a pair.
"""

import statistics
import time

import experiment
import numpy as np
import torch
import torch.nn.functional as F
from experiment import Path, plt

import data
import finetune
import model

ARMS = {"student, as published": {}, "student, recipe best": {"recipe": "best"}}
BUDGET = {"steps": 400, "batch_size": 16, "learning_rate": 4e-4, "eval_every": 100}


@torch.no_grad()
def embed(bert: model.Bert, encodings) -> torch.Tensor:
    """Unit vectors (n,D): the mean of the last layer's output over the tokens of each sentence."""
    found = []
    for first in range(0, len(encodings), 64):
        rows = [torch.tensor(e.ids) for e in encodings[first : first + 64]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (n,S)
        hidden = bert(ids, attention_mask=mask).hidden[-1]
        found.append(F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1))
    return torch.cat(found)


def judge(folder: Path, pairs: finetune.Table) -> dict:
    """Spearman in percent, size and milliseconds a sentence of one checkpoint."""
    bert = model.load_model(folder).eval()
    tokenizer = data.load_tokenizer(folder, bert.config.vocab_size)
    first, second = (tokenizer.encode_batch(list(texts)) for texts in zip(*pairs.texts, strict=True))
    cosines = (embed(bert, first) * embed(bert, second)).sum(1).numpy()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        embed(bert, first[:256])
        seconds.append(time.perf_counter() - start)
    return {"spearman": 100 * finetune.spearman(cosines, np.array(pairs.labels)),
            "megabytes": 4e-6 * bert.parameter_count(), "milliseconds": statistics.median(seconds) * 1000 / 256}


def measure(args) -> dict:
    pairs = finetune.read_task("stsb", Path(args.data))["dev"]
    rows = [{"arm": "teacher", "seed": 0, **judge(Path(args.teacher), pairs)}]
    for arm, flags in ARMS.items():
        for seed in args.seeds:
            folder = experiment.distil(**flags, **BUDGET, teacher=args.teacher, corpus=args.corpus, seed=seed)
            rows.append({"arm": arm, "seed": seed, **judge(folder / "student", pairs)})
    return {"budget": BUDGET, "pairs": len(pairs.texts), "rows": rows}


def draw(result: dict):
    figure, axes = plt.subplots(1, 3, figsize=(13, 2.6), layout="constrained", sharey=True)
    labels = {"spearman": "Spearman on STS-B dev, percent", "megabytes": "megabytes in float32",
              "milliseconds": "milliseconds a sentence"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        experiment.bars(axis, result["rows"], lambda row, key=key: row[key], label)
    budget = result["budget"]
    figure.suptitle(f"all-MiniLM-L6-v2 384 -> 192, {budget['steps']} steps of {budget['batch_size']} x 128 tokens of "
                    f"Wikipedia, {result['threads']} thread(s)")
    return figure


if __name__ == "__main__":
    experiment.main(
        "sentences", __doc__, measure, draw,
        ("--teacher", {"help": "folder of all-MiniLM-L6-v2"}),
        ("--corpus", {"help": "text to learn from"}),
        ("--data", {"help": "folder of STS-B"}))
