"""What a run of hours needs around the method: processes, signals, checkpoints. Read distill.py first; it can be
followed without this file.

Processes: torchrun starts them and PyTorch's DistributedDataParallel averages their gradients; `gather` does the rest.
Checkpoints: a folder each, complete or not there. `state.safetensors` holds all tensors, `state.json` everything else,
`SHA256SUMS` (for sha256sum -c) tells whether they are still what was written. Nothing in them can execute code.
"""

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model import InputError, one_line, read_json

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # set by torchrun
CHECKPOINTS_KEPT = 2
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
FINISH_A_STEP = 15.0  # seconds that a step may go on after a signal

# ---- Processes and devices -----------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device that --device names; under torchrun each process of a machine takes its own GPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK if WORLD > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; "
                             f"{'start fewer processes' if WORLD > 1 else 'use --device cpu'}")
        torch.cuda.set_device(device)
    return device


def reuse_memory():
    """Have freed memory used again rather than given back to the system, which would have to clear every page of every
    large tensor anew: about a tenth of a step on the CPU. Set in glibc; other libraries go on as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def join_processes(device: torch.device, patience: datetime.timedelta = datetime.timedelta(minutes=10)):
    """Meet the other processes that torchrun started, if there are any, and wait for each of them at most so long. (One
    that dies is noticed at once.)"""
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)


def leave_processes():
    """End the connections that `join_processes` made, at the end of a run. PyTorch wants that done before Python ends;
    on a busy machine a process that left it undone has ended with SIGABRT."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value) -> list:
    """What every process has for `value`, in order of rank."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def check_agreement(step: int, keep: dict[str, torch.Tensor]):
    """All processes must cut the same units, or they would go on as different models. Raises InputError."""
    digest = hashlib.sha256()
    for units, kept in sorted(keep.items()):
        digest.update(units.encode() + kept.cpu().numpy().tobytes())
    if len(set(gather(digest.hexdigest()))) > 1:
        raise InputError(f"step {step}: the processes chose different units to cut; give all of them the same hardware "
                         "and versions")


@contextlib.contextmanager
def only_the_first_speaks():
    """Of several processes only the first prints."""
    if RANK == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def parallel(module: nn.Module, all_used: bool) -> nn.Module:
    """The module with its gradients averaged over the processes. After a cut it has to be called again: the buckets in
    which gradients travel belong to the old parameters. all_used: every parameter has a gradient in every step."""
    return DistributedDataParallel(module, find_unused_parameters=not all_used) if WORLD > 1 else module


def memory_mb(device) -> float:
    """Peak memory in MB: on the GPU that of tensors since the last call, else that of this process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def share_of(rows: int) -> tuple[int, int]:
    """First and last (exclusive) of `rows` rows that this process takes."""
    return rows * RANK // WORLD, rows * (RANK + 1) // WORLD


def total(values: dict[str, float]) -> dict[str, float]:
    """The sum over all processes of every value. Of few rows the last process has one (`share_of`) and so all names."""
    everyone = gather(values)
    return {name: sum(each.get(name, 0.0) for each in everyone) for name in everyone[-1]}


# ---- Signals -------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Interrupts:
    """`with Interrupts() as interrupts`: SIGTERM and Ctrl-C set `number`, so that the loop can finish its step and
    save; a second one ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.number, self.since = 0, float("inf")

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop."""
        self.number = max(gather(self.number))
        return self.number > 0

    def overdue(self) -> bool:
        """Whether a step takes too long to be waited for. Several processes finish it together."""
        return WORLD == 1 and time.monotonic() - self.since > FINISH_A_STEP

    def ask(self, number, frame):
        self.number, self.since = number, time.monotonic()
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)


# ---- Files ---------------------------------------------------------------------------------------------------


def flush(path: Path):
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(work: Path, folder: Path):
    """Give the finished folder `work` its name: after a loss of power it is there whole, or not at all."""
    for path in (*work.iterdir(), work):
        flush(path)
    work.rename(folder)
    flush(folder.parent)


@contextlib.contextmanager
def locked(folder: Path):
    """`with locked(folder)`: one process at a time; the lock ends with its owner, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_hash(folder: Path) -> str:
    """A hash over all that makes up a model: weights, shape and vocabulary."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin") or path.name in ("config.json", "vocab.txt", "tokenizer.json"):
            digest.update(f"{path.name} {file_hash(path)}".encode())
    return digest.hexdigest()[:16]


def program_commit() -> str | None:
    """The commit of this program, where it runs from a git checkout."""
    git = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"],
                         capture_output=True, text=True, check=False) if shutil.which("git") else None
    return git.stdout.strip() or None if git else None


# ---- The run folder ------------------------------------------------------------------------------------------


