"""Time of one SST-2 epoch in finetune.py and in the Trainer of `transformers`: same model, batch size and machine.

    python benchmarks/fine_tuning.py --model runs/demo/student --data SST-2 --json benchmarks/results/sst2.json

The training rows are split into slices, and both train on every slice, in alternating order. Tokenising is not counted.
Ours is `fine_tune`, which evaluates 32 rows of dev after every slice. The Trainer has dynamic padding and a fused
optimizer, and evaluates nothing. Both have the same allocator settings.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from common import header, write
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import finetune
from support.checkpoint import load_model, load_tokenizer
from support.distributed import find_device, synchronized_time, tune_malloc
from support.glue import encode, read_task


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--slices", type=int, default=8, help="parts of the training rows")
    parser.add_argument("--rows", type=int, default=0, help="training rows; 0 for all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    tune_malloc()
    bf16 = device.type == "cuda"
    bert = load_model(args.model)
    tokenizer = load_tokenizer(args.model, bert.config.vocab_size)
    splits = read_task("sst2", args.data)
    train, dev = (encode(examples, tokenizer, 128) for examples in (splits["train"], splits["dev"][:32]))
    order = np.random.default_rng(0).permutation(len(train))[: args.rows or None]
    slices = np.array_split(order, args.slices)

    def ours(part: np.ndarray):
        rows = [train[i] for i in part]
        job = finetune.Job(
            str(args.model), "sst2", seed=0, data="", weights="", learning_rate=5e-5, batch_size=args.batch_size,
            epochs=1, max_steps=None, max_length=128, warmup=0.1, weight_decay=0.01, dropout=None, bf16=bf16)
        finetune.fine_tune(args.model, {"train": rows, "dev": dev}, job, device)

    def trainer(part: np.ndarray):
        net = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, dtype=torch.float32)
        examples = [{"input_ids": train[i].ids, "labels": train[i].label} for i in part]
        collator = DataCollatorWithPadding(PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]"))
        settings = TrainingArguments(
            output_dir="unused", num_train_epochs=1, per_device_train_batch_size=args.batch_size, learning_rate=5e-5,
            weight_decay=0.01, warmup_steps=0.1, optim="adamw_torch_fused", save_strategy="no", logging_strategy="no",
            report_to=[], use_cpu=device.type == "cpu", bf16=bf16, disable_tqdm=True, dataloader_pin_memory=bf16)
        Trainer(net, settings, train_dataset=examples, data_collator=collator).train()

    seconds = {"ours": [], "trainer": []}
    for number, part in enumerate(slices):
        for name in ("ours", "trainer") if number % 2 else ("trainer", "ours"):
            start = synchronized_time(device)
            (ours if name == "ours" else trainer)(part)
            seconds[name].append(synchronized_time(device) - start)
        print(f"slice {number + 1} of {args.slices}: " + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items()),
              flush=True)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["trainer"], strict=True)]
    print(f"one epoch of {len(order):,} rows: " + ", ".join(f"{k} {sum(v):.0f} s" for k, v in seconds.items())
          + f"; ours takes {statistics.median(ratios):.2f} of the time ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        write(args.json, header(argv, device) | {
            "training_rows": len(order),
            "batch_size": args.batch_size, "parameters": bert.parameter_count(),
            "seconds": {name: round(sum(values), 1) for name, values in seconds.items()},
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
