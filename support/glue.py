"""The tasks of GLUE and SQuAD, and where their data is: TSV and JSON files in a folder, or parquet files on the hub.

    folders = find_data("glue_data", ["rte", "squad"], skip_missing=False)
    splits = read_task("rte", folders["rte"])  # "train" and "dev", perhaps "test"
"""

import dataclasses
from pathlib import Path

from support.errors import InputError, one_line
from support.hub import hub_files
from support.squad import Question, read_squad


@dataclasses.dataclass(frozen=True)
class Task:
    title: str  # as in the papers, and in the names of folders and prediction files
    kind: str  # "classification", "regression" (one number) or "span" (first and last token of an answer)
    metrics: tuple[str, ...]
    columns: tuple[str, ...] = ()  # the one or two columns of text in the TSV file
    label_column: str = ""
    labels: tuple[str, ...] = ()  # class names; a class is its index here, as in nyu-mll/glue
    tsv_labels: tuple[str, ...] = ()  # the same classes as the TSV file writes them
    suffixes: tuple[str, ...] = ("",)  # of "dev" and "test": MNLI has two of each, reported separately


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
GLUE_AVERAGE = [key for key, task in TASKS.items() if task.kind != "span" and key != "wnli"]  # as in the BERT papers


@dataclasses.dataclass
class Table:
    """One split of a GLUE task with N rows."""

    texts: list[tuple[str, ...]]  # one or two a row
    labels: list[float] | None  # classes or scores; None in a test split
    index: list[str]  # names of the rows, for the prediction file


def split_names(key: str) -> list[str]:
    kinds = ("dev",) if TASKS[key].kind == "span" else ("dev", "test")
    return ["train"] + [split + suffix for split in kinds for suffix in TASKS[key].suffixes]


# ---- Files in a folder ---------------------------------------------------------------------------------------


def find_data(root: str | None, keys: list[str], skip_missing: bool) -> dict[str, Path | None]:
    """Task -> its folder, or None for the hub (`root` is None).

    `root` holds a folder for every task; for a single task it may be that folder itself. A task without data is skipped
    with a message if `skip_missing`, and otherwise an InputError.
    """
    if root is None:
        return dict.fromkeys(keys)
    if not Path(root).is_dir():
        raise InputError(f"--data {root} is not a folder")
    subfolders = {path.name.lower(): path for base in (Path(root) / "glue", Path(root)) if base.is_dir()
                  for path in base.iterdir() if path.is_dir()}
    found = {}
    for key in keys:
        title = TASKS[key].title
        names = [title.lower(), key] + ["squad"] * (TASKS[key].kind == "span")
        folder = next((subfolders[name] for name in names if name in subfolders), None)
        if folder is None and len(keys) == 1:
            folder = Path(root)
        if skip_missing and (folder is None or find_split(folder, key, "train") is None):
            print(f"Skipping {key}: {root} holds no {title}/{file_names(key, 'train')[0]}.")
        elif folder is None:
            raise InputError(f"--data {root} holds no folder {title}; add the data of {key}, or leave it out of --task")
        else:
            found[key] = folder
    if not found:
        raise InputError(f"--data {root} holds none of the tasks; its folders should be called "
                         f"{', '.join(TASKS[key].title for key in GLUE_AVERAGE)}, squad")
    return found


def file_names(key: str, split: str) -> list[str]:
    """The file names that a split may have."""
    if TASKS[key].kind == "span":
        version = TASKS[key].title.split("-")[1]
        return [f"{split}-{version}.json", f"{split}-{version}.json.gz"]
    # MRPC as Microsoft ships it has no dev split of its own (it is part of train), but its test split has labels.
    microsoft = {("mrpc", "train"): ["msr_paraphrase_train.txt"], ("mrpc", "dev"): ["msr_paraphrase_test.txt"]}
    return [f"{split}.tsv", *microsoft.get((key, split), [])]


def find_split(folder: Path, key: str, split: str) -> Path | None:
    return next((folder / name for name in file_names(key, split) if (folder / name).is_file()), None)


def read_task(key: str, folder: Path | None) -> dict:
    """Split name -> Table, or list of Questions, from a folder or (None) from the hub. Raises InputError."""
    if folder is None:
        return read_hub(key)
    splits = {}
    for split in split_names(key):
        path = find_split(folder, key, split)
        if path is None:
            if not split.startswith("test"):
                raise InputError(f"{folder}: no {split} split of {TASKS[key].title}; "
                                 f"it should be in {' or '.join(file_names(key, split))}")
        elif TASKS[key].kind == "span":
            splits[split] = read_squad(path, key)
        else:
            splits[split] = read_tsv(path, key, labelled=not split.startswith("test"))
            if path.name == "msr_paraphrase_test.txt":
                print(f"{path} is used as the dev split.")
    return splits


