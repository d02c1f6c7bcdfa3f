"""Fine-tune BERT checkpoints on GLUE and SQuAD, to measure what a task-agnostic student is worth.

Every model is fine-tuned on every task with every seed. The epoch with the best score on the dev split is kept, and the
results are printed as one table. The encoder is that of model.py. Here are the task heads, the training loop and
prediction; support/ holds the data (glue.py, squad.py), batches (examples.py), metrics.py and results.py.

    python finetune.py --model runs/demo/student --task sst2 --data glue_data/SST-2
    python finetune.py --model runs/demo/student bert-base-uncased --task all --seeds 0 1 2

Metrics are in percent. Shape letters as in model.py, and C: outputs of a head, N: rows of a split.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from distill import ADAM_BETAS, ADAM_EPS, learning_rate
from model import Bert, Linear
from support import results
from support.checkpoint import load_config, load_model, load_tokenizer, save_config, save_tokenizer
from support.distributed import RANK, WORLD, all_gather_objects, find_device, init_distributed, tune_malloc
from support.errors import InputError, run_program
from support.examples import Examples, encode_questions, encode_table, make_batch, training_batches
from support.files import model_fingerprint, read_json
from support.flags import Parser, number
from support.glue import TASKS, find_data, read_task
from support.hub import find_model
from support.metrics import METRICS, squad_scores
from support.results import Job
from support.squad import best_answers

TASK_DEFAULTS = {  # peak learning rate, epochs, batch size, maximum length in tokens; small data sets need more epochs
    **dict.fromkeys(("sst2", "qqp", "mnli", "qnli"), (5e-5, 3, 32, 128)),
    **dict.fromkeys(("mrpc", "stsb"), (5e-5, 5, 32, 128)),
    "cola": (5e-5, 6, 32, 128),
    "rte": (5e-5, 6, 16, 256),
    "wnli": (1e-5, 3, 32, 128),  # its dev split contradicts the training split, so less training is better
    **dict.fromkeys(("squad", "squad_v2"), (5e-5, 2, 16, 384)),
}
MAX_GRADIENT_NORM = 1.0


# ---- The task heads ------------------------------------------------------------------------------------------


class TaskModel(Bert):
    """An encoder with a new linear head: on the pooled first token (B,C), or for spans on every token (B,S,2)."""

    def __init__(self, bert: Bert, key: str):
        nn.Module.__init__(self)  # not Bert's, which would build and initialise another encoder
        self.config, self.bert, self.cls, self.kind = bert.config, bert.bert, None, TASKS[key].kind
        self.dropout = self.config.hidden_dropout_prob
        head = Linear(self.config.hidden_size, {"span": 2, "regression": 1}.get(self.kind, len(TASKS[key].labels)))
        nn.init.normal_(head.weight, std=self.config.initializer_range)
        if self.kind == "span":
            self.qa_outputs, self.bert.pooler = head, None
            return
        self.classifier = head
        if self.bert.pooler is None:
            pooler = Linear(self.config.hidden_size, self.config.hidden_size)
            nn.init.normal_(pooler.weight, std=self.config.initializer_range)
            self.bert.pooler = nn.ModuleDict({"dense": pooler})

    def forward(self, input_ids, token_type_ids=None, attention_mask=None):
        output = super().forward(input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask)
        x = output.hidden[-1]  # (B,S,D)
        if self.kind == "span":
            return self.qa_outputs(x).float()  # (B,S,2)
        return self.classifier(F.dropout(self.pooled(x), self.dropout, self.training)).float()  # (B,C)


def task_loss(kind: str, logits, labels):
    """Cross entropy, squared error, or for spans the mean cross entropy of first and last token over the positions."""
    if kind == "span":
        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten())  # (B*2,S), (B*2)
    if kind == "regression":
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)


def save_task_model(net: TaskModel, key: str, tokenizer, folder: Path):
    """Write a standard BertForSequenceClassification or BertForQuestionAnswering into an existing folder."""
    span, regression = net.kind == "span", net.kind == "regression"
    labels = TASKS[key].labels or [f"LABEL_{i}" for i in range(2 if span else 1)]
    extra = {"id2label": {str(i): name for i, name in enumerate(labels)},
             "label2id": {name: i for i, name in enumerate(labels)}}
    if not span:
        extra["problem_type"] = "regression" if regression else "single_label_classification"
    save_config(net.config, folder, "BertForQuestionAnswering" if span else "BertForSequenceClassification")
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | extra, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    save_tokenizer(tokenizer, folder, net.config.max_position_embeddings)


# ---- Training and evaluation ---------------------------------------------------------------------------------


class TrainResult(NamedTuple):
    net: TaskModel  # as it was after the best epoch
    metrics: dict[str, float]  # on the dev split, in percent
    answers: dict[str, str] | None  # SQuAD: question id -> answer
    epoch: int  # the best one


@torch.no_grad()
def predict(net: TaskModel, examples: Examples, job: Job, device) -> list[np.ndarray]:
    """Logits of every row in order: (C,), or (S,2) for spans."""
    net.eval()
    order = np.argsort([-len(ids) for ids in examples.ids], kind="stable")
    logits: list = [None] * len(order)
    batch_size = 2 * job.batch_size
    for start in tqdm(range(0, len(order), batch_size), desc="evaluate", disable=None, leave=False):
        indices = order[start : start + batch_size]
        ids, types, mask, _ = make_batch(examples, indices, net.config, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
            batch = net(ids, types, mask).cpu().numpy()
        for i, values in zip(indices, batch, strict=True):
            logits[i] = values[: len(examples.ids[i])] if net.kind == "span" else values
    return logits


def evaluate(net: TaskModel, examples: dict[str, Examples], job: Job, device):
    """Metrics on the dev split in percent, and the answers of SQuAD (otherwise None)."""
    task, metrics = TASKS[job.task], {}
    for suffix in task.suffixes:
        dev = examples[f"dev{suffix}"]
        logits = predict(net, dev, job, device)
        if task.kind == "span":
            answers = best_answers(dev.windows, logits, dev.source, can_be_empty=job.task == "squad_v2")
            scores = [squad_scores(answers[question.id], [text for text, _ in question.answers])
                      for question in dev.source]
            return dict(zip(task.metrics, 100 * np.mean(scores, axis=0), strict=True)), answers
        values = np.stack(logits)  # (N,C)
        predicted = values[:, 0] if task.kind == "regression" else values.argmax(1)
        metrics |= {f"{name}{suffix}": 100 * METRICS[name](predicted, dev.labels) for name in task.metrics}
    return metrics, None


def fine_tune(folder: Path, examples: dict[str, Examples], job: Job, device) -> TrainResult:
    """Train the checkpoint in `folder` on one task, and return it as it was after its best epoch on the dev split.

    AdamW with linear warmup and decay. Raises InputError if the loss is not finite.
    """
    torch.manual_seed(job.seed)
    net = TaskModel(load_model(folder), job.task).to(device)
    if job.dropout is not None:
        net.set_dropout(job.dropout, job.dropout)
        net.dropout = job.dropout
    parameters = list(net.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": job.weight_decay},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    train = examples["train"]
    lengths = np.array([len(ids) for ids in train.ids])
    steps = job.epochs * -(-len(lengths) // job.batch_size)
    steps = min(steps, job.max_steps or steps)
    step, best, best_score, best_weights = 0, None, -np.inf, None
    with tqdm(total=steps, desc=str(job), disable=None, leave=False) as progress:
        for epoch in range(1, job.epochs + 1):
            net.train()
            total = torch.zeros((), device=device)  # summed there, because reading every loss makes the GPU wait
            batches = training_batches(lengths, job.batch_size, job.seed, epoch)[: steps - step]
            for indices in batches:
                ids, types, mask, labels = make_batch(train, indices, net.config, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=job.bf16):
                    logits = net(ids, types, mask)
                loss = task_loss(net.kind, logits, labels)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, job.learning_rate, job.warmup)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                step += 1
                progress.update()
            mean_loss = total.item() / len(batches)
            if not np.isfinite(mean_loss):
                raise InputError(f"{job}: the loss is not finite after {step} steps; try a smaller --learning-rate")
            metrics, answers = evaluate(net, examples, job, device)
            progress.set_postfix(loss=f"{mean_loss:.3f}", **{name: f"{value:.1f}" for name, value in metrics.items()})
            score = statistics.fmean(metrics.values())
            if score > best_score:
                best, best_score = TrainResult(net, metrics, answers, epoch), score
                best_weights = {name: tensor.to("cpu", copy=True) for name, tensor in net.state_dict().items()}
            if step == steps:
                break
    net.load_state_dict(best_weights)
    return best


def prediction_files(result: TrainResult, examples: dict[str, Examples], job: Job, device) -> dict[str, list[str]]:
    """File name -> lines: the answers to SQuAD's dev split, or what the GLUE server expects for the test splits."""
    task = TASKS[job.task]
    if task.kind == "span":
        return {"predictions.json": [json.dumps(result.answers, ensure_ascii=False)]}
    files = {}
    for suffix in task.suffixes:
        if test := examples.get(f"test{suffix}"):
            logits = predict(result.net, test, job, device)
            values = [task.tsv_labels[v.argmax()] if task.tsv_labels else f"{np.clip(v[0], 0, 5):.3f}" for v in logits]
            short = {"_matched": "-m", "_mismatched": "-mm"}.get(suffix, "")
            files[f"{task.title}{short}.tsv"] = ["index\tprediction"] + [
                f"{index}\t{value}" for index, value in zip(test.source.index, values, strict=True)]
    return files


