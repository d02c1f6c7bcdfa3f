"""Tokens per second of data.py, its memory as the corpus grows, and how long a batch takes to make beside a step.

    python benchmarks/tokenise.py --corpus my/text.txt --json benchmarks/results/tokenise.json

The corpus is tokenised once as it is and once four times over, each in a process of its own whose peak memory is
taken: what does not depend on the size of the corpus is the same in both.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RECIPE, ROOT, alone, header, write
from systems import SHAPES, build, random_batch, target

import data
import prune
from model import BertConfig
from run import memory_mb

TEACHER = ROOT / "teachers" / "small"
VOCAB_SIZE = BertConfig.load(TEACHER).vocab_size


def tokenise(corpus: str, copies: int, cache: Path) -> dict:
    """Tokenise a corpus `copies` times over; for a process of its own."""
    tokenizer = data.load_tokenizer(TEACHER, VOCAB_SIZE)
    start = time.perf_counter()
    tokens = data.tokenise([corpus] * copies, tokenizer, cache)
    count = len(tokens.train) + len(tokens.heldout)
    return {"copies": copies, "tokens": count, "tokens_per_second": count / (time.perf_counter() - start),
            "peak_memory": memory_mb(torch.device("cpu"))}


def batch_beside_step(cache: Path, corpus: str, repeats: int) -> dict:
    """Median seconds of making a training batch and of the fastest step that would wait for it: the small shape at its
    final width."""
    device, (config, seq_length, rows_in_step) = torch.device("cpu"), SHAPES["small"]
    tokenizer = data.load_tokenizer(TEACHER, VOCAB_SIZE)
    rows = data.Rows(data.tokenise([corpus], tokenizer, cache).train, seq_length, tokenizer)
    system = build("small", ["ours"], device, bf16=False)["ours"]
    system.narrow(target(config), prune.unit_importance("magnitude", system.distiller, {}, 0))
    batches = [random_batch("small", rows_in_step, device)]
    system.step(batches)
    seconds = {"batch": [], "step": []}
    for step in range(repeats):
        start = time.perf_counter()
        rows.training_batch(RECIPE.seed, step, rows_in_step)
        made = time.perf_counter()
        system.step(batches)
        seconds["batch"].append(made - start)
        seconds["step"].append(time.perf_counter() - made)
    return {f"{what}_seconds": statistics.median(times) for what, times in seconds.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--corpus", help="A file or folder as distill.py takes it. The demo corpus unless given.")
    parser.add_argument("--repeats", type=int, default=20, help="Batches and steps that are timed [%(default)s].")
    parser.add_argument("--threads", type=int, default=2, help="Threads of tokenizer and step [%(default)s].")
    parser.add_argument("--json", type=Path, help="Where the result goes.")
    args = parser.parse_args(argv)
    os.environ |= {"RAYON_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "true"}
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), args.corpus
        if corpus is None:  # as a file, so that it can be read several times over
            corpus = str(folder / "demo.txt")
            Path(corpus).write_text("\n\n".join(data.demo_documents()), encoding="utf-8")
        sizes = [alone(tokenise, corpus, copies, folder) for copies in (1, 4)]
        beside = batch_beside_step(folder, corpus, args.repeats)
    result = header(argv, torch.device("cpu")) | {"tokenise": sizes} | beside
    if args.json:
        write(args.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
