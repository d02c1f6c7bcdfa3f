"""The results of finetune.py: results.json, OUTPUT/MODEL/TASK-seedN with each fine-tuned model, and the table.

Several processes, and several calls, may add results to the same output folder at the same time.
"""

import contextlib
import hashlib
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.errors import InputError, one_line
from support.files import atomic_rename, locked, write_atomically
from support.glue import GLUE_AVERAGE, TASKS

LONGEST_NAME = 60  # characters of a model in a folder name, which is limited to 255 bytes; a character has up to 4


class Job(NamedTuple):
    """What identifies a result."""

    model: str
    task: str
    seed: int


def job_of(entry: dict) -> Job:
    return Job(entry["model"], entry["task"], entry["seed"])


def read_results(output: Path) -> list[dict]:
    """The entries of results.json; none if the output folder is new. Raises InputError."""
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


def update_results(output: Path, remove: list[Job] = (), add: list[dict] = ()):
    """Remove and add entries of results.json, which is created if necessary and replaced atomically."""
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        kept = [entry for entry in read_results(output) if job_of(entry) not in remove]
        write_atomically(output / "results.json", json.dumps([*kept, *add], indent=1))


def finished_results(output: Path, settings: dict[Job, dict], overwrite: bool) -> dict[Job, dict]:
    """The entries of those jobs in `settings` that are finished: none if `overwrite`, and only those with a folder.

    Raises InputError if a job was finished with other settings.
    """
    finished = {}
    for entry in read_results(output):
        exists = output.joinpath(*Path(entry["folder"]).parts[-2:]).is_dir()
        if exists and not overwrite and job_of(entry) in settings:
            finished[job_of(entry)] = entry
    for job, entry in finished.items():
        for name, value in settings[job].items():
            before = entry["settings"].get(name)
            if before != value:
                raise InputError(f"{output}: {job.task} seed {job.seed} of {job.model} was made with {name} {before}, "
                                 f"now {value}; use --overwrite or another --output")
    return finished


def result_folder(output: Path, job: Job, models: set[str]) -> Path:
    """OUTPUT/MODEL/TASK-seedN. A hash tells apart long names and those that look like another of the `models`."""
    names = {model: re.sub(r"[^\w.-]+", "-", model).strip(".-") or "model" for model in {job.model, *models}}
    name = names.pop(job.model)
    if name in names.values() or len(name) > LONGEST_NAME:
        name = f"{name[-LONGEST_NAME:]}-{hashlib.sha256(job.model.encode()).hexdigest()[:8]}"
    return output / name / f"{job.task}-seed{job.seed}"


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """`with replace_folder(folder) as work`: write into `work`, which replaces `folder` once it is complete.

    If the block raises, `work` is removed and `folder` stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        shutil.rmtree(folder, ignore_errors=True)
        atomic_rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def describe(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in metrics.items())


def results_table(entries: list[dict], models: list[str], keys: list[str]) -> str:
    """A row for every model, a column for every metric of every task: mean and standard deviation over the seeds.

    The last column is the GLUE average: the mean over the tasks of the mean of each task's metrics.
    """
    def cell(values):
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{deviation}" if values else "-"

    averaged = [key for key in keys if key in GLUE_AVERAGE]
    columns = [(key, name + suffix) for key in keys for suffix in TASKS[key].suffixes for name in TASKS[key].metrics]
    table = [["model"] + [f"{TASKS[key].title} {name}" for key, name in columns]
             + [f"GLUE average of {len(averaged)}"] * bool(averaged)]
    for model in models:
        metrics = {(e["task"], e["seed"]): e["metrics"] for e in entries if e["model"] == model}
        seeds = sorted({seed for _, seed in metrics})
        row = [model] + [cell([metrics[key, seed][name] for seed in seeds if (key, seed) in metrics])
                         for key, name in columns]
        if averaged:
            row.append(cell([statistics.fmean(statistics.fmean(metrics[key, seed].values()) for key in averaged)
                             for seed in seeds if all((key, seed) in metrics for key in averaged)]))
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)