# ---- All models, tasks and seeds -----------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises InputError."""
    count, fraction = number(int, 1, 10**9), number(float, 0, 1)
    parser = Parser(description="Fine-tune BERT checkpoints on GLUE and SQuAD, and print the results as one table.",
                    epilog="The dev split that is reported also chooses the best epoch.", allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--model", nargs="+", required=True, help="Folders or hub names of the BERT checkpoints.")
    add("--task", nargs="+", required=True, choices=[*TASKS, "all"], metavar="TASK",
        help=f"One or more of {', '.join(TASKS)}, or all.")
    add("--data", help="Folder with the task's files (train.tsv and dev.tsv, or train-v1.1.json and dev-v1.1.json), or "
        "with a folder for every task (CoLA, SST-2, ..., squad). Default: download from the hub.")
    add("--max-length", type=number(int, 16, 10**6), help="Maximum tokens per row. Default: depends on the task.")
    add = parser.add_argument_group("training").add_argument
    add("--seeds", nargs="+", type=number(int, 0, 2**32 - 1), default=[0], help="Random seeds, one result each. [0]")
    add("--epochs", type=count, help="Passes over the training split. Default: depends on the task.")
    add("--max-steps", type=count, help="Maximum optimizer steps. Default: no maximum.")
    add("--learning-rate", type=number(float, 1e-9, 1), help="Peak learning rate. Default: depends on the task.")
    add("--batch-size", type=count, help="Rows per step. Default: depends on the task.")
    add("--warmup", type=fraction, default=0.1, help="Fraction of steps with a rising learning rate. [%(default)s]")
    add("--weight-decay", type=number(float, 0, 1e9), default=0.01, help="Weight decay of the matrices. [%(default)s]")
    add("--dropout", type=number(float, 0, 0.99), help="Dropout probability. Default: that of the checkpoint.")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, default=Path("runs/finetune"), help="Folder for the results and the fine-tuned models. "
        "Results that it already holds are kept. [%(default)s]")
    add("--overwrite", action="store_true", help="Compute again what the output folder already holds.")
    add("--device", default="auto", help="cpu, cuda or cuda:N. auto uses a GPU if there is one. [auto]")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, else fp32. [auto]")
    return parser.parse_args(argv)