def check_output(output: Path, overwrite: bool):
    """Refuse a folder that has something in it, unless it is an old run and may be overwritten."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is not a folder")
    if output.is_dir() and any(path.name != "run.unfinished" for path in output.iterdir()):  # start_run was ended there
        if not overwrite:
            raise InputError(f"--output {output} is not empty: give another folder, or --overwrite to replace that run")
        if not (output / "run.json").is_file():
            raise InputError(f"--output {output} holds something that is not a run; nothing is overwritten there")
    parent = next(p for p in (output, *output.absolute().parents) if p.is_dir())
    if not os.access(parent, os.W_OK):
        raise InputError(f"--output {output}: {parent} is not writable")


def start_run(args: argparse.Namespace, traces: dict[str, str]):
    """Make the run folder, without what an old run left there, and write run.json: flags, versions, and the hashes of
    corpus and teacher, so that a result can be traced."""
    if RANK:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    student, work = args.output / "student", args.output / "student.unfinished"
    shutil.rmtree(work, ignore_errors=True)
    if student.is_dir():
        student.rename(work)  # all at once: what is left of a student would be taken for a finished one
    for old in (work, args.output / "checkpoints", *args.output.glob("student-*")):
        shutil.rmtree(old, ignore_errors=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    versions |= {"python": platform.python_version(), "commit": program_commit()}
    record = {"flags": vars(args), "seed": args.seed, "versions": versions, **traces, "processes": WORLD}
    record["checksum"] = record_hash(record)
    work = args.output / "run.unfinished"
    work.write_text(json.dumps(record, indent=2, default=str) + "\n")
    flush(work)
    work.replace(args.output / "run.json")


def record_hash(record: dict) -> str:
    """A hash over run.json but for the hash itself: a run must not go on with flags that a bad disk has changed."""
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def check_traces(output: Path, traces: dict[str, str]):
    """Refuse to resume with another teacher or another text than the run began with. Raises InputError."""
    record = read_json(output / "run.json")
    for name, value in traces.items():
        if record.get(name) != value:
            raise InputError(f"--resume: the {name} is not what it was when the run in {output} began; bring it back, "
                             "or start anew with --overwrite")


def truncate_log(path: Path, step: int):
    """Keep of log.jsonl what was written up to `step`: a resumed run must not tell the same step twice."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # torn by the end of the earlier process
    work = path.with_suffix(".unfinished")
    work.write_text("".join(kept))
    flush(work)
    work.replace(path)


# ---- Checkpoints ---------------------------------------------------------------------------------------------


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer, per_unit: dict[str, dict]) -> dict[str, torch.Tensor]:
    """A copy in host memory of all tensors of a run: parameters, Adam's moments, and vectors per unit by their name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {f"model.{name}": parameter for parameter, name in names.items()}
    tensors |= {f"adam.{key}.{names[parameter]}": value for parameter, state in optimizer.state.items()
                for key, value in state.items()}
    tensors |= {f"{name}.{units}": value for name, vectors in per_unit.items() for units, value in vectors.items()}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str, device=None) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `prefix`, by the rest of the name, on `device`."""
    return {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}


def restore_moments(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]):
    """Give a new optimizer the moments of a snapshot."""
    for name, parameter in module.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"adam.{key}.{name}")
            if value is not None:
                optimizer.state[parameter][key] = value.to(parameter.device)


class Checkpoints:
    """The checkpoints of one run, `folder/step-NUMBER`. A thread writes them while the training goes on."""

    def __init__(self, folder: Path):
        self.folder, self.thread, self.error = folder, None, None

    def save(self, step: int, tensors: dict[str, torch.Tensor], record: dict):
        """Write the state after `step` steps; the last two are kept. Raises what went wrong with the one before."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(step, tensors, record))
        self.thread.start()

    def wait(self):
        """Until all is written. Raises what went wrong, such as the OSError of a full disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def write(self, step: int, tensors: dict[str, torch.Tensor], record: dict):
        work = self.folder / "unfinished"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            (work / "state.safetensors").write_bytes(safetensors.torch.save(tensors))
            (work / "state.json").write_text(json.dumps({"step": step, **record}, indent=2) + "\n")
            sums = [f"{file_hash(work / name)}  {name}\n" for name in ("state.json", "state.safetensors")]
            (work / "SHA256SUMS").write_text("".join(sums))
            folder = self.folder / f"step-{step:07d}"
            shutil.rmtree(folder, ignore_errors=True)
            publish(work, folder)
            for old in self.found()[CHECKPOINTS_KEPT:]:
                shutil.rmtree(old)
        except Exception as error:  # told in the thread of the training, by wait()
            shutil.rmtree(work, ignore_errors=True)  # of a full disk
            self.error = error

    def found(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def newest(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Tensors and record of the newest checkpoint that is whole; None where there never was one. Raises InputError
        where all are damaged."""
        for folder in self.found():
            try:
                return read_checkpoint(folder)
            except InputError as error:
                print(f"{error}; trying the one before it")
        if self.found():
            raise InputError(f"no checkpoint in {self.folder} is whole; start anew with --overwrite")
        return None


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Raises InputError, naming the file that is damaged."""
    try:
        lines = (folder / "SHA256SUMS").read_text(errors="replace").splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines if "  " in line)
        for name in ("state.json", "state.safetensors"):
            if file_hash(folder / name) != sums.get(name):
                raise InputError(f"checkpoint {folder / name} is damaged: its checksum is another one")
        return safetensors.torch.load_file(folder / "state.safetensors"), read_json(folder / "state.json")
    except OSError as error:
        raise InputError(f"checkpoint {folder} is damaged: {one_line(error)}") from None
