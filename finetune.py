"""Fine-tuning on GLUE and SQuAD: what a task-agnostic student is worth.

Takes any number of BERT checkpoints (students and teachers alike), fine-tunes each of them on each task and seed, and
ends with one table. The encoder is that of model.py; here are the tasks: reading them, batches of similar length, the
two heads, the loop (`fine_tune`), the metrics, and the files that come out.

    python finetune.py --model runs/demo/student --task sst2 --data glue_data/SST-2
    python finetune.py --model runs/demo/student bert-base-uncased --task all --seeds 0 1 2

Every metric is in percent. Shape letters as in model.py; C is the number of a head's outputs, N that of rows.
"""

import argparse
import collections
import dataclasses
import datetime
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import statistics
import string
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
import run
from distill import ADAM_BETAS, ADAM_EPS, Parser, learning_rate, number
from model import Bert, InputError, Linear, hub_files, one_line, read_json

# ---- The tasks -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    title: str  # as in the papers, and in the names of folders and prediction files
    kind: str  # "classification", "regression" (one number) or "span" (first and last token of an answer)
    metrics: tuple[str, ...]
    columns: tuple[str, ...] = ()  # of the one or two texts in the TSV file
    label_column: str = ""
    labels: tuple[str, ...] = ()  # a label's number is its place here; the order is that of nyu-mll/glue
    written: tuple[str, ...] = ()  # the same labels as the TSV file writes them
    parts: tuple[str, ...] = ("",)  # what is reported apart: endings of "dev" and "test"


ACCURACY, BINARY, PAIR = ("accuracy",), ("0", "1"), ("sentence1", "sentence2")
ENTAILMENT, NLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task("CoLA", "classification", ("matthews",), ("sentence",), "label",
                 ("unacceptable", "acceptable"), BINARY),
    "sst2": Task("SST-2", "classification", ACCURACY, ("sentence",), "label", ("negative", "positive"), BINARY),
    "mrpc": Task("MRPC", "classification", ("f1", "accuracy"), ("#1 String", "#2 String"), "Quality",
                 ("not_equivalent", "equivalent"), BINARY),
    "stsb": Task("STS-B", "regression", ("pearson", "spearman"), PAIR, "score"),
    "qqp": Task("QQP", "classification", ("f1", "accuracy"), ("question1", "question2"), "is_duplicate",
                ("not_duplicate", "duplicate"), BINARY),
    "mnli": Task("MNLI", "classification", ACCURACY, PAIR, "gold_label", NLI, NLI, ("_matched", "_mismatched")),
    "qnli": Task("QNLI", "classification", ACCURACY, ("question", "sentence"), "label", ENTAILMENT, ENTAILMENT),
    "rte": Task("RTE", "classification", ACCURACY, PAIR, "label", ENTAILMENT, ENTAILMENT),
    "wnli": Task("WNLI", "classification", ACCURACY, PAIR, "label", ("not_entailment", "entailment"), BINARY),
    "squad": Task("SQuAD-v1.1", "span", ("exact_match", "f1")),
    "squad_v2": Task("SQuAD-v2.0", "span", ("exact_match", "f1")),
}
RECIPES = {  # Peak learning rate, epochs, rows in a batch, most tokens in a row. Small sets need more passes.
    "cola": (5e-5, 6, 32, 128),
    "sst2": (5e-5, 3, 32, 128),
    "mrpc": (5e-5, 5, 32, 128),
    "stsb": (5e-5, 5, 32, 128),
    "qqp": (5e-5, 3, 32, 128),
    "mnli": (5e-5, 3, 32, 128),
    "qnli": (5e-5, 3, 32, 128),
    "rte": (5e-5, 6, 16, 256),
    "wnli": (1e-5, 3, 32, 128),  # built so that learning from its training part misleads
    "squad": (5e-5, 2, 16, 384),
    "squad_v2": (5e-5, 2, 16, 384),
}
IN_AVERAGE = [key for key, task in TASKS.items() if task.kind != "span" and key != "wnli"]  # as in the BERT papers
GRID_LEARNING_RATES, GRID_BATCH_SIZES = (1e-5, 2e-5, 3e-5, 5e-5, 1e-4), (16, 32)
CLIP = 1.0  # largest norm of the gradient
QUESTION_TOKENS = 64  # a longer question of SQuAD is cut, as in BERT
LONGEST_NAME = 60  # characters of a model's name in that of its results' folder; a letter can take four bytes of 255
SORTED_TOGETHER = 64  # batches whose rows are sorted by length among themselves


# ---- Reading GLUE --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Table:
    """One split of a GLUE task. `labels`: a label's number, or a score; None in a test split."""

    texts: list[tuple[str, ...]]
    labels: list[float] | None
    index: list[str]  # names of the rows, for the prediction file