def make_jobs(model: str, args: argparse.Namespace, sources: dict[str, Path | None], bf16: bool) -> list[Job]:
    """The jobs of one model: the flags, or the task's defaults where none is given. Raises InputError.

    sources: task -> folder of its data, None for the hub.
    """
    folder = find_model(model)
    bert = load_model(folder)
    load_tokenizer(folder, bert.config.vocab_size)  # to report what is wrong with it before any training
    positions, weights = bert.config.max_position_embeddings, model_fingerprint(folder)
    if bert.bert.pooler is None and any(TASKS[key].kind != "span" for key in sources):
        print(f"{model} has no pooler. A new one is initialised.")
    longest = max(args.max_length or TASK_DEFAULTS[key][3] for key in sources)
    if longest > positions:
        print(f"{model} has {positions} positions. Rows are truncated to this length instead of {longest}.")
    jobs = []
    for key, source in sources.items():
        rate, epochs, batch_size, max_length = TASK_DEFAULTS[key]
        jobs += [Job(
            model, key, seed, data="hub" if source is None else str(source.resolve()), weights=weights,
            learning_rate=args.learning_rate or rate, batch_size=args.batch_size or batch_size,
            epochs=args.epochs or epochs, max_steps=args.max_steps,
            max_length=min(args.max_length or max_length, positions),
            warmup=args.warmup, weight_decay=args.weight_decay, dropout=args.dropout, bf16=bf16)
            for seed in dict.fromkeys(args.seeds)]
    return jobs