def read_tsv(path: Path, key: str, labelled: bool) -> Table:
    """Read one TSV file as GLUE ships it. Raises InputError with file and line.

    Quotes are plain text. The labelled files of CoLA have no header. Rows of QQP that are torn by a line break inside a
    question are dropped.
    """
    task = TASKS[key]
    raw = path.read_bytes()
    try:
        lines = raw.decode("utf-8-sig").split("\n")  # not splitlines(): some sentences hold other line separators
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {raw[: error.start].count(10) + 1}: not UTF-8 text") from None
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    has_header = key != "cola" or not labelled
    header = (lines or [""])[0].split("\t") if has_header else ["source", "label", "note", "sentence"]
    wanted = [*task.columns, *([task.label_column] if labelled else [])]
    if missing := [name for name in wanted if name not in header]:
        raise InputError(f"{path}, line 1: no column {missing[0]!r} in {', '.join(header)[:100]!r}; {task.title} needs "
                         f"{', '.join(wanted)}: is this the data of another task?")
    columns = [header.index(name) for name in wanted]
    table, torn = Table([], [] if labelled else None, []), 0
    first_row = 1 if has_header else 0
    for number, line in enumerate(lines[first_row:], 1 + first_row):
        fields = line.split("\t")
        if key == "qqp" and len(fields) < len(header):
            torn += 1
            continue
        if len(fields) != len(header):
            raise InputError(f"{path}, line {number}: {len(fields)} columns instead of {len(header)}; repair the "
                             f"line, or give the data of {task.title}")
        values = [fields[column] for column in columns]
        if labelled:
            table.labels.append(parse_label(values.pop(), task, f"{path}, line {number}"))
        table.texts.append(tuple(values))
        table.index.append(fields[0])
    if torn:
        print(f"{path}: dropped {torn} rows with missing fields.")
    if not table.texts:
        raise InputError(f"{path} holds no rows; download it again")
    return table


def parse_label(text: str, task: Task, where: str) -> float:
    """The class or the score that a TSV file writes as `text`. Raises InputError."""
    if task.kind == "classification":
        if text not in task.tsv_labels:
            raise InputError(f"{where}: label {text[:40]!r} is not one of {', '.join(task.tsv_labels)}; is this the "
                             f"data of {task.title}?")
        return task.tsv_labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 5:
        raise InputError(f"{where}: score {text[:40]!r} is not a number from 0 to 5; is this the data of {task.title}?")
    return score


# ---- The hub -------------------------------------------------------------------------------------------------


def read_hub(key: str) -> dict:
    """Read a task from nyu-mll/glue, rajpurkar/squad or rajpurkar/squad_v2 on the hub. Raises InputError."""
    import pyarrow
    import pyarrow.parquet

    span = TASKS[key].kind == "span"
    repository, parent = (f"rajpurkar/{key}", "") if span else ("nyu-mll/glue", f"{key}/")

    def files_of(split: str, names: list[str]) -> list[str]:
        start = split.replace("dev", "validation") + "-"
        files = sorted(name for name in names if name.startswith(parent) and name.endswith(".parquet")
                       and Path(name).name.startswith(start))
        if not files:
            raise InputError(f"{repository} on the hub holds no parquet file {parent}{start}*")
        return files

    folder, names = hub_files(
        repository, "dataset", lambda names: [file for split in split_names(key) for file in files_of(split, names)])
    splits = {}
    for split in split_names(key):
        files = files_of(split, names)
        try:
            tables = [pyarrow.parquet.read_table(Path(folder) / file) for file in files]
            splits[split] = from_columns(pyarrow.concat_tables(tables).to_pydict(), key, split)
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}/{files[0]} is not {split} of {TASKS[key].title}: {one_line(error)}") from None
    return splits


def from_columns(columns: dict[str, list], key: str, split: str) -> Table | list[Question]:
    """The Table or the Questions that the columns of a parquet file hold. Raises KeyError, TypeError or ValueError."""
    if TASKS[key].kind == "span":
        rows = zip(*(columns[name] for name in ("id", "question", "context", "answers")), strict=True)
        return [Question(name, question, context, list(zip(found["text"], found["answer_start"], strict=True)))
                for name, question, context, found in rows]
    index, labels = list(map(str, columns.pop("idx"))), columns.pop("label")
    if len(columns) != len(TASKS[key].columns):  # all other columns are text
        raise ValueError(f"columns {', '.join(columns)}")
    return Table(list(zip(*columns.values(), strict=True)), None if split.startswith("test") else labels, index)
