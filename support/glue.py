"""The tasks of GLUE and SQuAD, and where their data is: TSV and JSON files in a folder, or parquet files on the hub.

    folders = find_data("glue_data", ["rte", "squad"], skip_missing=False)
    splits = read_task("rte", folders["rte"])  # "train" and "dev", perhaps "test"
    rows = encode(splits["dev"], tokenizer, max_length=128)
"""

import dataclasses
from pathlib import Path

import numpy as np

from support.batches import Example, Row, tokenise
from support.errors import InputError, one_line
from support.files import content_hash, file_hash
from support.hub import hub_files
from support.squad import read_squad


@dataclasses.dataclass(frozen=True)
class Task:
    title: str  # as in the papers, and in the names of folders and prediction files
    kind: str  # "classification", "regression" (one number) or "span" (first and last token of an answer)
    metrics: tuple[str, ...]
    columns: tuple[str, ...] = ()  # the one or two columns of text in the TSV file
    labels: tuple[str, ...] = ()  # names of the outputs: a class is its index here, as in nyu-mll/glue
    tsv_labels: tuple[str, ...] = ()  # the same classes as the TSV file writes them
    label_column: str = "label"  # in the TSV file
    suffixes: tuple[str, ...] = ("",)  # of "dev" and "test": MNLI has two of each, reported separately
    file: str = "{}.tsv"  # a glob pattern, with {} for the split


ACCURACY, BINARY, PAIR, SPAN = ("accuracy",), ("0", "1"), ("sentence1", "sentence2"), ("LABEL_0", "LABEL_1")
ENTAILMENT, NLI = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task("CoLA", "classification", ("matthews",), ("sentence",), ("unacceptable", "acceptable"), BINARY),
    "sst2": Task("SST-2", "classification", ACCURACY, ("sentence",), ("negative", "positive"), BINARY),
    "mrpc": Task("MRPC", "classification", ("f1", "accuracy"), ("#1 String", "#2 String"),
                 ("not_equivalent", "equivalent"), BINARY, "Quality"),
    "stsb": Task("STS-B", "regression", ("pearson", "spearman"), PAIR, ("LABEL_0",), label_column="score"),
    "qqp": Task("QQP", "classification", ("f1", "accuracy"), ("question1", "question2"),
                ("not_duplicate", "duplicate"), BINARY, "is_duplicate"),
    "mnli": Task("MNLI", "classification", ACCURACY, PAIR, NLI, NLI, "gold_label", ("_matched", "_mismatched")),
    "qnli": Task("QNLI", "classification", ACCURACY, ("question", "sentence"), ENTAILMENT, ENTAILMENT),
    "rte": Task("RTE", "classification", ACCURACY, PAIR, ENTAILMENT, ENTAILMENT),
    "wnli": Task("WNLI", "classification", ACCURACY, PAIR, ("not_entailment", "entailment"), BINARY),
    "squad": Task("SQuAD-v1.1", "span", ("exact_match", "f1"), (), SPAN, file="{}-v1.1.json*"),  # perhaps .json.gz
    "squad_v2": Task("SQuAD-v2.0", "span", ("exact_match", "f1"), (), SPAN, file="{}-v2.0.json*"),
}
GLUE_AVERAGE = [key for key, task in TASKS.items() if task.kind != "span" and key != "wnli"]  # as in the BERT papers


def encode(examples: list[Example], tokenizer, max_length: int) -> list[Row]:
    """Rows of at most `max_length` tokens. In a pair that is too long the longer text is truncated first."""
    texts = [example.texts if len(example.texts) == 2 else example.texts[0] for example in examples]
    tokenizer.enable_truncation(max_length)
    rows = [Row(np.array(encoding.ids, np.int32), encoding.type_ids.count(0), example.label, example)
            for example, encoding in zip(examples, tokenise(texts, tokenizer, special=True), strict=True)]
    tokenizer.no_truncation()  # the tokenizer is also saved
    return rows


# ---- Files in a folder ---------------------------------------------------------------------------------------


def split_names(key: str) -> list[str]:
    kinds = ("dev",) if TASKS[key].kind == "span" else ("dev", "test")
    return ["train"] + [split + suffix for split in kinds for suffix in TASKS[key].suffixes]


def find_split(folder: Path, key: str, split: str) -> Path | None:
    return min(folder.glob(TASKS[key].file.format(split)), default=None)


def data_hash(folder: Path, key: str) -> str:
    """A hash of the task's files in its folder."""
    files = filter(None, (find_split(folder, key, split) for split in split_names(key)))
    return content_hash("".join(map(file_hash, files)).encode())


