"""Fine-tune BERT checkpoints on GLUE and SQuAD, to measure what a task-agnostic student is worth.

Every model is fine-tuned on every task with every seed. The epoch with the best score on the dev split is kept, and the
results are printed as one table. The encoder is that of model.py. support/ holds the data (glue.py, squad.py),
batches.py and metrics.py.

    python finetune.py --model runs/demo/student --task sst2 --data glue_data/SST-2
    python finetune.py --model runs/demo/student bert-base-uncased --task all --seeds 0 1 2

Metrics are in percent. Shape letters as in model.py, and C: outputs of a head, N: rows of a split.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from distill import learning_rate, make_optimizer
from model import Bert, Linear
from support import distributed
from support.batches import Row, make_batch, training_batches
from support.checkpoint import load_config, load_model, load_tokenizer, save_model, save_tokenizer
from support.distributed import RANK, WORLD
from support.errors import InputError, LocalError, run_program
from support.files import atomic_rename, content_hash, model_fingerprint, read_json, remove
from support.flags import COUNT, FRACTION, NONNEGATIVE, Parser, number
from support.glue import GLUE_AVERAGE, TASKS, data_hash, encode, find_data, read_task
from support.hub import find_model
from support.metrics import METRICS, squad_scores
from support.squad import best_answers, make_windows

DEFAULTS = {"learning_rate": 5e-5, "epochs": 3, "batch_size": 32, "max_length": 128}
BASE_WIDTH = 768  # of BERT-base; for other widths, default learning rates are in inverse proportion to the width
TASK_DEFAULTS = {  # where they differ; small data sets need more epochs (Zhang et al., 2021, arXiv:2006.05987)
    **dict.fromkeys(("cola", "mrpc", "stsb"), {"epochs": 10}),
    "rte": {"epochs": 10, "batch_size": 16, "max_length": 256},
    "wnli": {"learning_rate": 1e-5},  # its dev split contradicts the training split, so less training is better
    **dict.fromkeys(("squad", "squad_v2"), {"epochs": 2, "batch_size": 16, "max_length": 384}),
}
MAX_GRADIENT_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning run: the model, the data and the settings that its result depends on."""

    model: str  # as given: a folder or a hub name
    task: str
    seed: int
    data: str  # hash of its files, or "hub"
    weights: str  # fingerprint of the model
    bf16: bool
    learning_rate: float  # peak
    epochs: int
    batch_size: int
    max_length: int  # tokens
    warmup: float  # fraction of the steps
    weight_decay: float
    max_steps: int | None = None
    dropout: float | None = None  # None: that of the checkpoint

    def __str__(self) -> str:
        return f"{self.model} {self.task} seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """OUTPUT/MODEL/TASK-seedN. MODEL is the name of the model; one with "/" is shortened and gets a hash."""
        name = self.model
        if not re.fullmatch(r"\w[\w.-]{,50}", name):  # a folder name may have 255 bytes, a character up to 4 of them
            name = re.sub(r"[^\w.-]+", "-", name)[-50:].strip(".-") + "-" + content_hash(name.encode())[:8]
        return output / name / f"{self.task}-seed{self.seed}"

    def is_finished(self, output: Path) -> bool:
        """Whether result.json exists. Raises InputError if it was made with other settings."""
        path = self.folder(output) / "result.json"
        if not path.exists():
            return False
        saved, new = read_json(path), dataclasses.asdict(self)
        if changed := [f"{name} {saved.get(name)}, now {new[name]}" for name in new if saved.get(name) != new[name]]:
            raise InputError(f"{path} was made with {'; '.join(changed)}: use --overwrite or another --output")
        return True


# ---- The task heads ------------------------------------------------------------------------------------------


class TaskModel(Bert):
    """An encoder with a new linear head: on the pooled first token (B,C), or for spans on every token (B,S,2)."""

    def __init__(self, bert: Bert, key: str):
        nn.Module.__init__(self)  # not Bert's, which would build and initialise another encoder
        self.config, self.bert, self.cls, self.kind = bert.config, bert.bert, None, TASKS[key].kind
        head = Linear(self.config.hidden_size, len(TASKS[key].labels))
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
        x = super().forward(input_ids, None, token_type_ids, attention_mask).hidden[-1]  # (B,S,D)
        if self.kind == "span":
            return self.qa_outputs(x).float()  # (B,S,2)
        return self.classifier(F.dropout(self.pooled(x), self.bert.embeddings.dropout, self.training)).float()  # (B,C)


def task_loss(kind: str, logits, labels):
    """Squared error, or cross entropy; for spans its mean over first and last token, among the S positions."""
    if kind == "regression":
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)  # logits (B,C) or (B,S,2), labels (B,) or (B,2)


def save_task_model(net: TaskModel, key: str, tokenizer, folder: Path):
    """Write a standard BertForSequenceClassification or BertForQuestionAnswering into an existing folder."""
    labels = TASKS[key].labels
    config = {"architectures": ["BertForQuestionAnswering" if net.kind == "span" else "BertForSequenceClassification"],
              "id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if net.kind != "span":
        config["problem_type"] = "regression" if net.kind == "regression" else "single_label_classification"
    save_model(net, folder, **config)
    save_tokenizer(tokenizer, folder, net.config.max_position_embeddings)


# ---- Training and evaluation ---------------------------------------------------------------------------------


@torch.no_grad()
def predict(net: TaskModel, rows: list[Row], job: Job, device):
    """Classes (N,) or scores (N,) of the rows; of SQuAD the answers, question id -> text."""
    net.eval()
    order = np.argsort([-len(row.ids) for row in rows])
    logits = []  # of every row: (C,), or (S,2) with padding
    for start in tqdm(range(0, len(rows), 2 * job.batch_size), desc="evaluate", disable=None, leave=False):
        batch = [rows[i] for i in order[start : start + 2 * job.batch_size]]
        ids, types, mask, _ = make_batch(batch, net.config, device)
        with distributed.autocast(device, job.bf16):
            logits.extend(net(ids, types, mask).cpu().numpy())
    if not all(np.isfinite(each).all() for each in logits):
        raise LocalError(f"{job}: the model's outputs are not finite; try a smaller --learning-rate")
    logits = [logits[i] for i in np.argsort(order)]  # in the order of the rows
    if net.kind == "span":
        return best_answers(rows, logits, can_be_empty=job.task == "squad_v2")
    return np.stack(logits)[:, 0] if net.kind == "regression" else np.stack(logits).argmax(1)


def evaluate(net: TaskModel, rows: dict[str, list[Row]], job: Job, device) -> dict[str, float]:
    """Metrics on the dev split in percent."""
    task, metrics = TASKS[job.task], {}
    for suffix in task.suffixes:
        dev = rows[f"dev{suffix}"]
        predicted = predict(net, dev, job, device)
        if task.kind == "span":
            references = {row.example.name: [text for text, _ in row.example.label] for row in dev}
            scores = [squad_scores(predicted[name], references[name]) for name in references]
            return dict(zip(task.metrics, 100 * np.mean(scores, axis=0), strict=True))
        labels = np.array([row.label for row in dev])  # (N,)
        metrics |= {f"{name}{suffix}": 100 * METRICS[name](predicted, labels) for name in task.metrics}
    return metrics


def fine_tune(folder: Path, rows: dict[str, list[Row]], job: Job, device) -> tuple[TaskModel, dict]:
    """Train the checkpoint in `folder` with AdamW, linear warmup and decay.

    Returns it as it was after its best epoch on the dev split, with that `epoch` and its `metrics`. Raises InputError
    if the loss is not finite.
    """
    torch.manual_seed(job.seed)
    net = TaskModel(load_model(folder), job.task).to(device)
    if job.dropout is not None:
        net.set_dropout(job.dropout)
    optimizer = make_optimizer(net, job.weight_decay)
    steps = job.epochs * -(-len(rows["train"]) // job.batch_size)
    steps = min(steps, job.max_steps or steps)
    step, best, best_score, best_weights = 0, {}, -np.inf, {}
    for epoch in range(1, job.epochs + 1):
        net.train()
        batches = training_batches(rows["train"], job.batch_size, job.seed, epoch)[: steps - step]
        for batch in tqdm(batches, desc=f"{job}, epoch {epoch} of {job.epochs}", disable=None, leave=False):
            ids, types, mask, labels = make_batch(batch, net.config, device)
            with distributed.autocast(device, job.bf16):
                logits = net(ids, types, mask)
            loss = task_loss(net.kind, logits, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), MAX_GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, job.learning_rate, job.warmup)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        metrics = evaluate(net, rows, job, device)
        score = statistics.fmean(metrics.values())
        if score > best_score:
            best, best_score = {"epoch": epoch, "metrics": metrics}, score
            best_weights = {name: tensor.to("cpu", copy=True) for name, tensor in net.state_dict().items()}
        if step == steps:
            break
    net.load_state_dict(best_weights)
    return net, best


def write_predictions(folder: Path, net: TaskModel, rows: dict[str, list[Row]], job: Job, device):
    """Write the answers to SQuAD's dev split, or what the GLUE server expects for the test splits."""
    task = TASKS[job.task]
    if task.kind == "span":
        answers = predict(net, rows["dev"], job, device)
        (folder / "predictions.json").write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")
    for suffix, short in (("", ""), ("_matched", "-m"), ("_mismatched", "-mm")):
        if test := rows.get(f"test{suffix}"):
            lines = ["index\tprediction"]
            for row, value in zip(test, predict(net, test, job, device), strict=True):
                value = task.tsv_labels[value] if task.tsv_labels else f"{np.clip(value, 0, 5):.3f}"
                lines.append(f"{row.example.name}\t{value}")
            (folder / f"{task.title}{short}.tsv").write_text("\n".join(lines) + "\n")