def read_tsv(path: Path, key: str, labelled: bool) -> Table:
    """One TSV file as GLUE ships it. Raises InputError with file and line.

    Quotes are text, not quoting; the labelled files of CoLA have no header; rows of QQP that a line break inside a
    question has torn are left out.
    """
    task = TASKS[key]
    raw = path.read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")  # not splitlines(): some sentences hold other line separators
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {raw[: error.start].count(10) + 1}: not UTF-8 text") from None
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    headless = key == "cola" and labelled
    header = ["source", "label", "note", "sentence"] if headless else (lines or [""])[0].split("\t")
    wanted = (*task.columns, *([task.label_column] if labelled else []))
    if absent := [name for name in wanted if name not in header]:
        raise InputError(f"{path}, line 1: no column {absent[0]!r} among {', '.join(header)[:100]!r}; {task.title} "
                         f"needs {', '.join(wanted)}: is this the data of another task?")
    places = [header.index(name) for name in task.columns]
    label_place = header.index(task.label_column) if labelled else 0
    table = Table([], [] if labelled else None, [])
    torn = 0
    for line_number, line in enumerate(lines, 1):
        if line_number == 1 and not headless:
            continue
        fields = line.split("\t")
        if key == "qqp" and len(fields) < len(header):
            torn += 1
            continue
        if len(fields) != len(header):
            raise InputError(f"{path}, line {line_number}: {len(fields)} columns instead of {len(header)}; repair the "
                             f"line, or give the data of {task.title}")
        if labelled:
            table.labels.append(parse_label(fields[label_place], key, f"{path}, line {line_number}"))
        table.texts.append(tuple(fields[place] for place in places))
        table.index.append(fields[0])
    if torn:
        print(f"{path}: {torn} rows with missing fields left out")
    if not table.texts:
        raise InputError(f"{path} holds no rows; download it again")
    return table


def parse_label(text: str, key: str, where: str) -> float:
    task = TASKS[key]
    if task.kind == "regression":
        try:
            score = float(text)
        except ValueError:
            score = float("nan")
        if not 0 <= score <= 5:
            raise InputError(f"{where}: score {text[:40]!r} is not a number from 0 to 5; is this {task.title}?")
        return score
    if text not in task.written:
        raise InputError(f"{where}: label {text[:40]!r} is not one of {', '.join(task.written)}; is this the data of "
                         f"{task.title}?")
    return task.written.index(text)


def split_names(key: str) -> list[str]:
    kinds = ("dev",) if TASKS[key].kind == "span" else ("dev", "test")
    return ["train"] + [f"{split}{part}" for split in kinds for part in TASKS[key].parts]


def file_names(key: str, split: str) -> list[str]:
    """The names under which a split is shipped."""
    if TASKS[key].kind == "span":
        version = TASKS[key].title.split("-")[1]
        return [f"{split}-{version}.json", f"{split}-{version}.json.gz"]
    # As Microsoft ships MRPC, the part that others call dev lies inside train, and the labels of test are given.
    original = {("mrpc", "train"): ["msr_paraphrase_train.txt"], ("mrpc", "dev"): ["msr_paraphrase_test.txt"]}
    return [f"{split}.tsv", *original.get((key, split), [])]


def find_split(folder: Path, key: str, split: str) -> Path | None:
    return next((folder / name for name in file_names(key, split) if (folder / name).is_file()), None)


def read_task(key: str, folder: Path | None) -> dict:
    """Split name -> Table, or list of Questions, from a folder or from the hub. Raises InputError."""
    if folder is None:
        return read_hub(key)
    splits = {}
    for split in split_names(key):
        path = find_split(folder, key, split)
        if path is not None and TASKS[key].kind == "span":
            splits[split] = read_squad(path, key)
        elif path is not None:
            splits[split] = read_tsv(path, key, labelled=not split.startswith("test"))
        elif not split.startswith("test"):
            raise InputError(f"{folder}: no {split} split of {TASKS[key].title}; "
                             f"it should be in {' or '.join(file_names(key, split))}")
        if path is not None and path.name == "msr_paraphrase_test.txt":
            print(f"{path} stands for dev")
    return splits


def read_hub(key: str) -> dict:
    """The same from nyu-mll/glue, rajpurkar/squad or rajpurkar/squad_v2 on the hub, in parquet. Raises InputError."""
    import pyarrow
    import pyarrow.parquet

    span = TASKS[key].kind == "span"
    name, start = (f"rajpurkar/{key}", "") if span else ("nyu-mll/glue", f"{key}/")

    def choose(names: list[str]) -> dict[str, list[str]]:
        found = {}
        for split in split_names(key):
            there = split.replace("dev", "validation") + "-"
            found[split] = sorted(name for name in names if name.startswith(start) and name.endswith(".parquet")
                                  and Path(name).name.startswith(there))
            if not found[split]:
                raise InputError(f"{name} on the hub holds no parquet file {start}{there}*")
        return found

    folder, names = hub_files(name, "dataset", lambda names: sum(choose(names).values(), []))
    splits = {}
    for split, files in choose(names).items():
        try:
            tables = [pyarrow.parquet.read_table(Path(folder) / file) for file in files]
            columns = pyarrow.concat_tables(tables).to_pydict()
            if span:
                rows = zip(*(columns[name] for name in ("id", "question", "context", "answers")), strict=True)
                splits[split] = [Question(i, question, context, list(zip(a["text"], a["answer_start"], strict=True)))
                                 for i, question, context, a in rows]
                continue
            index, labels = map(str, columns.pop("idx")), columns.pop("label")  # all other columns are text
            splits[split] = Table(list(zip(*columns.values(), strict=True)),
                                  None if split.startswith("test") else labels, list(index))
            if len(columns) != len(TASKS[key].columns):
                raise ValueError(f"columns {', '.join(columns)}")
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}/{files[0]} is not {split} of {TASKS[key].title}: {one_line(error)}") from None
    return splits


# ---- Reading SQuAD -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Question:
    id: str
    text: str
    context: str
    answers: list[tuple[str, int]]  # text, and the number of its first character in the context