def find_data(root: str | None, keys: list[str], skip_missing: bool) -> dict[str, Path | None]:
    """Task -> its folder, or None for the hub (`root` is None).

    `root` holds a folder for every task; for a single task it may be that folder itself. A task without data is skipped
    with a message if `skip_missing`, and otherwise an InputError.
    """
    if root is None:
        return dict.fromkeys(keys)
    found = {}
    for key in keys:
        title, file = TASKS[key].title, TASKS[key].file.format("train")
        names = [title, f"glue/{title}", "squad", "SQuAD", *([""] if len(keys) == 1 else [])]
        folder = next((Path(root, name) for name in names if find_split(Path(root, name), key, "train")), None)
        if folder:
            found[key] = folder
        elif skip_missing:
            print(f"Skipping {key}: {root} holds no {title}/{file}.")
        else:
            raise InputError(f"--data {root} holds no {title}/{file}")
    if not found:
        raise InputError(f"--data {root} holds none of the tasks")
    return found


def read_task(key: str, folder: Path | None) -> dict[str, list[Example]]:
    """Split name -> its examples, from a folder or (None) from the hub. Raises InputError."""
    if folder is None:
        return read_hub(key)
    splits = {}
    for split in split_names(key):
        path, is_test = find_split(folder, key, split), split.startswith("test")
        if path:
            splits[split] = read_squad(path, key) if TASKS[key].kind == "span" else read_tsv(path, key, not is_test)
        elif not is_test:
            raise InputError(f"{folder} holds no {TASKS[key].file.format(split)}")
    return splits


def read_tsv(path: Path, key: str, labelled: bool) -> list[Example]:
    """Read one TSV file as GLUE ships it. Raises InputError with file and line.

    Quotes are plain text. The labelled files of CoLA have no header. Rows of QQP that are torn by a line break inside a
    question are dropped.
    """
    task = TASKS[key]
    wanted = [*task.columns, *([task.label_column] if labelled else [])]
    header = ["source", "label", "note", "sentence"] if key == "cola" and labelled else None
    examples, torn = [], 0
    # Not splitlines(): some sentences hold other line separators.
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            fields = line.removesuffix(b"\r").decode().split("\t")
            if header is None:
                header = fields
                if missing := [name for name in wanted if name not in header]:
                    raise ValueError(f"no column {missing[0]!r} in {', '.join(header)[:100]!r}")
            elif key == "qqp" and len(fields) < len(header):
                torn += 1
            elif len(fields) != len(header):
                raise ValueError(f"{len(fields)} columns instead of {len(header)}")
            else:
                row = dict(zip(header, fields, strict=True))
                label = parse_label(row[task.label_column], task) if labelled else -1
                examples.append(Example(tuple(row[name] for name in task.columns), label, fields[0]))
        except ValueError as error:  # also that of a line that is not UTF-8
            raise InputError(f"{path}, line {number}: {error}; is this the data of {task.title}?") from None
    if torn:
        print(f"{path}: dropped {torn} rows with missing fields.")
    if not examples:
        raise InputError(f"{path} holds no rows; download it again")
    return examples


def parse_label(text: str, task: Task) -> float:
    """The class or the score that a TSV file writes as `text`. Raises ValueError."""
    if text in task.tsv_labels:
        return task.tsv_labels.index(text)
    if task.kind == "regression" and 0 <= float(text) <= 5:
        return float(text)
    raise ValueError(f"label {text[:40]!r} is not {' or '.join(task.tsv_labels) or 'from 0 to 5'}")


# ---- The hub -------------------------------------------------------------------------------------------------


def read_hub(key: str) -> dict[str, list[Example]]:
    """Read a task from nyu-mll/glue, rajpurkar/squad or rajpurkar/squad_v2 on the hub. Raises InputError."""
    import pyarrow.parquet

    repository, parent = (f"rajpurkar/{key}", "") if TASKS[key].kind == "span" else ("nyu-mll/glue", f"{key}/")

    def split_of(file: str) -> str:
        return Path(file).name.split("-")[0].replace("validation", "dev")

    def wanted(names: list[str]) -> list[str]:
        files = sorted(name for name in names if name.startswith(parent) and name.endswith(".parquet"))
        if missing := set(split_names(key)) - set(map(split_of, files)):
            raise InputError(f"{repository} on the hub holds no parquet file of {key}, {min(missing)}")
        return files

    folder, files = hub_files(repository, "dataset", wanted)
    splits = {}
    for split in split_names(key):
        paths = [folder / file for file in files if split_of(file) == split]
        try:
            splits[split] = [example_of(row, key) for row in pyarrow.parquet.read_table(paths).to_pylist()]
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{paths[0]} is not {split} of {TASKS[key].title}: {one_line(error)}") from None
    return splits


def example_of(row: dict, key: str) -> Example:
    """The Example in a row of a parquet file. Raises KeyError, TypeError or ValueError."""
    if TASKS[key].kind == "span":
        answers = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        return Example((row["question"], row["context"]), list(answers), row["id"])
    label, name = row.pop("label"), str(row.pop("idx"))
    return Example(tuple(row.values()), label, name)  # all other columns are text