# ---- All models, tasks and seeds -----------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises InputError."""
    def default(name: str) -> str:
        others = (f"{task} {values[name]}" for task, values in TASK_DEFAULTS.items() if name in values)
        return f"[{', '.join([str(DEFAULTS[name]), *others])}]"

    parser = Parser(description=f"{__doc__.splitlines()[0]} Defaults are in [brackets].", allow_abbrev=False)
    add = parser.add_argument
    add("--model", nargs="+", type=lambda name: name.rstrip("/") or name, required=True,
        help="Folders or hub names of the BERT checkpoints.")
    add("--task", nargs="+", required=True, choices=[*TASKS, "all"], metavar="TASK",
        help=f"One or more of {', '.join(TASKS)}, or all.")
    add("--data", help="Folder with the task's files (train.tsv and dev.tsv, or train-v1.1.json and dev-v1.1.json), or "
        "with a folder for every task (CoLA, SST-2, ..., squad). Default: download from the hub.")
    add("--max-length", type=number(int, 16, 10**6), help="Maximum tokens per row, at most the model's positions. "
        f"{default('max_length')}")
    add("--seeds", nargs="+", type=number(int, 0, 2**32 - 1), default=[0], help="Random seeds, one result each. [0]")
    add("--epochs", type=COUNT, help=f"Passes over the training split. {default('epochs')}")
    add("--max-steps", type=COUNT, help="Maximum optimizer steps. Default: no maximum.")
    add("--learning-rate", type=number(float, 1e-9, 1), help="Peak learning rate. Default: the value in "
        f"brackets times {BASE_WIDTH} / hidden size: narrow models need larger ones. {default('learning_rate')}")
    add("--batch-size", type=COUNT, help=f"Rows per step. {default('batch_size')}")
    add("--warmup", type=FRACTION, default=0.1, help="Fraction of steps with a rising learning rate. [%(default)s]")
    add("--weight-decay", type=NONNEGATIVE, default=0.01, help="Weight decay of the matrices. [%(default)s]")
    add("--dropout", type=number(float, 0, 0.99), help="Dropout probability. Default: that of the checkpoint.")
    add("--output", type=Path, default=Path("runs/finetune"), help="Folder for fine-tuned models and their results. "
        "Finished ones are kept. [%(default)s]")
    add("--overwrite", action="store_true", help="Compute again what the output folder already holds.")
    add("--device", default="auto", help="cpu, cuda or cuda:N. auto uses a GPU if there is one. [auto]")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on "
        "GPUs and CPUs that multiply it natively and faster than fp32, else fp32. [auto]")
    return parser.parse_args(argv)