def read_squad(path: Path, key: str) -> list[Question]:
    """A SQuAD file, JSON or gzipped JSON. Raises InputError, naming the question where there is one."""
    try:
        raw = path.read_bytes()
        root = json.loads(gzip.decompress(raw) if path.name.endswith(".gz") else raw)
    except (OSError, EOFError, ValueError, RecursionError, gzip.zlib.error) as error:
        raise InputError(f"{path} is damaged or not JSON: {one_line(error)}; download it again") from None
    questions, where = [], "at its root"
    try:
        for a, article in enumerate(root["data"], 1):
            for p, paragraph in enumerate(article["paragraphs"], 1):
                where = f"article {a}, paragraph {p}"
                for entry in paragraph["qas"]:
                    where = f"question {entry['id']}"
                    answers = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                    question = Question(entry["id"], entry["question"], paragraph["context"], answers)
                    "".join((question.id, question.text, question.context))  # a TypeError if one is not text
                    if any(start < 0 or len(text + question.context[:start]) > len(question.context)
                           for text, start in answers):
                        raise InputError(f"{path}, {where}: an answer lies outside of its paragraph; repair the file")
                    if not answers and key == "squad":
                        raise InputError(f"{path}, {where}: no answer; such questions belong to --task squad_v2")
                    questions.append(question)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}, {where}: not of SQuAD's form ({one_line(error)})") from None
    if not questions:
        raise InputError(f"{path} holds no questions; download it again")
    return questions


def find_data(root: str | None, keys: list[str], skip: bool) -> dict[str, Path | None]:
    """Task -> its folder; None for the hub. For one task `root` may be that folder; else it holds one for each task.
    `skip`: tasks that are not there are left out, which is said, instead of an InputError."""
    if root is None:
        return dict.fromkeys(keys)
    if not Path(root).is_dir():
        raise InputError(f"--data {root} is not a folder")
    inside = {path.name.lower(): path for base in (Path(root) / "glue", Path(root)) if base.is_dir()
              for path in base.iterdir() if path.is_dir()}
    found = {}
    for key in keys:
        title = TASKS[key].title.lower()
        names = [title, key, "squad"] if TASKS[key].kind == "span" else [title, key]
        folder = next((inside[name] for name in names if name in inside), None)
        if folder is None and len(keys) == 1:
            folder = Path(root)
        if skip and (folder is None or find_split(folder, key, "train") is None):
            print(f"skipped {key}: {root} holds no {TASKS[key].title}/{file_names(key, 'train')[0]}")
        elif folder is None:
            raise InputError(f"--data {root} holds no folder {TASKS[key].title}: leave out {key}, or add its data")
        else:
            found[key] = folder
    if not found:
        raise InputError(f"--data {root} holds none of the tasks; the folders in it should be "
                         f"{', '.join(TASKS[key].title for key in IN_AVERAGE)}, squad")
    return found


# ---- Texts to rows of token ids, rows to batches -------------------------------------------------------------


@dataclasses.dataclass
class Rows:
    """N rows of token ids, [CLS] a [SEP] or [CLS] a [SEP] b [SEP], unpadded. `first`: tokens of "[CLS] a [SEP]"."""

    ids: list[np.ndarray]
    first: list[int]
    labels: np.ndarray | None  # (N,) numbers or scores, or (N,2) first and last token of the answer
    question: list[int] = dataclasses.field(default_factory=list)  # SQuAD: number of the question
    offsets: list[np.ndarray] = dataclasses.field(default_factory=list)  # and (tokens of b,2) characters in its context


def token_ids(texts: list[str], tokenizer) -> list[np.ndarray]:
    result = []
    for start in range(0, len(texts), 4096):  # in pieces, because an Encoding takes much more memory than its ids
        encodings = tokenizer.encode_batch_fast(texts[start : start + 4096], add_special_tokens=False)
        result += [np.array(encoding.ids, np.int32) for encoding in encodings]
    return result


