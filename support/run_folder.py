"""The files of a run: run.json (its flags and where its inputs come from) and checkpoints."""

import argparse
import contextlib
import importlib.metadata
import io
import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from support.distributed import RANK, WORLD, all_gather_objects
from support.errors import InputError
from support.files import content_hash, locked, read_json, remove, write_atomically

CHECKPOINTS_KEPT = 2


def check_output(output: Path, overwrite: bool):
    """Refuse a folder that is in use, unless it is an old run that may be overwritten. Raises InputError."""
    in_use = output.exists() and (not output.is_dir() or any(p.name != "run.json.unfinished" for p in output.iterdir()))
    if in_use and not (overwrite and (output / "run.json").is_file()):
        raise InputError(f"--output {output} is in use: choose another folder, or use --overwrite if it holds a run")


@contextlib.contextmanager
def claimed(output: Path):
    """The run folder, created if there is none, for this run alone. Raises InputError if another one is there. All
    processes of a run must enter this together."""
    with contextlib.ExitStack() as stack:
        is_free = True
        if RANK == 0:
            output.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(output, wait=False))
            except BlockingIOError:
                is_free = False
        if not all_gather_objects(is_free)[0]:
            raise InputError(f"a run in --output {output} has not ended: stop it, or choose another folder")
        yield


def start_run(args: argparse.Namespace, fingerprints: dict[str, str]):
    """Remove what an old run left in the run folder, and write run.json: flags, versions, and the fingerprints of
    corpus and teacher, so that a result can be traced."""
    check_output(args.output, args.overwrite)  # again: another run may have ended there meanwhile
    student, work = args.output / "student", args.output / "student.unfinished"
    remove(work)
    if student.is_dir():
        student.rename(work)  # in one step: a partly deleted student could be taken for a finished one
    for old in (work, args.output / "checkpoints", args.output / "tensorboard"):
        remove(old)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    versions |= {"python": platform.python_version(), "commit": program_commit()}
    record = {"flags": vars(args), "versions": versions, **fingerprints, "processes": WORLD}
    record["checksum"] = record_hash(record)
    write_atomically(args.output / "run.json", json.dumps(record, indent=2, default=str) + "\n")


def record_hash(record: dict) -> str:
    return content_hash(json.dumps(record, sort_keys=True, default=str).encode())


def read_record(output: Path) -> dict:
    """The contents of run.json. Raises InputError if it is missing or its checksum is wrong."""
    if not (output / "run.json").exists():
        raise InputError(f"--output {output} holds no run")
    record = read_json(output / "run.json")
    if record.pop("checksum", None) != record_hash(record):
        raise InputError(f"{output / 'run.json'} is damaged (wrong checksum); start again with --overwrite")
    return record


def program_commit() -> str | None:
    """The git commit of this program, if it runs from a checkout."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# ---- Checkpoints ---------------------------------------------------------------------------------------------
# One file each, `step-NUMBER-HASH.pt`: a dictionary of tensors and plain values. The hash shows whether it is intact.


def save_checkpoint(folder: Path, values: dict):
    """Write the state after `values["step"]` steps; the last two checkpoints are kept."""
    folder.mkdir(exist_ok=True)
    content = io.BytesIO()
    torch.save(values, content)
    content = content.getbuffer()
    write_atomically(folder / f"step-{values['step']:010d}-{content_hash(content)}.pt", content)
    kept = sorted(folder.glob("step-*.pt"))[-CHECKPOINTS_KEPT:]
    for old in folder.iterdir():
        if old not in kept:
            old.unlink()


def load_newest(folder: Path, device: torch.device | str = "cpu") -> dict | None:
    """The newest intact checkpoint with its tensors on `device`, or None if there never was one. Nothing in it can
    execute code. Raises InputError if all are damaged."""
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    for path in paths:
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if path.stem.endswith(content_hash(content)):
                return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        print(f"checkpoint {path} is damaged or cannot be read; trying the one before it")
    if paths:
        raise InputError(f"no checkpoint in {folder} is intact; start again with --overwrite")
    return None
