"""The files of a run: run.json (its flags and where its inputs come from), log.jsonl, and checkpoints."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from support.distributed import RANK, WORLD
from support.errors import InputError, one_line
from support.files import fsync, read_json, write_atomically

CHECKPOINTS_KEPT = 2

def check_output(output: Path, overwrite: bool):
    """Refuse a folder that is in use, unless it is an old run that may be overwritten. Raises InputError."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is not a folder")
    if output.is_dir() and any(path.name != "run.json.unfinished" for path in output.iterdir()):
        if not overwrite:
            raise InputError(f"--output {output} is not empty: use another folder, or --overwrite to replace that run")
        if not (output / "run.json").is_file():
            raise InputError(f"--output {output} contains something that is not a run, which is never overwritten")
    parent = next(p for p in (output, *output.absolute().parents) if p.is_dir())
    if not os.access(parent, os.W_OK):
        raise InputError(f"--output {output}: {parent} is not writable")


def start_run(args: argparse.Namespace, fingerprints: dict[str, str]):
    """Create the run folder, remove what an old run left in it, and write run.json: flags, versions, and the
    fingerprints of corpus and teacher, so that a result can be traced."""
    if RANK:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    student, work = args.output / "student", args.output / "student.unfinished"
    shutil.rmtree(work, ignore_errors=True)
    if student.is_dir():
        student.rename(work)  # in one step: a partly deleted student could be taken for a finished one
    for old in (work, args.output / "checkpoints"):
        shutil.rmtree(old, ignore_errors=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    versions |= {"python": platform.python_version(), "commit": program_commit()}
    record = {"flags": vars(args), "seed": args.seed, "versions": versions, **fingerprints, "processes": WORLD}
    record["checksum"] = record_hash(record)
    write_atomically(args.output / "run.json", json.dumps(record, indent=2, default=str) + "\n")


def record_hash(record: dict) -> str:
    """A hash of run.json without the hash itself, so that a run never resumes with flags a bad disk has changed."""
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def check_fingerprints(output: Path, fingerprints: dict[str, str]):
    """Refuse to resume with another teacher or another text than the run started with. Raises InputError."""
    record = read_json(output / "run.json")
    for name, value in fingerprints.items():
        if record.get(name) != value:
            raise InputError(f"--resume: the {name} has changed since the run in {output} started; restore it, or "
                             "start again with --overwrite")


def program_commit() -> str | None:
    """The git commit of this program, if it runs from a checkout."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def truncate_log(path: Path, step: int):
    """Drop from log.jsonl everything after `step`, so that a resumed run logs no step twice."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # cut off when the earlier process ended
    write_atomically(path, "".join(kept))


def state_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, per_unit: dict[str, dict]):
    """A copy in host memory of all tensors of a run: parameters, Adam moments, and vectors per unit by their name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {f"model.{name}": parameter for parameter, name in names.items()}
    tensors |= {f"adam.{key}.{names[parameter]}": value for parameter, state in optimizer.state.items()
                for key, value in state.items()}
    tensors |= {f"{name}.{group}": value for name, vectors in per_unit.items() for group, value in vectors.items()}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str, device) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, by the rest of the name, on `device`."""
    return {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}


def restore_moments(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]):
    """Give an optimizer the moments of a checkpoint."""
    for name, parameter in module.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"adam.{key}.{name}")
            if value is not None:
                optimizer.state[parameter][key] = value.to(parameter.device)


class Checkpoints:
    """The checkpoints of one run: `folder/step-NUMBER-HASH.safetensors`. A thread writes them while training continues.

    The file holds all tensors and, in its metadata, the rest as JSON; the hash in its name shows whether it is intact.
    Nothing in it can execute code.
    """

    def __init__(self, folder: Path):
        self.folder, self.thread, self.error = folder, None, None

    def save(self, step: int, tensors: dict[str, torch.Tensor], record: dict):
        """Write the state after `step` steps; the last two are kept. Raises the error of the previous write, if any."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(step, tensors, {"step": step, **record}))
        self.thread.start()

    def wait(self):
        """Wait until everything is written. Raises what went wrong, such as the OSError of a full disk."""
        if self.thread is not None:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error is not None:
            raise error

    def write(self, step: int, tensors: dict[str, torch.Tensor], record: dict):
        work = self.folder / "unfinished"
        try:
            self.folder.mkdir(exist_ok=True)
            content = safetensors.torch.save(tensors, metadata={"record": json.dumps(record)})
            work.write_bytes(content)
            fsync(work)
            work.rename(self.folder / f"step-{step:07d}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors")
            fsync(self.folder)
            for old in self.newest_first()[CHECKPOINTS_KEPT:]:
                old.unlink()
        except Exception as error:  # raised in the training thread by wait()
            work.unlink(missing_ok=True)  # makes room on a full disk
            self.error = error

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def load_newest(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Tensors and record of the newest intact checkpoint, or None if there never was one. Raises InputError if all
        are damaged."""
        for path in self.newest_first():
            try:
                return read_checkpoint(path)
            except InputError as error:
                print(f"{error}; trying the one before it")
        if self.newest_first():
            raise InputError(f"no checkpoint in {self.folder} is intact; start again with --overwrite")
        return None


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and record of one checkpoint. Raises InputError if it is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {one_line(error)}") from None
    if not path.stem.endswith(hashlib.sha256(content).hexdigest()[:16]):
        raise InputError(f"checkpoint {path} is damaged (wrong checksum)")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return safetensors.torch.load(content), json.loads(header["__metadata__"]["record"])
