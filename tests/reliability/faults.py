"""Faults injected into real runs: what a machine, a disk, a network or a damaged file can do to a long run.

    python tests/reliability/faults.py                          the long form (make test-faults), minutes
    python tests/reliability/faults.py --short                  a few trials of each fault, for test_faults.py
    python tests/reliability/faults.py --only kill --count 50

Each fault is a generator of trials: (what was tried, what was lost), where "" means that nothing was. A run that was
disturbed and then resumed has lost nothing if it ends bit for bit where the undisturbed one does. Bad input has done no
harm if it ends in a clean run, or in a one-line error and exit code 2.

Every run is a real process, forked from this one, which has imported torch but has started no thread.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.server
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "reliability")]

import fake_hub  # noqa: E402
import hypothesis  # noqa: E402
import hypothesis.strategies as st  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from conftest import VOCAB, sentences  # noqa: E402
from made_up_tasks import write_glue  # noqa: E402

import distill  # noqa: E402
import prune  # noqa: E402
from model import Bert, BertConfig  # noqa: E402
from support import corpus, run_folder  # noqa: E402
from support.checkpoint import load_model, save_model, save_tokenizer, wordpiece_tokenizer  # noqa: E402
from support.errors import InputError, one_line  # noqa: E402
from support.files import model_fingerprint  # noqa: E402
from support.flags import DATA_FLAGS, EVALUATION_FLAGS, RUN_FLAGS  # noqa: E402
from support.session import Session  # noqa: E402
from support.shapes import target_shape  # noqa: E402

Trials = Iterator[tuple[str, str]]
PHASES = {  # where a disturbance happens -> the function that it interrupts
    "anywhere": (distill, "run"), "tokenisation": (corpus, "write_tokens"), "start": (run_folder, "start_run"),
    "training": (distill.Distiller, "forward"), "prune": (prune, "prune_units"),
    "checkpoint": (run_folder, "save_checkpoint"), "export": (Session, "export")}
PROJECT = ("data", "distill", "extensions", "finetune", "model", "prune", "support")
STEPS = 12
TOKENISE_AT_ONCE = corpus.TOKENISE_AT_ONCE
TIMEOUT = 300  # seconds after which a process counts as hanging

# ---- Processes -----------------------------------------------------------------------------------------------


class Process:
    """`work()` in a forked process. Attribute `id` is that of the process."""

    def __init__(self, work: Callable[[], int]):
        sys.stdout.flush()
        self.read, write = os.pipe()  # not a file, because the disk of the other process may be full
        self.id = os.fork()
        if not self.id:
            code = 1
            try:
                signal.alarm(TIMEOUT)
                os.dup2(write, 1)
                os.dup2(write, 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
                code = work()
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)

    def end(self) -> tuple[int, str]:
        """Wait for its end: the exit code (negative: the signal that ended it) and what it printed."""
        with open(self.read, errors="replace") as stream:
            output = stream.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1]), output


def process(work: Callable[[], int], meanwhile: Callable[[int], None] = lambda number: None) -> tuple[int, str]:
    """Run `work()` in a forked process to its end. meanwhile: called in this process with the id of the other one."""
    child = Process(work)
    meanwhile(child.id)
    return child.end()


def processes(count: int, program: str, argv: list, kill_after: float | None = None) -> tuple[int, str]:
    """Run program.main(argv) in `count` processes, as torchrun does, and kill all of them after `kill_after` seconds.
    Returns the worst exit code, and what the first process printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
            del sys.modules[name]  # the project reads these variables when it is imported
        return importlib.import_module(program).main([*map(str, argv)])

    children = [Process(lambda rank=rank: work(rank)) for rank in range(count)]
    if kill_after is not None:
        time.sleep(kill_after)
        for child in children:
            os.kill(child.id, signal.SIGKILL)
    ends = [child.end() for child in children]
    return max((code for code, _ in ends), key=abs), ends[0][1]


def disturb(phase: str, number: int, before: Callable[[], None], after: Callable[[], None] = lambda: None):
    """From now on in this process, call before() when the function of `phase` starts for the `number`-th time, and
    after() when it ends."""
    owner, name = PHASES[phase]
    real, calls = getattr(owner, name), itertools.count(1)

    def disturbed(*arguments, **named):
        chosen = next(calls) == number
        if chosen:
            before()
        try:
            return real(*arguments, **named)
        finally:
            if chosen:
                after()

    setattr(owner, name, disturbed)


