"""Speed and memory of tokenisation, and the time to make a batch beside the time of a training step.

    python benchmarks/tokenise.py --corpus my/text.txt --json benchmarks/results/tokenise.json

The corpus is tokenised once as it is and once repeated four times, each in a new process whose peak memory is measured.
Equal peaks show that memory does not grow with the corpus.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import PAPER, ROOT, header, run_in_process, write
from systems import SHAPES, build, random_batch, target

import prune
from data import MaskedRows
from support.checkpoint import load_config, load_tokenizer
from support.corpus import demo_documents
from support.corpus import tokenise as tokenise_corpora
from support.distributed import peak_memory_mb

TEACHER = ROOT / "teachers" / "small"


def teacher_tokenizer():
    return load_tokenizer(TEACHER, load_config(TEACHER).vocab_size)


def tokenise(corpus: str, copies: int, cache: Path) -> dict:
    """Tokenise `copies` copies of a file. To be called in a new process."""
    files = [shutil.copy(corpus, f"{cache}/{copy}-{Path(corpus).name}") for copy in range(copies)]
    start = time.perf_counter()
    tokens = tokenise_corpora(files, teacher_tokenizer(), cache)
    count = len(tokens.train) + len(tokens.heldout)
    return {"copies": copies, "tokens": count, "tokens_per_second": count / (time.perf_counter() - start),
            "peak_memory": peak_memory_mb(torch.device("cpu"))}


def batch_and_step(cache: Path, corpus: str, repeats: int) -> dict:
    """Median seconds to make a training batch, and of the fastest step: the small shape at its final width."""
    device, (config, seq_length, rows_per_step) = torch.device("cpu"), SHAPES["small"]
    tokenizer = teacher_tokenizer()
    rows = MaskedRows(tokenise_corpora([corpus], tokenizer, cache).train, seq_length, tokenizer)
    system = build("small", ["ours"], device, bf16=False)["ours"]
    system.prune_to(target(config), prune.unit_importance("magnitude", {}, system.distiller.student, 0))
    batches = [random_batch("small", rows_per_step, device)]
    system.step(batches)
    seconds = {"batch": [], "step": []}
    for step in range(repeats):
        start = time.perf_counter()
        rows.training_batch(PAPER.seed, step, rows_per_step)
        middle = time.perf_counter()
        system.step(batches)
        seconds["batch"].append(middle - start)
        seconds["step"].append(time.perf_counter() - middle)
    return {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--corpus", help="File, as for distill.py. Default: the demo text.")
    parser.add_argument("--repeats", type=int, default=20, help="Batches and steps to time. [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="Threads of tokenizer and step. [%(default)s]")
    parser.add_argument("--json", type=Path, help="File for the result.")
    args = parser.parse_args(argv)
    os.environ |= {"RAYON_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "true"}
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name), args.corpus
        if corpus is None:  # as a file, because `demo` cannot be repeated
            corpus = str(folder / "demo.txt")
            Path(corpus).write_text("\n\n".join(demo_documents()), encoding="utf-8")
        sizes = [run_in_process(tokenise, corpus, copies, folder) for copies in (1, 4)]
        times = batch_and_step(folder, corpus, args.repeats)
    result = header(argv, torch.device("cpu")) | {"tokenise": sizes} | times
    if args.json:
        write(args.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
