"""The results of finetune.py: a folder OUTPUT/MODEL/TASK-seedN for every job, and the table of all of them.

The folder holds the fine-tuned model, its predictions and result.json, and gets its name when it is complete. So a job
is finished if its result.json exists, and several processes and several calls can share an output folder.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from support.errors import InputError
from support.files import atomic_rename, read_json
from support.glue import GLUE_AVERAGE, TASKS


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning run: everything that its result depends on. Stored in result.json."""

    model: str  # as given: a folder or a hub name
    task: str
    seed: int
    data: str  # folder, or "hub"
    weights: str  # fingerprint of the model
    learning_rate: float  # peak
    batch_size: int
    epochs: int
    max_steps: int | None
    max_length: int  # tokens
    warmup: float  # fraction of the steps
    weight_decay: float
    dropout: float | None  # None: that of the checkpoint
    bf16: bool

    def __str__(self) -> str:
        return f"{self.model} {self.task} seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """OUTPUT/MODEL/TASK-seedN. MODEL is the name of the model; that of a path is shortened and gets a hash."""
        name = self.model
        if not re.fullmatch(r"\w[\w.-]{,50}", name):  # a folder name may have 255 bytes, a character up to 4 of them
            digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
            name = re.sub(r"[^\w.-]+", "-", name)[-50:].strip(".-") + "-" + digest
        return output / name / f"{self.task}-seed{self.seed}"

    def is_finished(self, output: Path) -> bool:
        """Raises InputError if there is a result that was made with other settings."""
        path = self.folder(output) / "result.json"
        if not path.exists():
            return False
        before = read_json(path)
        for name, value in dataclasses.asdict(self).items():
            if before.get(name) != value:
                raise InputError(f"{path}: {self} was made with {name} {before.get(name)}, now {value}; use "
                                 "--overwrite or another --output")
        return True


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """`with new_folder(folder) as work`: write into `work`, which becomes `folder` at the end.

    If the block raises, `work` is removed and `folder` stays as it was.
    """
    work = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        shutil.rmtree(folder, ignore_errors=True)
        atomic_rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def results_table(results: list[dict]) -> str:
    """A row for every model, a column for every metric of every task: mean and standard deviation over the seeds.

    results: those of every task and seed, model by model. The last column is the GLUE average: the mean over the tasks
    of the mean of each task's metrics.
    """
    rows = []
    for model, group in itertools.groupby(results, lambda result: result["model"]):
        columns, by_seed = collections.defaultdict(list), collections.defaultdict(list)
        for result in group:
            for name, value in result["metrics"].items():
                columns[f"{TASKS[result['task']].title} {name}"].append(value)
            if result["task"] in GLUE_AVERAGE:
                by_seed[result["seed"]].append(statistics.fmean(result["metrics"].values()))
        if by_seed:
            tasks = len(by_seed[result["seed"]])
            columns[f"GLUE average of {tasks}"] = [statistics.fmean(means) for means in by_seed.values()]
        rows.append({"model": model} | {name: mean_and_deviation(values) for name, values in columns.items()})
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)


def mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"
