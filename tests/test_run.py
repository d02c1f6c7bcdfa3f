"""Runs that are interrupted, resumed, spread over processes, or short of memory (run.py and the loop of distill.py)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import distill
import finetune
import model
import run

ROOT = Path(__file__).resolve().parent.parent


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


@pytest.fixture
def flags(checkpoint, corpus, tmp_path_factory):
    """Flags of a run of 10 steps from width 32 to 16, which cuts in several of them."""
    cache = tmp_path_factory.getbasetemp() / "cache_of_runs"
    return ["--teacher", str(checkpoint), "--corpus", str(corpus), "--cache-dir", str(cache), "--target-width", "16",
            "--steps", "10", "--batch-size", "6", "--seq-length", "16", "--granularity", "4", "--learning-rate", "1e-3",
            "--device", "cpu", "--log-every", "1", "--eval-every", "2", "--eval-rows", "5", "--dropout", "0.1"]


def distil(flags, output, *more) -> int:
    return distill.main([*flags, "--output", str(output), *map(str, more)])


def resume(output, *more) -> int:
    return distill.main(["--resume", "--output", str(output), *map(str, more)])


def kill_at(monkeypatch, step: int):
    """Let the process end in the middle of step `step`, 0, 1, ..."""
    real = distill.learning_rate

    def deadly(now, *rest):
        if now == step:
            raise Killed
        return real(now, *rest)

    monkeypatch.setattr(distill, "learning_rate", deadly)


def until_killed(flags, output, *more):
    with pytest.raises(Killed):
        distil(flags, output, *more)
    for thread in threading.enumerate():  # the writer of the last checkpoint
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def student(output) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "model.safetensors")


def history(output) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_mb", "milliseconds")}
            for line in lines]


def assert_same_end(output, other):
    expected = student(other)
    assert set(student(output)) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student(output).items())
    assert (output / "student" / "lineage.json").read_text() == (other / "student" / "lineage.json").read_text()
    assert history(output) == history(other)
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in other.iterdir()} and names >= {"run.json", "log.jsonl", "student"}
    assert not {name for name in names if name not in ("run.json", "log.jsonl") and not name.startswith("student")}


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, checkpoint, corpus):
    """Output folders of runs that nothing disturbed, by their additional flags; made when first asked for."""
    done = {}

    def make(flags, *more):
        if more not in done:
            done[more] = tmp_path_factory.mktemp("undisturbed") / "run"
            assert distil(flags, done[more], *more) == 0
        return done[more]

    return make


@pytest.mark.parametrize("more", [(), ("--micro-batch-size", 4), ("--align-heads", "--compensate")])
@pytest.mark.parametrize("step", [0, 1, 3, 6, 9])
def test_a_resumed_run_ends_bit_for_bit_where_the_undisturbed_one_does(flags, tmp_path, undisturbed, more, step):
    """Before the first cut, in the middle of the cuts, in the step of one, after the last; with dropout."""
    expected = undisturbed(flags, *more)
    cuts = [line["step"] for line in history(expected) if line["event"] == "cut"]
    assert 2 in cuts and 4 in cuts and max(cuts) <= 7  # step 1 runs before any cut but the first, 9 after the last
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        until_killed(flags, tmp_path / "run", *more, "--save-every", 1)
    assert not (tmp_path / "run" / "student").exists()
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", expected)


def test_steps_since_the_last_checkpoint_are_made_again_and_told_once(flags, tmp_path, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 8)
        until_killed(flags, tmp_path / "run", "--save-every", 3)
    assert max(line["step"] for line in history(tmp_path / "run")) == 8  # two steps ahead of the checkpoint
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"event": "train", "st')  # torn by the end of the process
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", undisturbed(flags))


def test_a_run_without_a_checkpoint_begins_again(flags, tmp_path, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 4)
        until_killed(flags, tmp_path / "run")  # --save-minutes has not come yet
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", undisturbed(flags))


def test_a_run_can_be_resumed_many_times(flags, tmp_path, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 2)
        until_killed(flags, tmp_path / "run", "--save-every", 1)
        for step in (3, 5, 6):
            kill_at(patch, step)
            with pytest.raises(Killed):
                resume(tmp_path / "run")
            [thread.join() for thread in threading.enumerate() if thread is not threading.current_thread()
             and not thread.daemon]
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", undisturbed(flags))


def test_a_run_with_another_beginning_is_resumed(flags, tmp_path, undisturbed):
    for init in ("truncated", "random"):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, 5)
            until_killed(flags, tmp_path / init, "--save-every", 2, "--init", init)
        assert resume(tmp_path / init) == 0
        assert_same_end(tmp_path / init, undisturbed(flags, "--init", init))


def test_a_failed_export_needs_no_step_again(flags, tmp_path, undisturbed, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "save_model", full)
        assert distil(flags, tmp_path / "run") == 2
    assert "No space left" in capsys.readouterr().err and not (tmp_path / "run" / "student").exists()
    monkeypatch.setattr(distill, "learning_rate", lambda *_: pytest.fail("a step was made again"))
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", undisturbed(flags))


def test_minutes_between_checkpoints(flags, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(run.Checkpoints, "save", lambda self, step, *_: steps.append(step))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert distil(flags, tmp_path / "run", "--save-minutes", 0) == 0
    assert steps == list(range(1, 11))
    steps.clear()
    assert distil(flags, tmp_path / "other", "--save-minutes", 60) == 0
    assert steps == [10]


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(flags, tmp_path, undisturbed, capsys):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 7)
        until_killed(flags, tmp_path / "run", "--save-every", 1)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-0000006", "step-0000007"]
    sums = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=checkpoints / "step-0000007")
    assert sums.returncode == 0
    path = checkpoints / "step-0000007" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert resume(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "step-0000007/state.safetensors is damaged" in printed and "resumed after step 6" in printed
    assert_same_end(tmp_path / "run", undisturbed(flags))


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "SHA256SUMS"])
def test_no_damage_to_a_checkpoint_goes_unseen(flags, tmp_path, capsys, name):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3)
        until_killed(flags, tmp_path / "run", "--save-every", 3)
    path, = (tmp_path / "run" / "checkpoints").glob(f"*/{name}")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 3], whole[:10] + bytes([whole[10] ^ 8]) + whole[11:], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert resume(tmp_path / "run") == 2
        out, error = capsys.readouterr()
        assert "step-0000003" in out and "damaged" in out
        assert error.count("\n") == 1 and "no checkpoint" in error and "--overwrite" in error


def test_a_disk_that_is_full_stops_the_run_and_leaves_the_older_checkpoint(flags, tmp_path, undisturbed, capsys):
    real = Path.write_bytes

    def full(path, content):
        if list((tmp_path / "run" / "checkpoints").glob("step-0000004")):
            raise OSError(28, "No space left on device", str(path))
        return real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert distil(flags, tmp_path / "run", "--save-every", 2) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and "state.safetensors" in error
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-0000002", "step-0000004"}
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", undisturbed(flags))


def test_writing_does_not_hold_up_the_training(flags, tmp_path, monkeypatch):
    """While the first checkpoint is being written, the loop goes on until it wants to write the second."""
    released, steps = threading.Event(), []
    real_write, real_rate = run.Checkpoints.write, distill.learning_rate

    def slow(self, step, *rest):
        assert released.wait(30)
        real_write(self, step, *rest)

    def seen(step, *rest):
        steps.append(step)
        if step == 7:
            released.set()
        return real_rate(step, *rest)

    monkeypatch.setattr(run.Checkpoints, "write", slow)
    monkeypatch.setattr(distill, "learning_rate", seen)
    assert distil(flags, tmp_path / "run", "--save-every", 4) == 0 and steps == list(range(10))


def test_resuming_with_other_flags(flags, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 4)
        until_killed(flags, tmp_path / "run", "--save-every", 2)
    for more, words in ((("--steps", 11), "--steps was 10 when the run began, now 11"),
                        (("--learning-rate", 0.5), "--learning-rate was 0.001"),
                        (("--teacher", "elsewhere"), "--teacher was"), (("--micro-batch-size", 2), "was None"),
                        (("--alpha-mlm", 0.5), "--alpha-mlm was 1.0"), (("--overwrite",), "give one of them")):
        assert resume(tmp_path / "run", *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert resume(tmp_path / "run", "--steps", 10, "--eval-rows", 3, "--log-every", 5, "--save-every", 1) == 0


def test_resuming_what_is_not_there_or_is_finished(flags, tmp_path, capsys, monkeypatch):
    assert resume(tmp_path / "nothing") == 2 and "there is no run in" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    assert distil(flags, tmp_path / "run") == 0
    capsys.readouterr()
    monkeypatch.setattr(distill, "evaluate", lambda *_: pytest.fail("a finished run was touched"))
    assert resume(tmp_path / "run") == 0 and "is finished" in capsys.readouterr().out
    (tmp_path / "run" / "run.json").write_text('{"flags": {"steps": 3}}')
    assert resume(tmp_path / "run") == 2 and "another version" in capsys.readouterr().err


def test_resuming_with_another_teacher_or_another_text(flags, tmp_path, checkpoint, corpus, capsys):
    shutil.copytree(checkpoint, tmp_path / "teacher")
    shutil.copy(corpus, tmp_path / "text.txt")
    flags = [*flags, "--teacher", str(tmp_path / "teacher"), "--corpus", str(tmp_path / "text.txt")]
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 4)
        until_killed(flags, tmp_path / "run", "--save-every", 2)
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["cls.predictions.bias"][0] += 1
    save_file(weights, tmp_path / "teacher" / "model.safetensors")
    assert resume(tmp_path / "run") == 2 and "the teacher is not what it was" in capsys.readouterr().err
    weights["cls.predictions.bias"][0] -= 1
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "teacher" / "model.safetensors")
    with open(tmp_path / "text.txt", "a") as text:
        text.write("\n\nmore\n")
    assert resume(tmp_path / "run") == 2 and "the corpus is not what it was" in capsys.readouterr().err


def test_run_json_tells_where_a_result_comes_from(flags, undisturbed, checkpoint):
    record = json.loads((undisturbed(flags) / "run.json").read_text())
    assert record["teacher"] == run.weights_hash(checkpoint) and len(record["corpus"]) == 32
    assert record["flags"]["steps"] == 10 and record["processes"] == 1
    assert {"python", "torch", "numpy", "tokenizers", "safetensors", "commit"} == set(record["versions"])


# ------------------------------------------------------------------------------------------------------------- signals


def start(flags, output, *more, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "distill.py"), *flags, "--output", str(output), *map(str, more)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment)


def wait_for_steps(process, output, count: int):
    deadline = time.monotonic() + 60
    while len([line for line in (history(output) if (output / "log.jsonl").exists() else [])
               if line["event"] == "train"]) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(flags, tmp_path, number):
    flags = [*flags, "--steps", "4000"]
    process = start(flags, tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    told = re.search(r"interrupted after step (\d+), which is saved; to go on: python distill.py --resume", said)
    assert told and "Traceback" not in said
    saved = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step-{int(told[1]):07d}"]
    assert run.read_checkpoint(saved[0])[1]["step"] == int(told[1])


def test_a_second_signal_ends_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # in the background of a shell it is ignored
    with run.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.number == signal.SIGINT and interrupts.agreed() and not interrupts.overdue()
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        monkeypatch.setattr(run, "FINISH_A_STEP", 0.0)
        assert interrupts.overdue()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_step_that_takes_too_long_is_given_up(flags, tmp_path, undisturbed, monkeypatch, capsys):
    """It is saved as it was before the step, and the resumed run still ends where the undisturbed one does."""
    real = data.Rows.training_batch

    def signalled(rows, seed, step, *rest):
        if step == 5 and not asked:
            asked.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(rows, seed, step, *rest)

    asked = []
    monkeypatch.setattr(run, "FINISH_A_STEP", 0.0)
    monkeypatch.setattr(data.Rows, "training_batch", signalled)
    assert distil(flags, tmp_path / "run", "--micro-batch-size", 4) == 128 + signal.SIGTERM
    assert "interrupted after step 5, which is saved" in capsys.readouterr().err
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", undisturbed(flags, "--micro-batch-size", 4))


def test_snapshots_of_a_resumed_run(flags, tmp_path, undisturbed, monkeypatch):
    """Killed after a snapshot was written and taken up before it: it is written again, and is the same."""
    more = ["--snapshots", "28,24", "--save-every", "1"]
    whole = undisturbed(flags, *more)
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        until_killed(flags, tmp_path / "run", *more)
    assert (tmp_path / "run" / "student-24").is_dir()
    first, second = sorted((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(second)
    (tmp_path / "run" / "student-24" / "model.safetensors").write_bytes(b"half of it")
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", whole)
    for name in ("student-28", "student-24"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (tmp_path / "run", whole))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ----------------------------------------------------------------------------------------------------------- processes


def torchrun(count: int, *arguments, timeout=120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)


@pytest.mark.parametrize("count, more", [(2, ()), (3, ("--micro-batch-size", 1)), (2, ("--alpha-hidn", 0))])
def test_several_processes_make_the_same_student(flags, tmp_path, undisturbed, count, more):
    """Three processes have 2 rows each, in micro-batches of 1; without L_hidn a projection has no gradient."""
    flags = [*flags, "--dropout", "0"]
    expected = undisturbed(flags, "--dropout", "0", *more)
    done = torchrun(count, "distill.py", *flags, "--output", tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("KL to the teacher") == 1 and f"cpu and {count - 1} more" in done.stdout
    assert (tmp_path / "run" / "student" / "lineage.json").read_text() == (
        expected / "student" / "lineage.json").read_text()
    for name, tensor in student(expected).items():
        torch.testing.assert_close(student(tmp_path / "run")[name], tensor, rtol=0, atol=2e-5, msg=name)
    for line, other in zip(history(tmp_path / "run"), history(expected), strict=True):
        assert line.pop("event") == other.pop("event")
        assert line == other if "before" in line else line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_the_processes_part_in_order(flags, tmp_path):
    """At the end of a run nothing is left that PyTorch's threads could still be working on."""
    code = ("import distill, sys\ncode = distill.main(sys.argv[1:])\n"
            "sys.exit(code or distill.run.dist.is_initialized())\n")
    (tmp_path / "parts.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    done = torchrun(2, tmp_path / "parts.py", *flags, "--output", tmp_path / "run")
    assert done.returncode == 0 and (tmp_path / "run" / "student").is_dir(), done.stderr


def test_several_processes_resume_bit_for_bit(flags, tmp_path):
    """Interrupted by a signal to torchrun, which passes it on."""
    flags = [*flags, "--steps", "300", "--eval-every", "150"]
    assert torchrun(2, "distill.py", *flags, "--output", tmp_path / "whole").returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "distill.py"]
    process = subprocess.Popen([*command, *flags, "--output", str(tmp_path / "run")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for_steps(process, tmp_path / "run", 5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (tmp_path / "run" / "student").exists() and list((tmp_path / "run" / "checkpoints").iterdir())
    done = torchrun(2, "distill.py", "--resume", "--output", tmp_path / "run")
    assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_with_another_number_of_processes(flags, tmp_path, undisturbed):
    flags = [*flags, "--dropout", "0"]
    expected = undisturbed(flags, "--dropout", "0")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 3)
        until_killed(flags, tmp_path / "run", "--save-every", 1)
    done = torchrun(2, "distill.py", "--resume", "--output", tmp_path / "run")
    assert done.returncode == 0 and "resumed after step 3" in done.stdout, done.stderr
    assert (tmp_path / "run" / "student" / "lineage.json").read_text() == (
        expected / "student" / "lineage.json").read_text()
    for name, tensor in student(expected).items():
        torch.testing.assert_close(student(tmp_path / "run")[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_a_process_that_dies_ends_the_run(flags, tmp_path):
    code = ("import distill, os, run, sys\nreal = distill.learning_rate\n"
            "def deadly(step, *rest):\n    if step == 3 and run.RANK == 1: os._exit(9)\n    return real(step, *rest)\n"
            "distill.learning_rate = deadly\nsys.exit(distill.main(sys.argv[1:]))\n")
    (tmp_path / "dies.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    begun = time.monotonic()
    done = torchrun(2, tmp_path / "dies.py", *flags, "--output", tmp_path / "run")
    assert done.returncode != 0 and time.monotonic() - begun < 60
    assert not (tmp_path / "run" / "student").exists()


def test_processes_that_disagree_about_a_cut_stop(flags, tmp_path):
    code = ("import distill, prune, run, sys\nreal = prune.choose_units\n"
            "def other(importance, now, new):\n"
            "    return real({k: -v for k, v in importance.items()} if run.RANK else importance, now, new)\n"
            "prune.choose_units = other\nsys.exit(distill.main(sys.argv[1:]))\n")
    (tmp_path / "other.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    done = torchrun(2, tmp_path / "other.py", *flags, "--output", tmp_path / "run")
    assert done.returncode != 0 and "the processes chose different units to cut" in done.stderr


@pytest.mark.parametrize("more", [(), ("--grid", "--batch-size", "4")])
def test_several_processes_share_out_fine_tuning(checkpoint, tmp_path, more):
    """Two processes, three seeds: the same results as one process, each of them made once."""
    (tmp_path / "SST-2").mkdir()
    rows = "".join(f"{word} {word}\t{label}\n" for label, word in enumerate(("the king", "a river")) for _ in range(6))
    for split in ("train", "dev"):
        (tmp_path / "SST-2" / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}")
    command = ["--model", str(checkpoint), "--task", "sst2", "--data", str(tmp_path), "--seeds", "0", "1", "2",
               "--max-steps", "2", "--device", "cpu", "--dropout", "0.1", *more]
    assert finetune.main([*command, "--output", str(tmp_path / "one")]) == 0
    done = torchrun(2, "finetune.py", *command, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dev, percent") == 1
    one, two = (sorted(json.loads((tmp_path / name / "results.json").read_text()), key=lambda e: e["seed"])
                for name in ("one", "two"))
    assert [entry["seed"] for entry in two] == [0, 1, 2]
    for entry, other in zip(one, two, strict=True):
        assert entry["metrics"] == other["metrics"] and entry["learning_rate"] == other["learning_rate"]
        first, second = (load_file(Path(e["folder"]) / "model.safetensors") for e in (entry, other))
        for name, tensor in first.items():  # to rounding: torchrun's processes have one thread, this one may have more
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=name)
    heads = [load_file(Path(entry["folder"]) / "model.safetensors")["classifier.weight"] for entry in one]
    assert not torch.allclose(heads[0], heads[1], rtol=0, atol=1e-3)  # another seed is far more than rounding


def test_too_few_rows_for_the_processes(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "WORLD", 7)
    assert distil(flags, tmp_path / "run") == 2 and "nothing to do for some of the 7" in capsys.readouterr().err


def test_every_row_has_one_process(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setattr(run, "WORLD", world)
        for rows in (1, 5, 7, 64):
            shares = []
            for rank in range(world):
                monkeypatch.setattr(run, "RANK", rank)
                shares.append(run.share_of(rows))
            assert [first for first, _ in shares] == [0] + [last for _, last in shares][:-1] and shares[-1][1] == rows
            assert max(last - first for first, last in shares) - min(last - first for first, last in shares) <= 1


# -------------------------------------------------------------------------------------------------------------- memory


def test_the_micro_batch_is_halved_until_it_fits():
    tried = []

    def trial(rows):
        tried.append(rows)
        if rows > 12:
            raise torch.OutOfMemoryError("no")

    assert distill.largest_micro_batch(trial, 100) == 7 and tried == [100, 50, 25, 13, 7]
    with pytest.raises(torch.OutOfMemoryError):
        distill.largest_micro_batch(lambda rows: trial(13), 4)


def test_memory_that_is_full_is_told_in_one_line(flags, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(distill.Distiller, "forward", full)
    assert distil(flags, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--micro-batch-size" in error


@pytest.mark.parametrize("rows_that_fit", [3, 1])
def test_memory_that_fills_up_in_the_middle_of_a_run(flags, tmp_path, undisturbed, monkeypatch, rows_that_fit):
    """In step 5, also when the first of its micro-batches has got through: the step begins anew with smaller ones, and
    the student is the same to rounding."""
    flags = [*flags, "--dropout", "0"]
    whole = undisturbed(flags, "--dropout", "0")
    real, calls = distill.Distiller.forward, []

    def forward(self, batch, teacher):
        calls.append(len(batch.input_ids))
        if len(calls) > 4 and len(calls) != 6 and len(batch.input_ids) > rows_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, teacher)

    monkeypatch.setattr(distill.Distiller, "forward", forward)
    assert distil(flags, tmp_path / "run") == 0
    tried = [6, 3] if rows_that_fit == 3 else [6, 3, 3, 2]
    assert calls[:4] == [6] * 4 and calls[4 : 4 + len(tried)] == tried
    assert set(calls[4 + len(tried) :]) == {rows_that_fit}
    for name, tensor in student(whole).items():
        torch.testing.assert_close(student(tmp_path / "run")[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_a_micro_batch_that_was_asked_for_is_not_changed(flags, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(distill.Distiller, "forward", full)
    assert distil(flags, tmp_path / "run", "--micro-batch-size", 4) == 2


# -------------------------------------------------------------------------------------------------------- tokenisation


def test_tokenising_goes_on_where_it_was_ended(tmp_path, tokenizer, documents, monkeypatch):
    monkeypatch.setattr(data, "TOKENISE_AT_ONCE", 500)
    (tmp_path / "text.txt").write_bytes("\n\n".join(documents).encode() + b"\n\nbroken \xff byte\n")
    corpus = [str(tmp_path / "text.txt")]
    whole = data.tokenise(corpus, tokenizer, tmp_path / "whole")
    real, seen = np_array, []

    for death in (3, 20, 21, 60):
        count = 0

        def deadly(*arguments, death=death, **named):
            nonlocal count
            count += 1
            if count == death:
                raise Killed
            return real(*arguments, **named)

        monkeypatch.setattr(data.np, "array", deadly)
        with pytest.raises(Killed):
            data.tokenise(corpus, tokenizer, tmp_path / "cache")
        seen.append(count)
    monkeypatch.setattr(data.np, "array", real)
    calls = []
    monkeypatch.setattr(data.np, "array", lambda *a, **k: calls.append(1) or real(*a, **k))
    tokens = data.tokenise(corpus, tokenizer, tmp_path / "cache")
    assert (tokens.train == whole.train).all() and (tokens.heldout == whole.heldout).all()
    assert tokens.replaced_bytes == whole.replaced_bytes == 1
    assert 0 < len(calls) < len(documents) - 50  # what was done before was not done again
    assert {p.name for p in (tmp_path / "cache" / tokens.key).iterdir()} == {"train.bin", "heldout.bin", "meta.json"}


def test_two_runs_may_tokenise_the_same_text_at_once(tmp_path, tokenizer, corpus):
    results = []
    threads = [threading.Thread(target=lambda: results.append(data.tokenise([str(corpus)], tokenizer, tmp_path / "c")))
               for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 4 and len({bytes(tokens.train) for tokens in results}) == 1
    assert [path.name for path in (tmp_path / "c").iterdir()] == [results[0].key]


np_array = data.np.array