def encode_table(table: Table, key: str, tokenizer, max_length: int) -> Rows:
    """Rows of at most `max_length` tokens. Of a pair that is too long the longer text loses tokens first."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    columns = [token_ids(list(column), tokenizer) for column in zip(*table.texts, strict=True)]
    ids, first = [], []
    for a, *rest in zip(*columns, strict=True):
        room = max_length - 2 - len(rest)
        b = rest[0] if rest else []
        keep = max(room - len(b), room - room // 2)  # of a, if both together are too long
        a = a[:keep] if len(a) + len(b) > room else a
        ids.append(np.array([cls, *a, sep, *([*b[: room - len(a)], sep] if rest else [])], np.int32))
        first.append(len(a) + 2)
    kind = np.float32 if TASKS[key].kind == "regression" else np.int64
    return Rows(ids, first, None if table.labels is None else np.array(table.labels, kind))


def encode_questions(questions: list[Question], tokenizer, max_length: int, stride: int, training: bool) -> Rows:
    """Windows over the contexts, each `stride` tokens on from the one before, with the question in front.

    Where an answer is not wholly in a window the labels are 0, 0: the [CLS] token, as for a question without an answer.
    Training rows take the first answer; one that does not stand where it says is left out.
    """
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    contexts = list({question.context: None for question in questions})
    tokens = {}
    for start in range(0, len(contexts), 1024):
        for text, encoding in zip(contexts[start:], tokenizer.encode_batch(
                contexts[start : start + 1024], add_special_tokens=False), strict=False):
            tokens[text] = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
    rows, labels, misplaced = Rows([], [], None), [], 0
    for which, ids in enumerate(token_ids([question.text for question in questions], tokenizer)):
        question = questions[which]
        context, offsets = tokens[question.context]
        ids = ids[: min(QUESTION_TOKENS, (max_length - 3) // 2)]
        room = max_length - 3 - len(ids)
        first = last = -1
        if training and question.answers:
            text, start = question.answers[0]
            found = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))  # tokens that overlap
            if not len(found) or question.context[start : start + len(text)] != text:
                misplaced += 1
                continue
            first, last = found[[0, -1]]
        for begin in itertools.count(0, min(stride, room)):
            rows.ids.append(np.array([cls, *ids, sep, *context[begin : begin + room], sep], np.int32))
            rows.first.append(len(ids) + 2)
            rows.question.append(which)
            rows.offsets.append(offsets[begin : begin + room])
            shift = len(ids) + 2 - begin
            labels.append((first + shift, last + shift) if begin <= first and last < begin + room else (0, 0))
            if begin + room >= len(context):
                break
    if misplaced:
        print(f"{misplaced} questions left out of training: their answer does not stand at answer_start")
    rows.labels = np.array(labels, np.int64).reshape(-1, 2) if training else None
    return rows


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Every row once, in batches of similar length. Order and company are random, the same for the same (seed, epoch).

    Sorting within SORTED_TOGETHER batches leaves next to no padding and keeps batches random in everything but length.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), SORTED_TOGETHER * batch_size):
        together = order[start : start + SORTED_TOGETHER * batch_size]
        together = together[np.argsort(lengths[together], kind="stable")]
        batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def make_batch(rows: Rows, indices: np.ndarray, config: model.BertConfig, device):
    """Rows padded to the longest of them: input_ids, token_type_ids, attention_mask, each (B,S), and the labels.

    The types are None where all are 0, the mask where nothing is padded, the labels where there are none.
    """
    lengths = np.array([len(rows.ids[i]) for i in indices])
    columns = np.arange(lengths.max())
    ids = np.full((len(indices), len(columns)), config.pad_token_id, np.int64)
    for row, i in zip(ids, indices, strict=True):
        row[: len(rows.ids[i])] = rows.ids[i]
    mask = columns < lengths[:, None]  # (B,S)
    types = (columns >= np.array([rows.first[i] for i in indices])[:, None]) & mask
    tensors = [ids, types.astype(np.int64) if types.any() and config.type_vocab_size > 1 else None,
               None if mask.all() else mask, None if rows.labels is None else rows.labels[indices]]
    return [None if array is None else torch.from_numpy(array).to(device, non_blocking=True) for array in tensors]


# ---- The model of a task -------------------------------------------------------------------------------------


class TaskModel(Bert):
    """An encoder under a new linear head: on the pooled first token (B,C), or for spans on every token (B,S,2)."""

    def __init__(self, bert: Bert, kind: str, outputs: int):
        nn.Module.__init__(self)  # the encoder is taken over as it is; nothing in it is to be initialised
        self.config, self.bert, self.cls, self.kind = bert.config, bert.bert, None, kind
        self.dropout = self.config.hidden_dropout_prob
        head = Linear(self.config.hidden_size, outputs)
        nn.init.normal_(head.weight, std=self.config.initializer_range)
        if kind == "span":
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
    """Cross entropy, squared error, or the mean cross entropy of a span's two ends over the positions."""
    if kind == "span":
        return F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten())  # (B*2,S), (B*2)
    if kind == "regression":
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)


def save_task_model(net: TaskModel, key: str, tokenizer, folder: Path):
    """Write a standard BertForSequenceClassification or BertForQuestionAnswering into an existing folder."""
    kind, labels = TASKS[key].kind, TASKS[key].labels
    net.config.save(folder, "BertForQuestionAnswering" if kind == "span" else "BertForSequenceClassification")
    labels = labels or tuple(f"LABEL_{i}" for i in range(2 if kind == "span" else 1))
    extra = {"id2label": {str(i): name for i, name in enumerate(labels)},
             "label2id": {name: i for i, name in enumerate(labels)}}
    if kind != "span":
        extra["problem_type"] = "regression" if kind == "regression" else "single_label_classification"
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | extra, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    data.save_tokenizer(tokenizer, folder, net.config.max_position_embeddings)


