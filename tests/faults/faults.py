"""Faults, tried on real runs: what a machine, a disk, a network or a damaged file can do to a run of hours.

    python tests/faults/faults.py                          the long form (make test-faults), minutes
    python tests/faults/faults.py --short                  a few trials of each fault, as `make test` does
    python tests/faults/faults.py --only kill --count 50

Each fault is a generator of trials, (what was tried, what was lost): the second is "" where nothing was. A run that was
disturbed and then resumed has lost nothing if it ends bit for bit where the undisturbed one does. Bad input is survived
if it ends in a clean run or in one line of error with exit code 2.

Every run is a real process, forked from this one, which has torch imported but has started no thread.
"""

import argparse
import contextlib
import gzip
import http.server
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hypothesis  # noqa: E402
import hypothesis.strategies as st  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from conftest import VOCAB, sentences  # noqa: E402

import data  # noqa: E402
import distill  # noqa: E402
import model  # noqa: E402
import prune  # noqa: E402
import run  # noqa: E402

Trials = Iterator[tuple[str, str]]
PHASES = {  # where a disturbance comes -> the function that it interrupts
    "anywhere": (distill, "distill"), "tokenisation": (data, "write_tokens"), "start": (run, "start_run"),
    "training": (distill.Distiller, "forward"), "cut": (prune, "cut"), "checkpoint": (run.Checkpoints, "write"),
    "export": (distill, "export")}
STEPS = 12
TOKENISE_AT_ONCE = data.TOKENISE_AT_ONCE
PATIENCE = 300  # seconds after which a process hangs

# ---- Processes -----------------------------------------------------------------------------------------------


def process(work: Callable[[], int], meanwhile: Callable[[int], None] | None = None) -> tuple[int, str]:
    """`work()` in a process of its own: its exit code (negative: the signal that ended it) and all that it printed.
    meanwhile: what this process does then, with the other's id."""
    sys.stdout.flush()
    read, write = os.pipe()  # no file: the disk of the other one may be full
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(PATIENCE)
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
    if meanwhile:
        meanwhile(child)
    with open(read, errors="replace") as stream:
        said = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def upon(phase: str, number: int, act: Callable[[], None], after: Callable[[], None] = lambda: None):
    """From now on in this process: act() when the function of `phase` begins for the `number`-th time, after() when it
    has ended."""
    owner, name = PHASES[phase]
    real, calls = getattr(owner, name), itertools.count(1)

    def disturbed(*arguments, **named):
        now = next(calls) == number
        if now:
            act()
        try:
            return real(*arguments, **named)
        finally:
            if now:
                after()

    setattr(owner, name, disturbed)


def unclean(code: int, said: str) -> str:
    """What is wrong with the end of a process that should end well or in one line of error; "" for nothing."""
    told = [line for line in said.splitlines() if line.startswith("distill.py:")]
    if code == 0 and not told:
        return ""
    if code != 2 or len(told) != 1 or said.splitlines()[-1:] != told or "Traceback" in said:
        return f"exit code {code}, {'hung, ' * (code == -signal.SIGALRM)}{said.strip()[-300:]!r}"
    return ""


# ---- A small run ---------------------------------------------------------------------------------------------