def unclean(code: int, printed: str) -> str:
    """What is wrong with the end of a process that should succeed or print a one-line error; "" if nothing is."""
    errors = [line for line in printed.splitlines() if line.startswith("distill.py:")]
    if code == 0 and not errors:
        return ""
    if code != 2 or len(errors) != 1 or printed.splitlines()[-1:] != errors or "Traceback" in printed:
        return f"exit code {code}, {'hung, ' * (code == -signal.SIGALRM)}{printed.strip()[-300:]!r}"
    return ""


# ---- A small run ---------------------------------------------------------------------------------------------


class Small:
    """A tiny teacher, a small text, the flags of a run of seconds, and the end of that run if nothing disturbs it."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, itertools.count()
        self.teacher, self.corpus = folder / "teacher", folder / "text.txt"
        self.teacher.mkdir()
        torch.manual_seed(0)
        bert = Bert(BertConfig(vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                               intermediate_size=64, max_position_embeddings=64, initializer_range=0.2))
        save_model(bert, self.teacher)
        self.tokenizer = wordpiece_tokenizer(VOCAB)
        save_tokenizer(self.tokenizer, self.teacher, 64)
        self.corpus.write_text("\n\n".join(" ".join(sentences(i, 3 + i % 5)) for i in range(120)) + "\n")
        self.flags = [
            "--target-width", "16", "--batch-size", "6", "--seq-length", "16", "--granularity", "2", "--log-every", "1",
            "--learning-rate", "1e-3", "--device", "cpu", "--eval-rows", "5", "--dropout", "0.1"]
        self.undisturbed = self.new()
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            # In this process, so that the others need not repeat what torch imports at its first use.
            assert distill.main(self.command(self.undisturbed)) == 0
        self.times = self.measure_phases()

    def measure_phases(self) -> dict[str, list[float]]:
        """How many seconds each call of the function of each phase takes. The run must end as the undisturbed one."""
        output, path = self.new(), self.folder / "times"

        def measured() -> int:
            times: dict[str, list[float]] = {}
            for phase, (owner, name) in PHASES.items():
                real, seconds = getattr(owner, name), times.setdefault(phase, [])

                def timed(*arguments, real=real, seconds=seconds, **named):
                    start = time.monotonic()
                    try:
                        return real(*arguments, **named)
                    finally:
                        seconds.append(time.monotonic() - start)

                setattr(owner, name, timed)
            code = distill.main(self.command(output))
            path.write_text(json.dumps(times))
            return code

        lost = self.lost(output, *process(measured))
        assert not lost, lost
        return json.loads(path.read_text())

    def new(self) -> Path:
        """A folder for a run, which does not exist yet."""
        return self.folder / f"run-{next(self.runs)}"

    def command(self, output: Path, *more, steps: int = STEPS, teacher: str | Path | None = None) -> list[str]:
        """The flags of a run that saves after every step and has a cache of its own."""
        return ["--teacher", str(teacher or self.teacher), "--corpus", str(self.corpus), *self.flags, "--steps",
                str(steps), "--save-minutes", "0", "--cache-dir", f"{output}.cache", "--output", str(output),
                *map(str, more)]

    def distill(self, output: Path, *more, **other) -> tuple[int, str]:
        return process(lambda: distill.main(self.command(output, *more, **other)))

    def resume(self, output: Path) -> tuple[int, str]:
        return process(lambda: distill.main(["--resume", "--output", str(output)]))

    def rerun(self, output: Path) -> tuple[int, str]:
        """What a user does when the cause is gone: --resume, or the same command if there is no run yet."""
        return self.resume(output) if (output / "run.json").exists() else self.distill(output)

    def lost(self, output: Path, code: int, printed: str, log: bool = True) -> str:
        """How the end of a resumed run differs from the undisturbed one; "" if it does not, and then it is deleted."""
        if code:
            return f"does not continue: exit code {code}, {printed.strip()[-300:]!r}"
        for path in (self.undisturbed / "student").iterdir():
            other = output / "student" / path.name
            timed = path.name == "README.md"  # its table has the milliseconds per row
            if not other.is_file() or not timed and other.read_bytes() != path.read_bytes():
                return f"student/{path.name} differs"
        if log and history(output) != history(self.undisturbed):
            return "log.jsonl differs"
        self.delete(output)
        return ""

    def delete(self, output: Path):
        for path in (output, Path(f"{output}.cache")):
            shutil.rmtree(path, ignore_errors=True)


def history(output: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "memory_mb", "milliseconds")}
            for line in (output / "log.jsonl").read_text().splitlines()]


# ---- 1. The process is killed --------------------------------------------------------------------------------


def kill(small: Small, rng: random.Random, count: int) -> Trials:
    """SIGKILL at random moments of every phase; then the run is resumed."""
    for _, phase in zip(range(count), itertools.cycle(PHASES), strict=False):
        output, number = small.new(), rng.randint(1, len(small.times[phase]))
        delay = rng.uniform(0, small.times[phase][number - 1])
        started, start = os.pipe()
        overwrite = ["--overwrite"] if phase == "start" else []
        if overwrite:  # of a finished run, which afterwards may exist completely or not at all
            shutil.copytree(small.undisturbed, output)

        def disturbed(output=output, phase=phase, number=number, start=start, overwrite=overwrite) -> int:
            disturb(phase, number, lambda: os.write(start, b"."), lambda: os.write(start, b"!"))
            return distill.main(small.command(output, *overwrite))

        def kill_it(child: int, started=started, start=start, delay=delay):
            os.close(start)
            os.read(started, 1)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)

        code, printed = process(disturbed, kill_it)
        inside = not os.read(started, 1)  # the phase did not end
        os.close(started)
        lost = "" if code in (0, -signal.SIGKILL) else f"exit code {code}, {printed[-300:]!r}"
        yield f"{phase} {number}{'' if inside else ', just after'}", lost or small.lost(output, *small.rerun(output))


def kill_processes(small: Small, rng: random.Random, count: int) -> Trials:
    """SIGKILL of both processes of a distillation at a random moment; then it is resumed with both."""
    undisturbed = small.new()
    start = time.monotonic()
    code, printed = processes(2, "distill", small.command(undisturbed))
    duration = time.monotonic() - start
    assert code == 0, printed

    def end(output: Path):
        return (output / "student" / "model.safetensors").read_bytes(), history(output)

    for _ in range(count):
        output, seconds = small.new(), rng.uniform(0, duration)
        code, printed = processes(2, "distill", small.command(output), kill_after=seconds)
        lost = "" if code in (0, -signal.SIGKILL) else f"exit code {code}, {printed[-300:]!r}"
        rerun = ["--resume", "--output", output] if (output / "run.json").exists() else small.command(output)
        code, printed = processes(2, "distill", rerun)
        if not lost and code:
            lost = f"does not continue: exit code {code}, {printed[-300:]!r}"
        yield f"after {seconds:.2f} s", lost or "ends differently" * (end(output) != end(undisturbed))
        small.delete(output)


def kill_fine_tuning(small: Small, rng: random.Random, count: int) -> Trials:
    """SIGKILL of a fine-tuning, in one process or both of two, at a random moment; then the command is run again."""
    data = write_glue("rte", small.folder / "RTE", train=12, dev=12)

    def command(output: Path) -> list:
        return ["--model", small.teacher, "--task", "rte", "--data", data, "--seeds", "0", "1", "2", "--max-steps", "4",
                "--device", "cpu", "--output", output]

    def end(output: Path, printed: str):
        """The fine-tuned weights, and the table."""
        weights = {path.relative_to(output): path.read_bytes() for path in output.rglob("model.safetensors")}
        return weights, [line for line in printed.splitlines() if line.startswith("|")]

    expected, durations = {}, {}
    for number in (1, 2):
        output, start = small.new(), time.monotonic()
        code, printed = processes(number, "finetune", command(output))
        assert code == 0 and printed.count("|"), printed
        expected[number], durations[number] = end(output, printed), time.monotonic() - start
    for _, number in zip(range(count), itertools.cycle((1, 2)), strict=False):
        output, seconds = small.new(), rng.uniform(0, durations[number])
        code, printed = processes(number, "finetune", command(output), kill_after=seconds)
        lost = "" if code in (0, -signal.SIGKILL) else f"exit code {code}, {printed[-300:]!r}"
        code, printed = processes(number, "finetune", command(output))
        if not lost and code:
            lost = f"does not continue: exit code {code}, {printed[-300:]!r}"
        yield f"{number} after {seconds:.2f} s", lost or "ends differently" * (end(output, printed) != expected[number])
        small.delete(output)


# ---- 2. The disk is full -------------------------------------------------------------------------------------


def disk_full(small: Small, rng: random.Random, count: int) -> Trials:
    """From a random moment of a phase on, no file can grow beyond a random size: writes are short, then fail, as on a
    full disk. That gives a one-line error; when there is space again, the run is resumed."""
    student = small.undisturbed / "student" / "model.safetensors"
    largest = {"tokenisation": 3000, "start": 1000, "checkpoint": 3 * student.stat().st_size,
               "export": student.stat().st_size}
    for _, phase in zip(range(count), itertools.cycle([*largest, "logging"]), strict=False):
        output, function = small.new(), "training" if phase == "logging" else phase
        number = rng.randint(1, len(small.times[function]))

        def fill(output=output, phase=phase) -> None:
            size = (output / "log.jsonl").stat().st_size + rng.randrange(100) if phase == "logging" else (
                rng.randrange(largest[phase]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # Python ignores the signal: it is an OSError

        def disturbed(output=output, function=function, number=number, fill=fill) -> int:
            disturb(function, number, fill)
            return distill.main(small.command(output))

        code, printed = process(disturbed)
        lost = unclean(code, printed)
        if not lost and (code != 2 or "File too large" not in printed):
            lost = f"the full disk was not reported: exit code {code}, {printed[-300:]!r}"
        for checkpoint in (output / "checkpoints").glob("step-*.pt"):  # all that are there are intact
            assert checkpoint.stem.endswith(hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16])
        yield f"{phase} {number}", lost or small.lost(output, *small.rerun(output))
    for _ in range(count // 10):
        yield from tmpfs_full(small, rng)


def tmpfs_full(small: Small, rng: random.Random) -> Trials:
    """A disk that is really full: a tmpfs of random size for cache and run, if this user may mount one."""
    output, size = small.new() / "run", rng.randrange(8, 700)
    output.parent.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", output.parent], capture_output=True)
    if mount.returncode:
        return
    try:
        lost = unclean(*small.distill(output))
        subprocess.run(["mount", "-o", "remount,size=100m", output.parent], check=True)
        yield f"tmpfs of {size} kB", lost or small.lost(output, *small.rerun(output))
    finally:
        subprocess.run(["umount", output.parent], check=True)


# ---- 3. Files are damaged or malicious -----------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> str:
    """Truncate a file or flip bits in it; in run.json mostly change one digit of a flag. Returns what was done."""
    content = bytearray(path.read_bytes())
    if path.name == "run.json" and rng.random() < 0.7:
        position = rng.choice([found.start() for found in re.finditer(rb"\d(?=,\n)", content)])
        content[position] ^= 1  # still a digit
        path.write_bytes(content)
        return f"run.json, another digit at {position}"
    if rng.random() < 0.3:
        size = rng.randrange(len(content))
        path.write_bytes(content[:size])
        return f"{path.name} truncated to {size}"
    end = min(len(content), rng.choice((300, 3000, len(content))))  # most of what can go wrong is at the beginning
    positions = [rng.randrange(end) for _ in range(rng.choice((1, 1, 3)))]
    for position in positions:
        content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name}, bits flipped at {positions}"


def damaged_run(small: Small, rng: random.Random, count: int) -> Trials:
    """Every file of an interrupted run, damaged at random: the run resumes from an older checkpoint and ends where the
    undisturbed one does, or it is refused and the file is named."""
    interrupted = small.new()

    def stopped() -> int:
        disturb("training", 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return distill.main(small.command(interrupted))

    code, printed = process(stopped)
    assert code == 128 + signal.SIGTERM, printed
    files = sorted(p.relative_to(interrupted) for p in interrupted.rglob("*") if p.is_file())
    newest = max(p.name for p in (interrupted / "checkpoints").iterdir())
    for _, file in zip(range(count), itertools.cycle(files), strict=False):
        output = small.new()
        shutil.copytree(interrupted, output)
        what = damage(output / file, rng)
        code, printed = small.resume(output)
        lost = unclean(code, printed)
        if not lost and code == 0:
            lost = small.lost(output, code, printed, log=file.name != "log.jsonl")
            if not lost and newest == file.name and (output / file).exists() and "damaged" not in printed:
                lost = "the damage was not reported"
        elif not lost and file.name not in printed:
            lost = f"{file} is not named: {printed[-300:]!r}"
        small.delete(output)
        yield f"{file.parent}/{what}", lost


def damaged_teacher(small: Small, rng: random.Random, count: int) -> Trials:
    """Every file of a teacher, damaged at random: a clean run or a one-line error. (The format has no checksum, so a
    bit flipped in a tensor cannot be seen; but --resume must notice it.)"""
    fingerprint = model_fingerprint(small.teacher)
    files = sorted(path.name for path in small.teacher.iterdir())
    for _, file in zip(range(count), itertools.cycle(files), strict=False):
        folder, output = small.new(), small.new()
        shutil.copytree(small.teacher, folder)
        if file in ("vocab.txt", "tokenizer_config.json"):
            (folder / "tokenizer.json").unlink()  # which would be used instead of them
        what = damage(folder / file, rng)
        lost = unclean(*small.distill(output, teacher=folder, steps=2))
        if not lost and file != "tokenizer_config.json" and model_fingerprint(folder) == fingerprint:
            lost = "--resume would not notice"
        small.delete(output)
        small.delete(folder)
        yield what, lost


def safetensors_file(header: bytes | dict, body: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def tensor(first: int, last: int, shape=(1,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


MALICIOUS_WEIGHTS = {
    "nothing": b"", "half a length": b"\x10\0\0", "no header": struct.pack("<Q", 0),
    "a header of 2^63 bytes": safetensors_file({}, length=1 << 63),
    "a header of 2^64 - 1 bytes": safetensors_file({}, length=(1 << 64) - 1),
    "a header longer than the file": safetensors_file({}, length=1000),
    "a missing header of 99 MB": safetensors_file({}, length=99_000_000),
    "a header that is not UTF-8": safetensors_file(b'{"\xff": 1}'),
    "a header that is a list": safetensors_file(b"[1, 2]"),
    "a deep header": safetensors_file(b'{"a":' * 100_000),
    "overlapping tensors": safetensors_file({"a": tensor(0, 4), "b": tensor(2, 6), "c": tensor(4, 8)}),
    "offsets beyond the end": safetensors_file({"a": tensor(0, 4000, (1000,))}),
    "offsets in the wrong order": safetensors_file({"a": tensor(8, 0)}),
    "negative offsets": safetensors_file({"a": tensor(-4, 0)}),
    "huge offsets": safetensors_file({"a": tensor(2**63, 2**63 + 4)}),
    "offsets that are not numbers": safetensors_file({"a": tensor("0", None)}),
    "a hole": safetensors_file({"a": tensor(0, 4), "b": tensor(6, 8, dtype="F16")}),
    "a shape whose product overflows": safetensors_file({"a": tensor(0, 8, (2**40, 2**40))}),
    "a shape that does not fit the data": safetensors_file({"a": tensor(0, 8, (3,))}),
    "a shape that is not one": safetensors_file({"a": tensor(0, 8, ("x",))}),
    "an unknown dtype": safetensors_file({"a": tensor(0, 8, (2,), "F33")}),
    "one name twice": safetensors_file(
        f'{{"a": {json.dumps(tensor(0, 4))}, "a": {json.dumps(tensor(4, 8))}}}'.encode()),
    "no tensors": safetensors_file({}, b""),
    "data that belongs to no tensor": safetensors_file({"a": tensor(0, 4)}, b"\0" * 4000),
}
MALICIOUS_JSON = {
    "nothing": "", "a number": "3", "a list": "[]", "null": "null", "NaN": "NaN", "deep nesting": "[" * 200_000,
    "deep objects": '{"a":' * 200_000, "a huge number": '{"vocab_size": ' + "9" * 10_000 + "}",
    "an infinite number": '{"vocab_size": 1e999, "layer_norm_eps": Infinity}', "half a pair": '"\\ud800"',
    "not UTF-8": b"\xff\xfe{}", "NUL": "\0", "wrong types": '{"vocab_size": [], "model": 3}',
    "numbers as keys": "{1: 2}", "an unpaired surrogate as a key": '{"\\ud800": 1}',
}


def malicious_files(small: Small, rng: random.Random, count: int) -> Trials:
    """Model files that are made to do damage. `count` of them, or all."""
    cases = [("model.safetensors", name, content) for name, content in MALICIOUS_WEIGHTS.items()]
    cases += [(file, name, content) for file in ("config.json", "tokenizer.json", "tokenizer_config.json")
              for name, content in MALICIOUS_JSON.items()]
    cases += [("config.json", f"{key} = {value!r:.20}", json.dumps(
        json.loads((small.teacher / "config.json").read_text()) | {key: value}))
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "attention_head_size", "hidden_act")
        for value in (math.nan, math.inf, -1, 0, 2**31, 10**30, "12", [3], {}, True, 1.5)]
    for file, name, content in rng.sample(cases, min(count, len(cases))):
        folder, output = small.new(), small.new()
        shutil.copytree(small.teacher, folder)
        if file == "tokenizer_config.json":
            (folder / "tokenizer.json").unlink()
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        code, printed = small.distill(output, teacher=folder, steps=1)
        lost = unclean(code, printed)
        if not lost and code == 0 and file == "model.safetensors":
            lost = "was loaded as a model"
        small.delete(folder)
        small.delete(output)
        yield f"{file}: {name}", lost
    # Links as such must work: every file in the hub's cache is one.
    folder, output = small.new(), small.new()
    folder.mkdir()
    for path in small.teacher.iterdir():
        (folder / path.name).symlink_to(path)
    yield "links to files elsewhere", small.lost(output, *small.distill(output, teacher=folder))


# ---- 4. Any input --------------------------------------------------------------------------------------------


def clean(work: Callable[[], object]):
    """`work()` returns, or raises an InputError of one line. In this process, because there are thousands of calls."""
    try:
        return work()
    except InputError as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1, message
        message.encode(errors="backslashreplace")


def examples(what: str, strategy: st.SearchStrategy, check: Callable, rng: random.Random, count: int) -> Trials:
    """`count` examples of a hypothesis strategy; the smallest that fails is reported."""
    tried = []

    @hypothesis.seed(rng.randrange(2**32))
    @hypothesis.settings(max_examples=count, database=None, deadline=None, print_blob=False,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategy)
    def holds(value):
        tried[:] = tried[:count] + [value]
        check(value)

    lost = ""
    try:
        holds()
    except Exception as error:
        lost = f"{tried[-1]!r:.500}: {one_line(error)}"
    for number, _ in enumerate(tried[:count], 1):
        yield f"{what} {number}", lost if number == len(tried[:count]) else ""


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) |
                    st.sampled_from((1, 2, 4, 64)), nested, max_leaves=5)


def any_config(small: Small, rng: random.Random, count: int) -> Trials:
    """config.json with any values in some fields: a model that computes, or a one-line error."""
    folder = small.new()
    shutil.copytree(small.teacher, folder)
    config = json.loads((folder / "config.json").read_text())

    def computes(changes: dict):
        (folder / "config.json").write_text(json.dumps(config | changes))
        bert = clean(lambda: load_model(folder))
        if bert is not None:
            assert bert.eval()(torch.tensor([[1, 2, 3]]), torch.tensor([1])).logits.shape == (1, len(VOCAB))
            clean(lambda: target_shape(bert.config, 16))

    yield from examples("config.json", st.dictionaries(st.sampled_from(sorted(config)), JSON, min_size=1, max_size=3),
                        computes, rng, count)


FLAGS = (*distill.METHOD_FLAGS, *DATA_FLAGS, *RUN_FLAGS, *EVALUATION_FLAGS)
SWITCHES = {flag.name for flag in FLAGS if flag.kind is bool}
ODD_VALUES = (
    "", "0", "-1", "1", "2", "7", "16", "0.5", "1e9", "1e-9", "nan", "inf", "1e999", "99999999999999999999", "x", "--",
    "-", "=", "ä", "\udcff", "~", "a b", "cuda:99", "meta", "auto", "cpu", "bf16", "random", "imitation", "/dev/null")


def any_flags(small: Small, rng: random.Random, count: int) -> Trials:
    """Flags with valid and invalid values: a clean run of two steps, or a one-line error."""
    names = [flag.name for flag in FLAGS if flag.name not in ("--output", "--steps", "--cache-dir", "--save-minutes")]
    flags = st.lists(st.tuples(st.sampled_from(names), st.sampled_from(ODD_VALUES) | st.integers(0, 40).map(str) |
                               st.floats(0, 2).map(str)), max_size=4, unique_by=lambda pair: pair[0])
    cache = small.new()

    def ends_cleanly(example: tuple[str, list[tuple[str, str]]]):
        output, pairs = Path(f"{small.new()}{example[0]}"), example[1]
        more = [word for flag, value in pairs for word in ((flag,) if flag in SWITCHES else (flag, value))]
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out, contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(out):
            code = distill.main(small.command(output, "--cache-dir", cache, *more, steps=2))
            out.seek(0)
            printed = out.read()
        assert not unclean(code, printed), unclean(code, printed)
        assert code == 0 or not (output / "student").exists()
        small.delete(output)

    outputs = st.sampled_from(("", "", "ä b", "\udcff"))  # the last is how Python spells a byte that is not UTF-8
    yield from examples("flags", st.tuples(outputs, flags), ends_cleanly, rng, count)


ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
TEXT = st.text(ANY_CHARACTER, max_size=60) | st.text("\n \r", max_size=20) | st.text("!?.,;-\n", max_size=60) | st.text(
    "\u202e\u05d0\u05e9\u0645\u200f \n", max_size=60) | st.text("a\0\ufeff\u2028\x85\x1c\n", max_size=30)


def any_corpus(small: Small, rng: random.Random, count: int) -> Trials:
    """Any text in any kind of file, and then very large texts: tokens of the vocabulary, or a one-line error."""
    folder, numbers = small.new(), itertools.count()
    folder.mkdir()

    def tokenises(example: tuple[str, list[str], bytes]):
        suffix, texts, raw = example
        content = raw or ("\n".join(json.dumps({"text": text}) for text in texts) if "jsonl" in suffix else
                          "\n\n".join(texts)).encode(errors="surrogatepass")
        path = folder / f"x{next(numbers)}{suffix}"
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") and not raw else content)
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            tokens = clean(lambda: corpus.tokenise([str(path)], small.tokenizer, folder / "cache"))
        if tokens is not None:
            assert len(tokens.train) and max(tokens.train.max(), tokens.heldout.max(initial=0)) < len(VOCAB)
        path.unlink()
        shutil.rmtree(folder / "cache", ignore_errors=True)

    kinds = st.sampled_from((".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"))
    yield from examples("corpus", st.tuples(kinds, st.lists(TEXT, max_size=6), st.just(b"") | st.binary(max_size=60)),
                        tokenises, rng, count)
    size = min(count, 500) * 100_000  # bytes: 50 MB in the long form
    for name, piece, suffix in (("an endless line", b"king of the sea ", ".txt"), ("an endless word", b"a", ".txt"),
                                ("a gzip bomb of a line", b"a", ".txt.gz"), ("a gzip bomb of lines", b"\n", ".txt.gz"),
                                ("a gzip bomb of NULs", b"\0", ".txt.gz"), ("a gzip bomb", b" ", ".jsonl.gz"),
                                ("an endless record", b'{"text": "aaaaaaa', ".jsonl"),
                                ("an endless nesting", b"[", ".jsonl")):
        path, length = folder / f"large{suffix}", size // 10 if piece == b"\n" else size  # many lines are the slowest
        with gzip.open(path, "wb", 1) if suffix.endswith(".gz") else open(path, "wb") as stream:
            for _ in range(length // 10_000):
                stream.write((piece * 10_000)[:10_000])

        def tokenised(path=path) -> int:
            corpus.TOKENISE_AT_ONCE = TOKENISE_AT_ONCE
            before = peak_memory_mb()
            clean(lambda: corpus.tokenise([str(path)], small.tokenizer, folder / "cache"))
            print(peak_memory_mb() - before)
            return 0

        code, printed = process(tokenised)
        grown = float(printed.splitlines()[-1]) if code == 0 else math.inf
        # JSON needs a whole line at once, up to corpus.RECORD; other text is read in pieces.
        limit = 64 + 6 * length / 1e6 if "jsonl" in suffix else 64
        yield f"{name} of {length / 1e6:.1f} MB", (
            "" if grown < limit else f"{grown:.0f} MB of memory, {printed[-300:]!r}")
        shutil.rmtree(folder / "cache", ignore_errors=True)


# ---- 5. Numbers that are not finite; the hub -----------------------------------------------------------------


def not_finite(small: Small, rng: random.Random, count: int) -> Trials:
    """A loss that is NaN or infinite at some step, or a teacher with such weights: reported, and never saved."""
    for number in range(count):
        value, output = (math.nan, math.inf, -math.inf)[number % 3], small.new()
        if number % 2:
            folder = small.new()
            shutil.copytree(small.teacher, folder)
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            name = rng.choice(sorted(tensors))
            tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value
            safetensors.torch.save_file(tensors, folder / "model.safetensors")
            code, printed = small.distill(output, teacher=folder)
            lost = unclean(code, printed) or (
                "" if code == 2 and "finite" in printed else f"not refused, {printed[-300:]!r}")
            yield f"a teacher with {value} in {name}", lost
            continue
        step = rng.randrange(STEPS)

        def disturbed(output=output, step=step, value=value) -> int:
            real, calls = distill.Distiller.forward, itertools.count()

            def forward(*arguments):
                losses = real(*arguments)
                return {name: loss * value for name, loss in losses.items()} if next(calls) == step else losses

            distill.Distiller.forward = forward
            return distill.main(small.command(output))

        code, printed = process(disturbed)
        lost = unclean(code, printed)
        if not lost and (code != 2 or f"step {step + 1}: loss or gradient is not finite" not in printed):
            lost = f"not reported: {printed[-300:]!r}"
        yield f"a loss of {value} at step {step + 1}", lost or small.lost(output, *small.rerun(output))


@contextlib.contextmanager
def served_hub(teacher: Path, behaviour: str):
    """`with served_hub(folder, behaviour) as endpoint`: a hub with one model, in a process of its own."""
    files = {path.name: path.read_bytes() for path in teacher.iterdir()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), fake_hub.handler(files, [], behaviour))
    child = os.fork()
    if not child:
        try:
            server.serve_forever()
        finally:
            os._exit(0)
    server.server_close()  # in this process only
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def hub(small: Small, rng: random.Random, count: int) -> Trials:
    """A hub that is slow, fails, disconnects or is unreachable: a run or a one-line error within 40 seconds; and the
    same command succeeds when the hub works again."""
    for behaviour in ("slow", "disconnecting", "unreachable", "failing", "not a hub", "silent", "stalling")[:count]:
        output = small.new()

        def distilled(endpoint: str, output=output) -> int:
            for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
                del os.environ[name]
            for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
                del sys.modules[name]  # it reads its addresses when it is imported
            os.environ |= {"HF_HOME": f"{output}.cache/hub", "HF_ENDPOINT": endpoint}
            return distill.main(small.command(output, teacher="owner/bert"))

        start = time.monotonic()
        with served_hub(small.teacher, behaviour) as endpoint:
            address = "http://127.0.0.1:1" if behaviour == "unreachable" else endpoint
            code, printed = process(lambda: distilled(address))  # noqa: B023
        seconds = time.monotonic() - start
        lost = unclean(code, printed)
        if not lost and code != 2 * (behaviour != "slow"):
            lost = f"exit code {code}, {printed[-300:]!r}"
        if not lost and seconds > 40:
            lost = f"took {seconds:.0f} seconds"
        if not lost and code:
            with served_hub(small.teacher, "working") as endpoint:
                code, printed = process(lambda: distilled(endpoint))  # noqa: B023
        yield f"{behaviour}, {seconds:.0f} s", lost or small.lost(output, code, printed)


# ---- 6. Memory, files, threads -------------------------------------------------------------------------------


def memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def peak_memory_mb() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def growth(small: Small, rng: random.Random, count: int) -> Trials:
    """Memory, open files and threads over `count` steps, after the last prune; the peak for a text 50 times as long."""
    output = small.new()

    def long_run() -> int:
        measured = []

        def measure():
            measured.append((memory_mb(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))

        for number in range(count * 3 // 4, count, max(1, count // 20)):  # pruning ends after 0.7 of the run
            disturb("training", number, measure)
        code = distill.main(small.command(output, "--save-minutes", 0.005, "--log-every", 10, steps=count))
        print(*measured[0], *measured[-1])
        return code

    code, printed = process(long_run)
    numbers = [float(number) for number in printed.splitlines()[-1].split()] if code == 0 else [0] * 3 + [math.inf] * 3
    grown = [last - first for first, last in zip(numbers[:3], numbers[3:], strict=True)]
    yield f"{count} steps", "" if grown[0] < 4 and max(grown[1:]) <= 1 else f"grew by {grown}: {printed[-300:]!r}"
    small.delete(output)

    text, peaks = small.corpus.read_text(), []
    for factor in (1, 50):
        path, cache = small.folder / f"{factor}.txt", small.new()
        with open(path, "w") as stream:
            for _ in range(factor * count // 100):
                stream.write(text + "\n")

        def tokenised(path=path, cache=cache) -> int:
            corpus.TOKENISE_AT_ONCE = 1 << 16
            corpus.tokenise([str(path)], small.tokenizer, cache)
            print(peak_memory_mb(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
            return 0

        code, printed = process(tokenised)
        peaks.append([float(number) for number in printed.split()] if code == 0 else [math.inf] * 3)
        size = path.stat().st_size / 1e6
        path.unlink()
    grown = [b - a for a, b in zip(*peaks, strict=True)]
    yield f"{size:.0f} MB of text", "" if grown[0] < 8 and max(grown[1:]) <= 1 else f"grew by {grown}"


# ---- All of them ---------------------------------------------------------------------------------------------

FAULTS = {  # fault -> the number of its trials in the long and in the short form
    kill: (100, 7), kill_processes: (40, 2), kill_fine_tuning: (60, 2), disk_full: (50, 5), damaged_run: (120, 4),
    damaged_teacher: (120, 5), malicious_files: (150, 6), any_config: (900, 30), any_flags: (500, 20),
    any_corpus: (900, 15), not_finite: (20, 2), hub: (7, 2)}
if sys.platform == "linux":
    FAULTS[growth] = 2000, 100  # reads /proc


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults into small runs. Exit code 1 if anything was lost.")
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS], help="Inject this fault only.")
    parser.add_argument("--count", type=int, help="Number of trials of each fault.")
    parser.add_argument("--short", action="store_true", help="A few trials of each fault.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random trials.")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process that forks must have no threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    corpus.TOKENISE_AT_ONCE = 1000  # many blocks, as of a large text
    any_lost = 0
    print(f"{'fault':<18}{'tried':>8}{'survived':>10}{'lost':>6}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        small = Small(Path(folder))
        for fault, counts in FAULTS.items():
            if args.only in (None, fault.__name__):
                start, tried, lost = time.monotonic(), 0, []
                for what, why in fault(small, random.Random(args.seed), args.count or counts[args.short]):
                    tried += 1
                    if why:
                        lost.append(f"  lost: {what}: {why}")
                print(f"{fault.__name__:<18}{tried:>8}{tried - len(lost):>10}{len(lost):>6}"
                      f"{time.monotonic() - start:>9.1f}", *lost, sep="\n" if lost else "", flush=True)
                any_lost += len(lost)
    return 1 if any_lost else 0


if __name__ == "__main__":
    sys.exit(main())