def results_table(results: list[dict]) -> str:
    """A row for every model, a column for every metric of every task: mean and standard deviation over the seeds.

    results: those of every task and seed, model by model. If any task is of GLUE, the last column is the mean over
    these tasks of the mean of each task's metrics.
    """
    table = []
    for model, group in itertools.groupby(results, lambda result: result["model"]):
        columns, averages = {}, {}  # column -> values of all seeds; seed -> values of all GLUE tasks
        for result in group:
            for name, value in result["metrics"].items():
                columns.setdefault(f"{TASKS[result['task']].title} {name}", []).append(value)
            if result["task"] in GLUE_AVERAGE:
                averages.setdefault(result["seed"], []).append(statistics.fmean(result["metrics"].values()))
        for means in averages.values():
            columns.setdefault(f"GLUE average of {len(means)}", []).append(statistics.fmean(means))
        row = [model]
        for values in columns.values():
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{statistics.fmean(values):.1f}{deviation}")
        table.append(row)
    table.insert(0, ["model", *columns])  # the same for all models
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)


def make_jobs(model: str, args: argparse.Namespace, sources: dict[str, Path | None], bf16: bool) -> list[Job]:
    """The jobs of one model, which is opened to check it. sources: from `find_data`. Raises InputError."""
    folder = find_model(model)
    bert = load_model(folder)
    load_tokenizer(folder, bert.config.vocab_size)
    if bert.bert.pooler is None:
        print(f"{model} has no pooler. GLUE tasks begin with a new one.")
    positions, weights = bert.config.max_position_embeddings, model_fingerprint(folder)
    flags = ("learning_rate", "epochs", "batch_size", "max_length", "max_steps", "warmup", "weight_decay", "dropout")
    given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    jobs = []
    for key, source in sources.items():
        settings = DEFAULTS | TASK_DEFAULTS.get(key, {})
        settings["learning_rate"] *= BASE_WIDTH / bert.config.hidden_size
        settings |= given
        settings["max_length"] = min(settings["max_length"], positions)
        data = data_hash(source, key) if source else "hub"
        jobs += [Job(model, key, seed, data, weights, bf16, **settings) for seed in dict.fromkeys(args.seeds)]
    return jobs