class Small:
    """A tiny teacher, a small text, the flags of a run of seconds, and what that run ends with when nothing happens."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, itertools.count()
        self.teacher, self.corpus = folder / "teacher", folder / "text.txt"
        self.teacher.mkdir()
        torch.manual_seed(0)
        bert = model.Bert(model.BertConfig(
            vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64, initializer_range=0.2))
        model.save_model(bert, self.teacher)
        self.tokenizer = data.wordpiece_tokenizer(VOCAB)
        data.save_tokenizer(self.tokenizer, self.teacher, 64)
        self.corpus.write_text("\n\n".join(" ".join(sentences(i, 3 + i % 5)) for i in range(120)) + "\n")
        self.flags = [
            "--target-width", "16", "--batch-size", "6", "--seq-length", "16", "--granularity", "4", "--log-every", "1",
            "--learning-rate", "1e-3", "--device", "cpu", "--eval-rows", "5", "--dropout", "0.1"]
        # The undisturbed run, twice, and how often and how long it is in each phase
        self.times: dict[str, list[float]] = {}
        timed = folder / "times"

        def measured(output: Path) -> int:
            for phase, (owner, name) in PHASES.items():
                real, seen = getattr(owner, name), self.times.setdefault(phase, [])

                def timed_call(*arguments, real=real, seen=seen, **named):
                    begun = time.monotonic()
                    try:
                        return real(*arguments, **named)
                    finally:
                        seen.append(time.monotonic() - begun)

                setattr(owner, name, timed_call)
            code = distill.main(self.command(output))
            timed.write_text(json.dumps(self.times))
            return code

        self.undisturbed = self.new()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            # In this process, so that what torch imports at first use need not be imported again in each of the others
            assert distill.main(self.command(self.undisturbed)) == 0
        again = self.new()
        code, said = process(lambda: measured(again))
        lost = self.lost(again, code, said)
        assert not lost, lost
        self.times = json.loads(timed.read_text())

    def new(self) -> Path:
        """A folder for a run, not made yet."""
        return self.folder / f"run-{next(self.runs)}"

    def command(self, output: Path, *more, steps: int = STEPS, teacher: str | Path | None = None) -> list[str]:
        """A run with a cache of its own."""
        return ["--teacher", str(teacher or self.teacher), "--corpus", str(self.corpus), *self.flags, "--steps",
                str(steps), "--save-every", "2", "--cache-dir", f"{output}.cache", "--output", str(output),
                *map(str, more)]

    def distil(self, output: Path, *more, **other) -> tuple[int, str]:
        """That run in a process of its own, undisturbed: exit code and what was printed."""
        return process(lambda: distill.main(self.command(output, *more, **other)))

    def resume(self, output: Path) -> tuple[int, str]:
        return process(lambda: distill.main(["--resume", "--output", str(output)]))

    def go_on(self, output: Path) -> tuple[int, str]:
        """What a user does after the cause is gone: --resume, or the same again where there is no run yet."""
        return self.resume(output) if (output / "run.json").exists() else self.distil(output)

    def lost(self, output: Path, code: int, said: str, log: bool = True) -> str:
        """What is not as in the undisturbed run after a resumed one; "" for nothing. Deletes it when all is well."""
        if code:
            return f"does not go on: exit code {code}, {said.strip()[-300:]!r}"
        for path in (self.undisturbed / "student").iterdir():
            other = output / "student" / path.name
            if not other.is_file() or other.read_bytes() != path.read_bytes():
                return f"student/{path.name} is another one"
        if log and history(output) != history(self.undisturbed):
            return "log.jsonl is another one"
        self.forget(output)
        return ""

    def forget(self, output: Path):
        for path in (output, Path(f"{output}.cache")):
            shutil.rmtree(path, ignore_errors=True)


def history(output: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "memory_mb", "milliseconds")}
            for line in (output / "log.jsonl").read_text().splitlines()]


# ---- 1. The process is killed --------------------------------------------------------------------------------


def kill(small: Small, rng: random.Random, count: int) -> Trials:
    """SIGKILL at random moments of every phase; then the run goes on."""
    for _, phase in zip(range(count), itertools.cycle(PHASES), strict=False):
        output, number = small.new(), rng.randint(1, len(small.times[phase]))
        delay = rng.uniform(0, small.times[phase][number - 1])
        begun, begin = os.pipe()
        replaced = ["--overwrite"] if phase == "start" else []
        if replaced:  # the same run, finished; it may be there still, or not at all, but not in part
            shutil.copytree(small.undisturbed, output)

        def disturbed(output=output, phase=phase, number=number, begin=begin, replaced=replaced) -> int:
            upon(phase, number, lambda: os.write(begin, b"."), lambda: os.write(begin, b"!"))
            return distill.main(small.command(output, *replaced))

        def deadly(child: int, begun=begun, begin=begin, delay=delay):
            os.close(begin)
            os.read(begun, 1)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)

        code, said = process(disturbed, deadly)
        inside = not os.read(begun, 1)  # the phase had no end
        os.close(begun)
        lost = "" if code in (0, -signal.SIGKILL) else f"exit code {code}, {said[-300:]!r}"
        yield f"{phase} {number}{'' if inside else ', just after'}", lost or small.lost(output, *small.go_on(output))


# ---- 2. The disk is full -------------------------------------------------------------------------------------


def disk_full(small: Small, rng: random.Random, count: int) -> Trials:
    """From a random moment of a phase on no file may grow beyond a random size. (The system's limit stands for the end
    of the disk: writes come short, then fail.) Said in one line; then there is space again and the run goes on."""
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
            upon(function, number, fill)
            return distill.main(small.command(output))

        code, said = process(disturbed)
        lost = unclean(code, said)
        if not lost and (code != 2 or "File too large" not in said):
            lost = f"not told of the full disk: exit code {code}, {said[-300:]!r}"
        for checkpoint in (output / "checkpoints").glob("step-*"):  # the last good state loads
            run.read_checkpoint(checkpoint)
        yield f"{phase} {number}", lost or small.lost(output, *small.go_on(output))
    for _ in range(count // 10):
        yield from tmpfs_full(small, rng)


def tmpfs_full(small: Small, rng: random.Random) -> Trials:
    """A disk that is really full, where a user may mount one: a tmpfs of random size for the cache and the run."""
    output, size = small.new() / "run", rng.randrange(8, 700)
    output.parent.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", output.parent], capture_output=True)
    if mount.returncode:
        return
    try:
        lost = unclean(*small.distil(output))
        subprocess.run(["mount", "-o", "remount,size=100m", output.parent], check=True)
        yield f"tmpfs of {size} kB", lost or small.lost(output, *small.go_on(output))
    finally:
        subprocess.run(["umount", output.parent], check=True)


# ---- 3. Files are damaged, or made to do damage --------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> str:
    """Cut the file off, or flip bits in it, in run.json also in one digit of a flag. Says which."""
    content = bytearray(path.read_bytes())
    if path.name == "run.json" and rng.random() < 0.7:
        place = rng.choice([found.start() for found in re.finditer(rb"\d(?=,\n)", content)])
        content[place] ^= 1  # still a digit
        path.write_bytes(content)
        return f"run.json another digit at {place}"
    if rng.random() < 0.3:
        size = rng.randrange(len(content))
        path.write_bytes(content[:size])
        return f"{path.name} cut off at {size}"
    end = min(len(content), rng.choice((300, 3000, len(content))))  # most of what can go wrong is at the beginning
    places = [rng.randrange(end) for _ in range(rng.choice((1, 1, 3)))]
    for place in places:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name} bits flipped at {places}"


def damaged_run(small: Small, rng: random.Random, count: int) -> Trials:
    """Every file of an interrupted run, damaged at random: the run goes on from an older checkpoint and ends where the
    undisturbed one does, or refuses, naming the file."""
    interrupted = small.new()

    def stopped() -> int:
        upon("training", 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return distill.main(small.command(interrupted))

    code, said = process(stopped)
    assert code == 128 + signal.SIGTERM, said
    files = sorted(p.relative_to(interrupted) for p in interrupted.rglob("*") if p.is_file())
    newest = max(p.name for p in (interrupted / "checkpoints").iterdir())
    for _, file in zip(range(count), itertools.cycle(files), strict=False):
        output = small.new()
        shutil.copytree(interrupted, output)
        what = damage(output / file, rng)
        code, said = small.resume(output)
        lost = unclean(code, said)
        if not lost and code == 0:
            lost = small.lost(output, code, said, log=file.name != "log.jsonl")
            if not lost and newest in file.parts and "damaged" not in said:
                lost = "the damage was not told"
        elif not lost and file.name not in said:
            lost = f"{file} is not named: {said[-300:]!r}"
        small.forget(output)
        yield f"{file.parent}/{what}", lost


def damaged_teacher(small: Small, rng: random.Random, count: int) -> Trials:
    """Every file of a teacher, damaged at random: a clean run or a clean refusal. (The format has no checksum, so a bit
    flipped inside a tensor cannot be seen, but a run in which it was whole before must notice.)"""
    whole = run.weights_hash(small.teacher)
    files = sorted(path.name for path in small.teacher.iterdir())
    for _, file in zip(range(count), itertools.cycle(files), strict=False):
        folder, output = small.new(), small.new()
        shutil.copytree(small.teacher, folder)
        if file in ("vocab.txt", "tokenizer_config.json"):
            (folder / "tokenizer.json").unlink()  # which would be taken before them
        what = damage(folder / file, rng)
        lost = unclean(*small.distil(output, teacher=folder, steps=2))
        if not lost and file != "tokenizer_config.json" and run.weights_hash(folder) == whole:
            lost = "--resume would not notice"
        small.forget(output)
        small.forget(folder)
        yield what, lost


def safetensors_file(header: bytes | dict, body: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def tensor(first: int, last: int, shape=(1,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


HOSTILE_WEIGHTS = {
    "nothing": b"", "half a length": b"\x10\0\0", "no header": struct.pack("<Q", 0),
    "a header of 2^63 bytes": safetensors_file({}, length=1 << 63),
    "a header of 2^64 - 1 bytes": safetensors_file({}, length=(1 << 64) - 1),
    "a header longer than the file": safetensors_file({}, length=1000),
    "a header of 99 MB that is not there": safetensors_file({}, length=99_000_000),
    "a header that is not UTF-8": safetensors_file(b'{"\xff": 1}'),
    "a header that is a list": safetensors_file(b"[1, 2]"),
    "a deep header": safetensors_file(b'{"a":' * 100_000),
    "overlapping tensors": safetensors_file({"a": tensor(0, 4), "b": tensor(2, 6), "c": tensor(4, 8)}),
    "offsets beyond the end": safetensors_file({"a": tensor(0, 4000, (1000,))}),
    "offsets in the wrong order": safetensors_file({"a": tensor(8, 0)}),
    "negative offsets": safetensors_file({"a": tensor(-4, 0)}),
    "huge offsets": safetensors_file({"a": tensor(2**63, 2**63 + 4)}),
    "offsets that are no numbers": safetensors_file({"a": tensor("0", None)}),
    "a hole": safetensors_file({"a": tensor(0, 4), "b": tensor(6, 8, dtype="F16")}),
    "a shape that is too large to count": safetensors_file({"a": tensor(0, 8, (2**40, 2**40))}),
    "a shape that is not that of the data": safetensors_file({"a": tensor(0, 8, (3,))}),
    "a shape that is none": safetensors_file({"a": tensor(0, 8, ("x",))}),
    "an unknown kind of number": safetensors_file({"a": tensor(0, 8, (2,), "F33")}),
    "one name twice": safetensors_file(
        f'{{"a": {json.dumps(tensor(0, 4))}, "a": {json.dumps(tensor(4, 8))}}}'.encode()),
    "no tensors": safetensors_file({}, b""),
    "data of nobody": safetensors_file({"a": tensor(0, 4)}, b"\0" * 4000),
}
HOSTILE_JSON = {
    "nothing": "", "a number": "3", "a list": "[]", "null": "null", "NaN": "NaN", "deep nesting": "[" * 200_000,
    "deep objects": '{"a":' * 200_000, "a huge number": '{"vocab_size": ' + "9" * 10_000 + "}",
    "an infinite number": '{"vocab_size": 1e999, "layer_norm_eps": Infinity}', "half a pair": '"\\ud800"',
    "not UTF-8": b"\xff\xfe{}", "NUL": "\0", "wrong types": '{"vocab_size": [], "weight_map": 3, "model": 3}',
    "numbers as keys": "{1: 2}", "an unpaired surrogate as a key": '{"\\ud800": 1, "weight_map": {"\\udfff": "x"}}',
}


def hostile(small: Small, rng: random.Random, count: int) -> Trials:
    """Files that are made to do damage: headers, numbers, paths. `count` of them, or all."""
    cases = [("model.safetensors", name, content) for name, content in HOSTILE_WEIGHTS.items()]
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")
    cases += [(file, name, content) for file in files for name, content in HOSTILE_JSON.items()]
    cases += [("config.json", f"{key} = {value!r:.20}", json.dumps(
        json.loads((small.teacher / "config.json").read_text()) | {key: value}))
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "attention_head_size", "hidden_act")
        for value in (math.nan, math.inf, -1, 0, 2**31, 10**30, "12", [3], {}, True, 1.5)]
    outside = {"absolute": str(small.teacher / "model.safetensors"), "..": "../teacher/model.safetensors", "dots": "..",
               "the folder": ".", "empty": "", "NUL": "a\0b", "a folder": "folder", "a device": "/dev/zero",
               "surrogate": "\udcff.safetensors", "too long": "x" * 5000, "nowhere": "dangling.safetensors",
               "a ring of links": "ring.safetensors", "a link to a device": "zero.safetensors"}
    cases += [("model.safetensors.index.json", f"a shard that is {name}", json.dumps({"weight_map": {"a": shard}}))
              for name, shard in outside.items()]
    for file, name, content in rng.sample(cases, min(count, len(cases))):
        folder, output = small.new(), small.new()
        shutil.copytree(small.teacher, folder)
        if file == "model.safetensors.index.json":
            (folder / "model.safetensors").unlink()
            (folder / "folder").mkdir()
            for link, target in (("dangling", "gone"), ("ring", "ring.safetensors"), ("zero", "/dev/zero")):
                (folder / f"{link}.safetensors").symlink_to(target)
        if file == "tokenizer_config.json":
            (folder / "tokenizer.json").unlink()
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        code, said = small.distil(output, teacher=folder, steps=1)
        lost = unclean(code, said)
        if not lost and code == 0 and file.startswith("model"):
            lost = "was taken for a model"
        small.forget(folder)
        small.forget(output)
        yield f"{file}: {name}", lost
    # Links as such must work: in the hub's own cache every file is one, out of its folder
    folder, output = small.new(), small.new()
    folder.mkdir()
    names = {path.name for path in small.teacher.iterdir()} - {"model.safetensors"}
    for name in names:
        (folder / name).symlink_to(small.teacher / name)
    (folder / "model-00001-of-00001.safetensors").symlink_to(small.teacher / "model.safetensors")
    tensors = safetensors.torch.load_file(small.teacher / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    yield "links to files elsewhere", small.lost(output, *small.distil(output, teacher=folder))


# ---- 4. Any input --------------------------------------------------------------------------------------------


def clean(work: Callable[[], object]):
    """In this process, since there are thousands: what is inside returns, or raises InputError of one line."""
    try:
        return work()
    except model.InputError as error:
        message = str(error)
        assert message.strip() and len(message.splitlines()) == 1, message
        message.encode(errors="backslashreplace")


def examples(what: str, strategy: st.SearchStrategy, check: Callable, rng: random.Random, count: int) -> Trials:
    """`count` examples that hypothesis finds; the smallest that fails is told."""
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
        lost = f"{tried[-1]!r:.500}: {model.one_line(error)}"
    for number, _ in enumerate(tried[:count], 1):
        yield f"{what} {number}", lost if number == len(tried[:count]) else ""


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) |
                    st.sampled_from((1, 2, 4, 64)), nested, max_leaves=5)


def any_config(small: Small, rng: random.Random, count: int) -> Trials:
    """config.json with some fields made anything: a model that computes, or a refusal."""
    folder = small.new()
    shutil.copytree(small.teacher, folder)
    config = json.loads((folder / "config.json").read_text())

    def computes(changes: dict):
        (folder / "config.json").write_text(json.dumps(config | changes))
        bert = clean(lambda: model.load_model(folder))
        if bert is not None:
            assert bert.eval()(torch.tensor([[1, 2, 3]]), torch.tensor([1])).logits.shape == (1, len(VOCAB))
            clean(lambda: prune.target_widths(bert.config, 16))

    yield from examples("config.json", st.dictionaries(st.sampled_from(sorted(config)), JSON, min_size=1, max_size=3),
                        computes, rng, count)


ODD = ("", "0", "-1", "1", "2", "7", "16", "0.5", "1e9", "1e-9", "nan", "inf", "1e999", "99999999999999999999", "x",
       "--", "-", "=", "ä", "\udcff", "~", "a b", "cuda:99", "meta", "auto", "cpu", "bf16", "random", "/dev/null")


def any_flags(small: Small, rng: random.Random, count: int) -> Trials:
    """Flags with values in and out of what they may be: a clean run of a step or two, or one line of error."""
    numbers = [flag for flag, default, *_ in distill.FLAGS
               if flag not in ("--output", "--steps", "--cache-dir", "--save-minutes")]
    flags = st.lists(st.tuples(st.sampled_from(numbers), st.sampled_from(ODD) | st.integers(0, 40).map(str) |
                               st.floats(0, 2).map(str)), max_size=4, unique_by=lambda pair: pair[0])
    cache = small.new()

    def ends_cleanly(example: tuple[str, list[tuple[str, str]]]):
        output, pairs = Path(f"{small.new()}{example[0]}"), example[1]
        more = [word for flag, value in pairs for word in ((flag,) if flag in SWITCHES else (flag, value))]
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out, contextlib.redirect_stdout(out), \
                contextlib.redirect_stderr(out):
            code = distill.main(small.command(output, "--cache-dir", cache, *more, steps=2))
            out.seek(0)
            said = out.read()
        assert not unclean(code, said), unclean(code, said)
        assert code == 0 or not (output / "student").exists()
        small.forget(output)

    outputs = st.sampled_from(("", "", "ä b", "\udcff"))  # the last is how Python spells a byte that is not UTF-8
    yield from examples("flags", st.tuples(outputs, flags), ends_cleanly, rng, count)


SWITCHES = {flag for flag, default, kind, _ in distill.FLAGS if kind is bool}
LETTERS = st.characters(exclude_categories=())  # lone surrogates too
TEXT = st.text(LETTERS, max_size=60) | st.text("\n \r", max_size=20) | st.text("!?.,;-\n", max_size=60) | st.text(
    "\u202e\u05d0\u05e9\u0645\u200f \n", max_size=60) | st.text("a\0\ufeff\u2028\x85\x1c\n", max_size=30)


def any_corpus(small: Small, rng: random.Random, count: int) -> Trials:
    """Text of any kind in files of any kind, and then the large ones: tokens of the vocabulary, or a refusal."""
    folder, seen = small.new(), itertools.count()
    folder.mkdir()

    def tokenises(example: tuple[str, list[str], bytes]):
        suffix, texts, raw = example
        content = raw or ("\n".join(json.dumps({"text": text}) for text in texts) if "jsonl" in suffix else
                          "\n\n".join(texts)).encode(errors="surrogatepass")
        path = folder / f"x{next(seen)}{suffix}"
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") and not raw else content)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            tokens = clean(lambda: data.tokenise([str(path)], small.tokenizer, folder / "cache"))
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
        path, length = folder / f"large{suffix}", size // 10 if piece == b"\n" else size  # the slowest: many lines
        with gzip.open(path, "wb", 1) if suffix.endswith(".gz") else open(path, "wb") as stream:
            for _ in range(length // 10_000):
                stream.write((piece * 10_000)[:10_000])

        def tokenised(path=path) -> int:
            data.TOKENISE_AT_ONCE = TOKENISE_AT_ONCE
            before = peak_memory_mb()
            clean(lambda: data.tokenise([str(path)], small.tokenizer, folder / "cache"))
            print(peak_memory_mb() - before)
            return 0

        code, said = process(tokenised)
        grown = float(said.splitlines()[-1]) if code == 0 else math.inf
        # A record is a line that JSON has to see as a whole, up to data.RECORD; other text comes in pieces
        most = 64 + 6 * length / 1e6 if "jsonl" in suffix else 64
        yield f"{name} of {length / 1e6:.1f} MB", "" if grown < most else f"{grown:.0f} MB of memory, {said[-300:]!r}"
        shutil.rmtree(folder / "cache", ignore_errors=True)


# ---- 5. Numbers that are none; the hub -----------------------------------------------------------------------


def not_finite(small: Small, rng: random.Random, count: int) -> Trials:
    """A loss that is NaN or infinite at some step; a teacher with such weights: told, and never saved."""
    for number in range(count):
        value, output = (math.nan, math.inf, -math.inf)[number % 3], small.new()
        if number % 2:
            folder = small.new()
            shutil.copytree(small.teacher, folder)
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            name = rng.choice(sorted(tensors))
            tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value
            safetensors.torch.save_file(tensors, folder / "model.safetensors")
            code, said = small.distil(output, teacher=folder)
            lost = unclean(code, said) or ("" if code == 2 and "finite" in said else f"taken, {said[-300:]!r}")
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

        code, said = process(disturbed)
        lost = unclean(code, said)
        if not lost and (code != 2 or f"step {step + 1}: loss or gradient is not finite" not in said):
            lost = f"not told: {said[-300:]!r}"
        yield f"a loss of {value} at step {step + 1}", lost or small.lost(output, *small.go_on(output))


@contextlib.contextmanager
def served_hub(teacher: Path, manner: str):
    """`with served_hub(folder, manner) as endpoint`: a hub with one model, in a process of its own."""
    files = {path.name: path.read_bytes() for path in teacher.iterdir()}
    revision = "89abcdef0123456789abcdef0123456789abcdef"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            path = self.path.split("?")[0]
            name = path.rsplit("/", 1)[1]
            if manner == "silent":
                time.sleep(1000)
            if manner == "failing":
                return self.send_error(503)
            if "/tree/" in path:
                content = json.dumps([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
                                      for name in sorted(files)]).encode()
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in sorted(files)]
                content = json.dumps({"id": "owner/bert", "sha": revision, "siblings": siblings}).encode()
                content = b"<html>" if manner == "babbling" else content
            elif name in files:
                content = files[name]
            else:
                return self.send_error(404)
            self.send_response(200)
            for header, value in (("Content-Length", len(content)), ("ETag", f'"{len(content)}-{name}"'),
                                  ("X-Repo-Commit", revision)):
                self.send_header(header, str(value))
            self.end_headers()
            if not body:
                return
            if name != "model.safetensors":
                self.wfile.write(content)
            elif manner in ("breaking off", "stalling"):
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if manner == "stalling":
                    time.sleep(1000)
                self.close_connection = True
            else:
                for begin in range(0, len(content), -(-len(content) // 10)):
                    self.wfile.write(content[begin : begin + -(-len(content) // 10)])
                    time.sleep(0.3 * (manner == "slow"))

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    child = os.fork()
    if not child:
        try:
            server.serve_forever()
        finally:
            os._exit(0)
    server.server_close()  # here; the other process has it still
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def hub(small: Small, rng: random.Random, count: int) -> Trials:
    """A hub that is slow, fails, breaks off or is not there: a run or one line, within 40 seconds; and the same command
    succeeds when the hub is well again."""
    for manner in ("slow", "breaking off", "not there", "failing", "babbling", "silent", "stalling")[:count]:
        output = small.new()

        def distilled(endpoint: str, output=output) -> int:
            for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
                del os.environ[name]
            for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
                del sys.modules[name]  # it reads its addresses when it is imported
            os.environ |= {"HF_HOME": f"{output}.cache/hub", "HF_ENDPOINT": endpoint}
            return distill.main(small.command(output, teacher="owner/bert"))

        begun = time.monotonic()
        with served_hub(small.teacher, manner) as endpoint:
            code, said = process(lambda e="http://127.0.0.1:1" if manner == "not there" else endpoint: distilled(e))
        seconds = time.monotonic() - begun
        lost = unclean(code, said)
        if not lost and code != 2 * (manner != "slow"):
            lost = f"exit code {code}, {said[-300:]!r}"
        if not lost and seconds > 40:
            lost = f"took {seconds:.0f} seconds"
        if not lost and code:
            with served_hub(small.teacher, "well") as endpoint:
                code, said = process(lambda: distilled(endpoint))  # noqa: B023
        yield f"{manner}, {seconds:.0f} s", lost or small.lost(output, code, said)


# ---- 6. Memory, files, threads -------------------------------------------------------------------------------


def memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def peak_memory_mb() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def growth(small: Small, rng: random.Random, count: int) -> Trials:
    """Memory, open files and threads over `count` steps, after the cuts; the peak over a text 50 times as long."""
    output = small.new()

    def long_run() -> int:
        seen = []

        def look():
            seen.append((memory_mb(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))

        for number in range(count * 3 // 4, count, max(1, count // 20)):  # the cuts end after 0.7 of the run
            upon("training", number, look)
        code = distill.main(small.command(output, "--save-every", 10, "--log-every", 10, steps=count))
        first, last = seen[0], seen[-1]
        print(*first, *last)
        return code

    code, said = process(long_run)
    seen = [float(number) for number in said.splitlines()[-1].split()] if code == 0 else [0] * 3 + [math.inf] * 3
    grown = [after - before for before, after in zip(seen[:3], seen[3:], strict=True)]
    yield f"{count} steps", "" if grown[0] < 4 and max(grown[1:]) <= 1 else f"grew by {grown}: {said[-300:]!r}"
    small.forget(output)

    text, peaks = small.corpus.read_text(), []
    for factor in (1, 50):
        path, cache = small.folder / f"{factor}.txt", small.new()
        with open(path, "w") as stream:
            for _ in range(factor * count // 100):
                stream.write(text + "\n")

        def tokenised(path=path, cache=cache) -> int:
            data.TOKENISE_AT_ONCE = 1 << 16
            data.tokenise([str(path)], small.tokenizer, cache)
            print(peak_memory_mb(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
            return 0

        code, said = process(tokenised)
        peaks.append([float(number) for number in said.split()] if code == 0 else [math.inf] * 3)
        size = path.stat().st_size / 1e6
        path.unlink()
    grown = [b - a for a, b in zip(*peaks, strict=True)]
    yield f"{size:.0f} MB of text", "" if grown[0] < 8 and max(grown[1:]) <= 1 else f"grew by {grown}"


# ---- All of them ---------------------------------------------------------------------------------------------

FAULTS = {  # fault -> its trials in the long and in the short form
    kill: (50, 7), disk_full: (50, 5), damaged_run: (120, 4), damaged_teacher: (120, 5), hostile: (200, 6),
    any_config: (900, 30), any_flags: (500, 20), any_corpus: (900, 15), not_finite: (20, 2), hub: (7, 2),
    growth: (2000, 100)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Try faults on small runs; exit code 1 where something was lost.")
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS])
    parser.add_argument("--count", type=int, help="how many trials of it, or how large it is")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # no thread may be there when this process forks
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data.TOKENISE_AT_ONCE = 1000  # many blocks, as of a large text
    any_lost = 0
    print(f"{'fault':<18}{'tried':>8}{'survived':>10}{'lost':>6}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        small = Small(Path(folder))
        for fault, counts in FAULTS.items():
            if args.only in (None, fault.__name__):
                begun, tried, lost = time.monotonic(), 0, []
                for what, why in fault(small, random.Random(args.seed), args.count or counts[args.short]):
                    tried += 1
                    if why:
                        lost.append(f"  lost: {what}: {why}")
                print(f"{fault.__name__:<18}{tried:>8}{tried - len(lost):>10}{len(lost):>6}"
                      f"{time.monotonic() - begun:>9.1f}", *lost, sep="\n" if lost else "", flush=True)
                any_lost += len(lost)
    return 1 if any_lost else 0


if __name__ == "__main__":
    sys.exit(main())