# ---- Metrics. Of predictions and truths (N,); from 0 (or -1) to 1. -------------------------------------------


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float((predicted == true).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where neither is defined."""
    hits, both = ((predicted == 1) & (true == 1)).sum(), (predicted == 1).sum() + (true == 1).sum()
    return float(2 * hits / both) if both else 0.0


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Correlation; 0 where one side is constant."""
    x, y = (np.asarray(values, np.float64) - np.mean(values, dtype=np.float64) for values in (predicted, true))
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if np.ptp(predicted) and np.ptp(true) else 0.0


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Matthews' coefficient of two classes is the correlation of the 0s and 1s."""
    return pearson(predicted, true)


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks."""
    def ranks(values):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[group]

    return pearson(ranks(predicted), ranks(true))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no (ASCII) punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_scores(predicted: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and word F1 of one answer against the best of the true ones, as SQuAD's official script has them.

    No true answer (or none but articles and punctuation) means that the empty prediction is right.
    """
    words = normalise_answer(predicted).split()
    exact, best = 0.0, 0.0
    for answer in [a for a in answers if normalise_answer(a)] or [""]:
        true = normalise_answer(answer).split()
        common = sum((collections.Counter(words) & collections.Counter(true)).values())
        score = 2 * common / (len(words) + len(true)) if words and true else float(words == true)
        exact, best = max(exact, float(words == true)), max(best, score)
    return exact, best


def best_answers(rows: Rows, logits: list[np.ndarray], questions: list[Question], n_best: int, most_tokens: int,
                 null_threshold: float | None) -> dict[str, str]:
    """Question id -> the text of the best span over all windows, cut from the context character by character.

    In each window the `n_best` first and last tokens with the highest scores, in the context alone, are paired; a pair
    counts if it is in order and at most `most_tokens` long. With a threshold (SQuAD 2.0) the answer is empty where
    [CLS], at its lowest over the windows, outscores the best span by more than that.
    """
    best = [(-np.inf, "")] * len(questions)
    null = [np.inf] * len(questions)
    for which, first_of_context, offsets, scores in zip(rows.question, rows.first, rows.offsets, logits, strict=True):
        null[which] = min(null[which], float(scores[0].sum()))  # scores (S,2)
        first, last = scores[first_of_context:-1].T  # without the last [SEP]
        starts, ends = np.argsort(-first)[:n_best], np.argsort(-last)[:n_best]
        length = ends - starts[:, None] + 1  # (n_best,n_best)
        total = np.where((length > 0) & (length <= most_tokens), first[starts][:, None] + last[ends], -np.inf)
        if total.size and total.max() > best[which][0]:
            i, j = np.unravel_index(total.argmax(), total.shape)
            text, end = questions[which].context, offsets[ends[j], 1]
            while end < len(text) and unicodedata.combining(text[end]):  # an accent that the tokenizer took away
                end += 1
            best[which] = (float(total.max()), text[offsets[starts[i], 0] : end])
    threshold = np.inf if null_threshold is None else null_threshold
    return {question.id: "" if none - score > threshold else text
            for question, (score, text), none in zip(questions, best, null, strict=True)}


# ---- The loop ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """All that a result depends on beside model, task and seed; kept with every result."""

    data: str  # folder, or "hub"
    weights: str  # hash of the checkpoint
    learning_rate: float | None  # None: to be chosen from the grid
    batch_size: int | None
    epochs: int
    max_steps: int | None
    max_length: int
    warmup: float
    weight_decay: float
    dropout: float | None
    bf16: bool
    span: dict | None  # SQuAD: stride, n_best, max_answer_length, null_threshold


@dataclasses.dataclass
class Outcome:
    net: TaskModel
    metrics: dict[str, float]
    answers: dict[str, str] | None
    epoch: int  # the best one,
    epochs: int  # of so many,
    steps: int  # and optimizer steps in all

    @property
    def score(self) -> float:
        return statistics.fmean(self.metrics.values())


@torch.no_grad()
def predict(net: TaskModel, rows: Rows, batch_size: int, bf16: bool, device) -> list[np.ndarray]:
    """Logits of every row in order: (C,), or (S,2) for spans."""
    net.eval()
    order = np.argsort([-len(ids) for ids in rows.ids], kind="stable")
    logits: list = [None] * len(order)
    for start in tqdm(range(0, len(order), batch_size), desc="evaluate", disable=None, leave=False):
        indices = order[start : start + batch_size]
        ids, types, mask, _ = make_batch(rows, indices, net.config, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            batch = net(ids, types, mask).cpu().numpy()
        for i, values in zip(indices, batch, strict=True):
            logits[i] = values[: len(rows.ids[i])] if net.kind == "span" else values
    return logits


def evaluate(net: TaskModel, key: str, splits: dict, rows: dict[str, Rows], settings: Settings, device):
    """Metrics on the dev split in percent, and the answers of SQuAD."""
    task, metrics = TASKS[key], {}
    for part in task.parts:
        dev = f"dev{part}"
        logits = predict(net, rows[dev], 2 * settings.batch_size, settings.bf16, device)
        if task.kind == "span":
            span = settings.span
            answers = best_answers(rows[dev], logits, splits[dev], span["n_best"], span["max_answer_length"],
                                   span["null_threshold"])
            scores = [squad_scores(answers[question.id], [text for text, _ in question.answers])
                      for question in splits[dev]]
            return dict(zip(task.metrics, 100 * np.mean(scores, axis=0), strict=True)), answers
        values = np.stack(logits)
        predicted = values[:, 0] if task.kind == "regression" else values.argmax(1)
        metrics |= {f"{name}{part}": 100 * METRICS[name](predicted, rows[dev].labels) for name in task.metrics}
    return metrics, None


def fine_tune(folder: Path, key: str, splits: dict, rows: dict[str, Rows], settings: Settings, seed: int, device,
              title: str = "train") -> Outcome:
    """Train one model on one task and return it as it was after its best epoch, judged on the dev split.

    AdamW with linear warm-up and decay. Raises InputError where the loss stops being finite.
    """
    torch.manual_seed(seed)
    kind = TASKS[key].kind
    net = TaskModel(model.load_model(folder), kind, {"span": 2, "regression": 1}.get(kind, len(TASKS[key].labels)))
    if settings.dropout is not None:
        net.set_dropout(settings.dropout, settings.dropout)
        net.dropout = settings.dropout
    net.to(device)
    parameters = list(net.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    train = rows["train"]
    lengths = np.array([len(ids) for ids in train.ids])
    steps = settings.epochs * -(-len(lengths) // settings.batch_size)
    steps = min(steps, settings.max_steps or steps)
    step, best, weights = 0, None, None
    with tqdm(total=steps, desc=title, disable=None, leave=False) as progress:
        for epoch in range(1, settings.epochs + 1):
            net.train()
            total = torch.zeros((), device=device)  # added up there: reading every loss would make the GPU wait
            batches = training_batches(lengths, settings.batch_size, seed, epoch)[: steps - step]
            for indices in batches:
                ids, types, mask, labels = make_batch(train, indices, net.config, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
                    logits = net(ids, types, mask)
                loss = task_loss(kind, logits, labels)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, settings.learning_rate, settings.warmup)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                step += 1
                progress.update()
            mean = total.item() / len(batches)
            if not np.isfinite(mean):
                raise InputError(f"{title}: the loss is not finite after {step} steps; try a smaller --learning-rate")
            metrics, answers = evaluate(net, key, splits, rows, settings, device)
            outcome = Outcome(net, metrics, answers, epoch, epoch, step)
            progress.set_postfix(loss=f"{mean:.3f}", **{name: f"{value:.1f}" for name, value in metrics.items()})
            if best is None or outcome.score > best.score:
                best, weights = outcome, {k: v.to("cpu", copy=True) for k, v in net.state_dict().items()}
            best.epochs, best.steps = epoch, step
            if step == steps:
                break
    net.load_state_dict(weights)
    return best


def try_grid(folder: Path, key: str, splits: dict, rows: dict[str, Rows], settings: Settings, seed: int, device,
             title: str) -> tuple[Outcome, Settings]:
    """The best outcome over the learning rates and batch sizes that `settings` leaves open, and its settings."""
    rates = (settings.learning_rate,) if settings.learning_rate else GRID_LEARNING_RATES
    sizes = (settings.batch_size,) if settings.batch_size else GRID_BATCH_SIZES
    best = None
    for rate, size in itertools.product(rates, sizes):
        trial = dataclasses.replace(settings, learning_rate=rate, batch_size=size)
        outcome = fine_tune(folder, key, splits, rows, trial, seed, device, f"{title} {rate:g} x {size}")
        if len(rates) * len(sizes) > 1:
            print(f"  learning rate {rate:g}, batch {size}: {describe(outcome.metrics)}", flush=True)
        if best is None or outcome.score > best[0].score:
            best = outcome, trial
    if len(rates) * len(sizes) > 1:
        print(f"  chosen on dev: learning rate {best[1].learning_rate:g}, batch {best[1].batch_size}")
    return best


# ---- The output folder: results.json, and a folder for every result ------------------------------------------


def read_results(output: Path) -> list[dict]:
    """The finished entries of an output folder, which need not exist. Raises InputError."""
    path = output / "results.json"
    try:
        if not path.exists():
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise InputError(f"--output {output} is in use and holds no results.json; choose another folder")
            return []
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            if not {"model", "task", "seed", "metrics", "folder", "seconds", "settings"} <= set(entry):
                raise ValueError("an entry lacks a field")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be used: {one_line(error)}; choose another --output") from None
    return entries


def write_results(output: Path, entries: list[dict]):
    """Replace results.json in one motion: a reader, or an interruption, meets the old file or the new one."""
    work = output / "results.json.new"
    with open(work, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, output / "results.json")


def add_result(output: Path, entry: dict):
    """Add one entry to results.json, to which other processes may be adding theirs."""
    with run.locked(output):
        write_results(output, [*read_results(output), entry])


def identity(entry: dict) -> tuple[str, str, int]:
    return entry["model"], entry["task"], entry["seed"]


def result_folder(output: Path, name: str, key: str, seed: int, others: set[str]) -> Path:
    """Where a result lies: OUTPUT/MODEL/TASK-seedN. Models with long names, or alike on disk, get a hash."""
    plain = {other: re.sub(r"[^\w.-]+", "-", other).strip(".-") or "model" for other in {name, *others}}
    slug = plain.pop(name)
    if slug in plain.values() or len(slug) > LONGEST_NAME:
        slug = f"{slug[-LONGEST_NAME:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return output / slug / f"{key}-seed{seed}"


def write_outcome(outcome: Outcome, key: str, tokenizer, predictions: dict[str, list[str]], folder: Path):
    """Write model and predictions beside `folder` and rename: the folder is complete or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        save_task_model(outcome.net, key, tokenizer, work)
        for name, lines in predictions.items():
            (work / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prediction_files(outcome: Outcome, key: str, splits: dict, rows: dict[str, Rows], settings: Settings, device):
    """File name -> lines: the answers to SQuAD's dev split, or GLUE's test splits where they are there."""
    task = TASKS[key]
    if task.kind == "span":
        return {"predictions.json": [json.dumps(outcome.answers, ensure_ascii=False)]}
    files = {}
    for part in task.parts:
        split = f"test{part}"
        if split in splits:
            values = np.stack(predict(outcome.net, rows[split], 2 * settings.batch_size, settings.bf16, device))
            regression = task.kind == "regression"
            lines = [f"{np.clip(v[0], 0, 5):.3f}" if regression else task.written[v.argmax()] for v in values]
            short = {"_matched": "-m", "_mismatched": "-mm"}.get(part, "")
            files[f"{task.title}{short}.tsv"] = ["index\tprediction"] + [
                f"{index}\t{line}" for index, line in zip(splits[split].index, lines, strict=True)]
    return files


def describe(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())


def end_table(entries: list[dict], names: list[str], keys: list[str]) -> str:
    """Models down, a column for every metric of every task, mean and standard deviation over the seeds; last the
    average as GLUE defines it: over the tasks, of the mean of each one's metrics."""
    def cell(values):
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}" if values else "-"

    counted = [key for key in keys if key in IN_AVERAGE]
    head = ["model"] + [f"{TASKS[key].title} {name}{part}" for key in keys for part in TASKS[key].parts
                        for name in TASKS[key].metrics]
    table = [head + [f"GLUE average of {len(counted)}"] * bool(counted)]
    for model_name in names:
        mine = {(e["task"], e["seed"]): e["metrics"] for e in entries if e["model"] == model_name}
        seeds = sorted({seed for _, seed in mine})
        row = [model_name]
        for key in keys:
            for part, name in itertools.product(TASKS[key].parts, TASKS[key].metrics):
                row.append(cell([mine[key, seed][name + part] for seed in seeds if (key, seed) in mine]))
        if counted:
            row.append(cell([statistics.fmean(statistics.fmean(mine[key, seed].values()) for key in counted)
                             for seed in seeds if all((key, seed) in mine for key in counted)]))
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)


# ---- The command line ----------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises InputError."""
    count, fraction = number(int, 1, 10**9), number(float, 0, 1)
    parser = Parser(description="Fine-tune BERT checkpoints on GLUE and SQuAD and put the results into one table.",
                    epilog="The best epoch is chosen on the dev split, the one that is reported, and nowhere else.",
                    allow_abbrev=False)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="Folders or hub names of BERT checkpoints.")
    add("--task", nargs="+", required=True, choices=[*TASKS, "all"], metavar="TASK",
        help=f"One or more of {', '.join(TASKS)}, or all.")
    add("--data", help="Folder of the task (train.tsv, dev.tsv; train-v1.1.json), or one that holds a folder for each "
        "(CoLA, SST-2, ..., squad). [nyu-mll/glue and rajpurkar/squad on the hub]")
    add("--output", type=Path, default=Path("runs/finetune"), help="Folder for results.json and the fine-tuned models. "
        "Results that are in it already are not made again. [%(default)s]")
    add("--overwrite", action="store_true", help="Make results again that are in the output folder.")
    add("--seeds", nargs="+", type=number(int, 0, 2**32 - 1), default=[0], help="Seeds of heads, order and dropout. "
        "[0]")
    add("--epochs", type=count, help="Passes over the training data. [by task]")
    add("--max-steps", type=count, help="Optimizer steps at most. [none]")
    add("--learning-rate", type=number(float, 1e-9, 1), help="Peak learning rate of AdamW. [by task]")
    add("--batch-size", type=count, help="Rows in a step. [by task]")
    add("--grid", action="store_true", help="Try learning rates 1e-5 to 1e-4 and batch sizes 16 and 32 (where not "
        "given) with the first seed, and take the best on dev for all seeds.")
    add("--max-length", type=number(int, 16, 10**6), help="Tokens in a row at most. [by task]")
    add("--warmup", type=fraction, default=0.1, help="Fraction of the steps in which the learning rate rises. "
        "[%(default)s]")
    add("--weight-decay", type=number(float, 0, 1e9), default=0.01, help="Decoupled weight decay of the matrices. "
        "[%(default)s]")
    add("--dropout", type=number(float, 0, 0.99), help="Dropout everywhere. [the checkpoint's own]")
    add("--doc-stride", type=count, default=128, help="SQuAD: tokens from one window on a paragraph to the next. "
        "[%(default)s]")
    add("--n-best", type=count, default=20, help="SQuAD: first and last tokens that are paired in a window. "
        "[%(default)s]")
    add("--max-answer-length", type=count, default=30, help="SQuAD: tokens in an answer at most. [%(default)s]")
    add("--null-threshold", type=number(float, -1e9, 1e9), default=0.0, help="SQuAD 2.0: no answer where its score "
        "is higher by this. [%(default)s]")
    add("--device", default="auto", help="cpu, cuda or cuda:N. [auto: a GPU where there is one]")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="Arithmetic of the matrix products. [auto: bf16 on a GPU, fp32 on a CPU]")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace, key: str, source: Path | None, positions: int, weights: str, bf16: bool):
    """The settings of one model and task: flags, and the task's recipe where a flag is not given."""
    rate, epochs, batch_size, max_length = RECIPES[key]
    span = {"stride": args.doc_stride, "n_best": args.n_best, "max_answer_length": args.max_answer_length,
            "null_threshold": args.null_threshold if key == "squad_v2" else None}
    return Settings(
        data="hub" if source is None else str(source.resolve()), weights=weights,
        learning_rate=args.learning_rate or (None if args.grid else rate),
        batch_size=args.batch_size or (None if args.grid else batch_size),
        epochs=args.epochs or epochs, max_steps=args.max_steps,
        max_length=min(args.max_length or max_length, positions),
        warmup=args.warmup, weight_decay=args.weight_decay, dropout=args.dropout, bf16=bf16,
        span=span if TASKS[key].kind == "span" else None)