def run_jobs(jobs: list[Job], splits: dict[str, dict], output: Path, device):
    """Fine-tune and evaluate, and store each result at once. splits: task -> its data, from `read_task`."""
    rows_of = None  # model and task whose rows are in `examples`; all seeds share them
    for done, job in enumerate(jobs, 1):
        started = time.perf_counter()
        if rows_of != (job.model, job.task):
            rows_of, examples = (job.model, job.task), {}
            folder = find_model(job.model)
            tokenizer = load_tokenizer(folder, load_config(folder).vocab_size)
            for split, source in splits[job.task].items():
                if TASKS[job.task].kind == "span":
                    examples[split] = encode_questions(source, tokenizer, job.max_length, training=split == "train")
                else:
                    examples[split] = encode_table(source, job.task, tokenizer, job.max_length)
        print(f"{job}: {len(examples['train'].ids):,} training rows", flush=True)
        result = fine_tune(folder, examples, job, device)
        files = prediction_files(result, examples, job, device)
        seconds = round(time.perf_counter() - started, 1)
        record = dataclasses.asdict(job) | {"metrics": result.metrics, "epoch": result.epoch, "seconds": seconds}
        files["result.json"] = [json.dumps(record, indent=1)]
        with results.new_folder(job.folder(output)) as work:
            save_task_model(result.net, job.task, tokenizer, work)
            for name, lines in files.items():
                (work / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        metrics = ", ".join(f"{name} {value:.1f}" for name, value in result.metrics.items())
        print(f"  {metrics} (epoch {result.epoch}; {seconds} s; {done} of {len(jobs)} done)", flush=True)


def evaluate_models(args: argparse.Namespace):
    """Everything that the flags ask for. All input is checked before training starts. Raises InputError."""
    device = find_device(args.device)
    tune_malloc()
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    if args.output.is_file():
        raise InputError(f"--output {args.output} is a file; choose a folder")
    keys = [key for key in TASKS if key in args.task or "all" in args.task]
    sources = find_data(args.data, keys, skip_missing="all" in args.task)
    jobs = [job for model in dict.fromkeys(args.model) for job in make_jobs(model, args, sources, bf16)]
    todo = [job for job in jobs if args.overwrite or not job.is_finished(args.output)]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} results are already in {args.output}.")
    splits = {key: read_task(key, sources[key]) for key in dict.fromkeys(job.task for job in todo)}

    # The processes of torchrun share the jobs that the first one finds unfinished.
    init_distributed(torch.device("cpu"), datetime.timedelta(days=7))
    args.output.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and args.overwrite:
        for job in todo:
            (job.folder(args.output) / "result.json").unlink(missing_ok=True)
    todo = all_gather_objects(todo)[0]
    print("The dev split that is reported also chooses the best epoch.")
    run_jobs(todo[RANK::WORLD], splits, args.output, device)
    all_gather_objects(None)  # waits for the others

    print(f"\ndev, percent{', mean ± standard deviation over seeds' if len(set(args.seeds)) > 1 else ''}\n")
    print(results.results_table([read_json(job.folder(args.output) / "result.json") for job in jobs]))
    print(f"\nresults: {args.output}/*/*/result.json")


def main(argv: list[str] | None = None) -> int:
    return run_program("finetune.py", lambda: evaluate_models(parse_arguments(argv)),
                       resume_hint="run the same command again, without --overwrite, to continue",
                       memory_hint="use a smaller --batch-size")


if __name__ == "__main__":
    sys.exit(main())