def run_jobs(jobs: list[Job], splits: dict[str, dict], output: Path, device):
    """Fine-tune and evaluate, and store each result at once. splits: task -> its data, from `read_task`."""
    for (model, key, length), group in itertools.groupby(jobs, lambda job: (job.model, job.task, job.max_length)):
        folder, rows = find_model(model), {}
        tokenizer = load_tokenizer(folder, load_config(folder).vocab_size)
        for split, source in splits[key].items():
            if TASKS[key].kind == "span":
                rows[split] = make_windows(source, tokenizer, length, training=split == "train")
            else:
                rows[split] = encode(source, tokenizer, length)
        for job in group:
            print(f"{job}: {len(rows['train']):,} training rows, {job.epochs} epochs, learning rate "
                  f"{job.learning_rate:.3g}", flush=True)
            net, best = fine_tune(folder, rows, job, device)
            target = job.folder(output)
            work = target.with_name(f".{target.name}.unfinished")
            remove(work)
            work.mkdir()
            save_task_model(net, key, tokenizer, work)
            write_predictions(work, net, rows, job, device)
            (work / "result.json").write_text(json.dumps(dataclasses.asdict(job) | best, indent=1) + "\n")
            remove(target)
            atomic_rename(work, target)
            metrics = ", ".join(f"{name} {value:.1f}" for name, value in best["metrics"].items())
            print(f"  {metrics} (best epoch {best['epoch']}; {jobs.index(job) + 1} of {len(jobs)} done)", flush=True)


def evaluate_models(args: argparse.Namespace):
    """Everything that the flags ask for. All input is checked before training starts. Raises InputError."""
    device = distributed.find_device(args.device, shared=True)  # a small student does not fill a GPU
    distributed.tune_malloc()
    precision = distributed.resolve_precision(args.precision, device)
    print(f"{precision} on {device}")
    bf16 = precision == "bf16"
    keys = [key for key in TASKS if key in args.task or "all" in args.task]
    sources = find_data(args.data, keys, skip_missing="all" in args.task)
    jobs = [job for model in dict.fromkeys(args.model) for job in make_jobs(model, args, sources, bf16)]
    todo = [job for job in jobs if args.overwrite or not job.is_finished(args.output)]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} results are already in {args.output}.")

    distributed.init_distributed(torch.device("cpu"), datetime.timedelta(days=7))
    todo = distributed.all_gather_objects(todo)[0]  # processes share what the first finds unfinished
    splits = {key: read_task(key, sources[key]) for key in dict.fromkeys(job.task for job in todo)}
    for job in todo[RANK::WORLD]:
        job.folder(args.output).parent.mkdir(parents=True, exist_ok=True)  # training would be lost if this failed
        (job.folder(args.output) / "result.json").unlink(missing_ok=True)  # exists only with --overwrite
    print("The dev split that is reported also chooses the best epoch.")
    run_jobs(todo[RANK::WORLD], splits, args.output, device)
    distributed.all_gather_objects(None)  # waits for the others

    print(f"\ndev, percent{', mean ± standard deviation over seeds' if len(set(args.seeds)) > 1 else ''}\n")
    print(results_table([read_json(job.folder(args.output) / "result.json") for job in jobs]))
    print(f"\nresults: {args.output}/*/*/result.json")


def main(argv: list[str] | None = None) -> int:
    return run_program("finetune.py", lambda: evaluate_models(parse_arguments(argv)),
                       resume_hint="run the same command again, without --overwrite, to continue",
                       memory_hint="use a smaller --batch-size")


if __name__ == "__main__":
    sys.exit(main())