def evaluate_all(args: argparse.Namespace):
    """Everything that the flags ask for. All input is checked before the first step is taken. Raises InputError."""
    device = run.find_device(args.device)
    run.reuse_memory()
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    keys = [key for key in TASKS if key in args.task or "all" in args.task]
    names, seeds = list(dict.fromkeys(args.model)), list(dict.fromkeys(args.seeds))
    sources = find_data(args.data, keys, skip="all" in args.task)
    keys = list(sources)
    folders, tokenizers, settings = {}, {}, {}
    for name in names:
        folder = folders[name] = model.find_model(name)
        bert = model.load_model(folder)
        positions, weights = bert.config.max_position_embeddings, run.weights_hash(folder)
        tokenizers[name] = data.load_tokenizer(folder, bert.config.vocab_size)
        if bert.bert.pooler is None and any(TASKS[key].kind != "span" for key in keys):
            print(f"{name} has no pooler: it gets a fresh one")
        asked = max(args.max_length or RECIPES[key][3] for key in keys)
        if positions < 16:
            raise InputError(f"{name} has {positions} positions; a task needs at least 16")
        if asked > positions:
            print(f"{name} has {positions} positions: rows are cut there instead of at {asked}")
        settings |= {(name, key): settings_of(args, key, sources[key], positions, weights, bf16) for key in keys}

    # What is done already, and what is left to do.
    entries = read_results(args.output)
    wanted = list(itertools.product(names, keys, seeds))
    entries = [entry for entry in entries if identity(entry) not in wanted or not args.overwrite
               and args.output.joinpath(*Path(entry["folder"]).parts[-2:]).is_dir()]
    done = {identity(entry): entry for entry in entries if identity(entry) in wanted}
    for (name, key, seed), entry in done.items():
        for field, value in dataclasses.asdict(settings[name, key]).items():
            if entry["settings"].get(field) != value:
                raise InputError(f"{args.output}: {key} seed {seed} of {name} was made with {field} "
                                 f"{entry['settings'].get(field)}, now {value}; give --overwrite or another --output")
    if done:
        print(f"{len(done)} of {len(wanted)} results are in {args.output} already")
    choices = {identity(entry)[:2]: (entry["learning_rate"], entry["batch_size"]) for entry in done.values()}
    todo = [one for one in wanted if one not in done]
    splits = {key: read_task(key, sources[key]) for key in keys if any(key == one[1] for one in todo)}
    run.join_processes(torch.device("cpu"), datetime.timedelta(days=7))
    if run.RANK == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        with run.locked(args.output):  # read anew: another call may have added to it meanwhile
            write_results(args.output, [entry for entry in read_results(args.output) if identity(entry) not in todo])
    run.gather("written")  # the others may add to it from here on
    shared_out = list(dict.fromkeys(one[:2] if args.grid else one for one in todo))  # a grid serves all of its seeds
    todo = [one for one in todo if shared_out.index(one[:2] if args.grid else one) % run.WORLD == run.RANK]
    print("the best epoch is chosen on dev, the split that is reported here")

    begun = time.perf_counter()
    for (name, key), group in itertools.groupby(todo, lambda one: one[:2]):
        now, tokenizer, rows = settings[name, key], tokenizers[name], {}
        for split, part in splits[key].items():
            if TASKS[key].kind == "span":
                rows[split] = encode_questions(part, tokenizer, now.max_length, now.span["stride"], split == "train")
            else:
                rows[split] = encode_table(part, key, tokenizer, now.max_length)
        for one in group:
            start = time.perf_counter()
            title = f"{name} {key} seed {one[2]}"
            print(f"{title}: {len(rows['train'].ids):,} training rows", flush=True)
            trial = now
            if (name, key) in choices:
                rate, batch_size = choices[name, key]
                trial = dataclasses.replace(now, learning_rate=rate, batch_size=batch_size)
            outcome, trial = try_grid(folders[name], key, splits[key], rows, trial, one[2], device, title)
            choices[name, key] = trial.learning_rate, trial.batch_size
            folder = result_folder(args.output, name, key, one[2], {*names, *(entry["model"] for entry in entries)})
            files = prediction_files(outcome, key, splits[key], rows, trial, device)
            write_outcome(outcome, key, tokenizer, files, folder)
            seconds = time.perf_counter() - start
            entry = {
                "model": name, "task": key, "seed": one[2], "metrics": outcome.metrics, "folder": str(folder),
                "seconds": round(seconds, 2), "epoch": outcome.epoch, "learning_rate": trial.learning_rate,
                "batch_size": trial.batch_size, "settings": dataclasses.asdict(now)}
            add_result(args.output, entry)
            position = todo.index(one) + 1
            left = (time.perf_counter() - begun) / position * (len(todo) - position)
            capped = f", {outcome.steps} steps" if now.max_steps else ""
            print(f"  {describe(outcome.metrics)} (epoch {outcome.epoch} of {outcome.epochs}{capped}; {seconds:.0f} s; "
                  f"{position} of {len(todo)} done, about {left / 60:.0f} min left)", flush=True)

    run.gather("done")
    entries = read_results(args.output)
    print(f"\ndev, percent{', mean ± standard deviation over seeds' if len(seeds) > 1 else ''}\n")
    print(end_table([entry for entry in entries if identity(entry) in wanted], names, keys))
    print(f"\nresults: {args.output / 'results.json'}")


def main(argv: list[str] | None = None) -> int:
    try:
        with run.only_the_first_speaks():
            evaluate_all(parse_arguments(argv))
            run.leave_processes()
    except InputError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("finetune.py: error: the GPU's memory is full; give a smaller --batch-size", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"finetune.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("finetune.py: interrupted; run the same command again, without --overwrite, to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
