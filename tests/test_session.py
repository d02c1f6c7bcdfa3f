"""Runs that are interrupted and resumed, and what else surrounds the training loop (support/session.py).

tests/reliability/ has the slow tests: kills at every step, several processes, full disks and damaged files.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import distill
from data import MaskedRows
from support import distributed, run_folder, session
from support.errors import InputError, Interrupted, LocalError, run_program
from support.files import model_fingerprint
from support.session import Session, graceful_stop


class Killed(BaseException):
    """Stands for the death of the process: nothing in the program catches it."""


class Runs:
    """Runs of 10 steps from width 32 to 16 and head size 8 to 4 that prune both in several steps and use dropout."""

    def __init__(self, teacher: Path, corpus: Path, folder: Path):
        self.folder, self.finished = folder, {}
        self.flags = [
            "--teacher", str(teacher), "--corpus", str(corpus), "--cache-dir", str(folder / "cache"),
            "--target-width", "16", "--steps", "10", "--batch-size", "6", "--seq-length", "16", "--granularity", "2",
            "--learning-rate", "1e-3", "--device", "cpu", "--log-every", "1", "--eval-every", "2", "--eval-rows", "5",
            "--dropout", "0.1", "--precision", "fp32"]

    def distill(self, output: Path, *more) -> int:
        return distill.main([*self.flags, "--output", str(output), *map(str, more)])

    def undisturbed(self, *more) -> Path:
        """The folder of a finished run with these additional flags, which no test changes."""
        if more not in self.finished:
            output = self.finished[more] = self.folder / f"undisturbed-{len(self.finished)}"
            assert self.distill(output, *more) == 0
        return self.finished[more]

    def killed(self, output: Path, step: int, *more, save_every: int = 1) -> Path:
        """Start a run that saves every `save_every` steps and dies in the middle of step `step`, which is 0, 1, ..."""
        with pytest.MonkeyPatch.context() as patch:
            save = Session.save
            patch.setattr(Session, "save", lambda self, state: state.step % save_every or save(self, state))
            dies(patch, step, lambda: self.distill(output, "--save-minutes", 0, *more))
        return output


def dies(patch: pytest.MonkeyPatch, step: int, program):
    """Call `program`, which dies in the middle of step `step`."""
    rate = distill.learning_rate

    def deadly(now, *rest):
        if now == step:
            raise Killed
        return rate(now, *rest)

    patch.setattr(distill, "learning_rate", deadly)
    with pytest.raises(Killed):
        program()
    patch.setattr(distill, "learning_rate", rate)


def resume(output: Path, *more) -> int:
    return distill.main(["--resume", "--output", str(output), *map(str, more)])


def student(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "model.safetensors")


def history(output: Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_mb", "milliseconds")}
            for line in lines]


def assert_same_end(output: Path, other: Path):
    """The same student, bit for bit, and the same log; and no checkpoint or other remains in the run folder."""
    expected = student(other)
    assert set(student(output)) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student(output).items())
    assert (output / "student" / "lineage.json").read_text() == (other / "student" / "lineage.json").read_text()
    assert history(output) == history(other)
    assert {path.name for path in output.iterdir()} == {"run.json", "log.jsonl", "student"}


def assert_close_student(output: Path, other: Path):
    """The same student up to rounding."""
    assert (output / "student" / "lineage.json").read_text() == (other / "student" / "lineage.json").read_text()
    for name, tensor in student(other).items():
        torch.testing.assert_close(student(output)[name], tensor, rtol=0, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def runs(checkpoint, corpus, tmp_path_factory) -> Runs:
    return Runs(checkpoint, corpus, tmp_path_factory.mktemp("runs"))


# ---- Resume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, more", [
    (3, ()), (2, ("--align-heads", "--compensate")), (3, ("--importance", "platon")), (3, ("--precision", "bf16"))])
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(runs, tmp_path, step, more):
    expected = runs.undisturbed(*more)
    prunes = [line["step"] for line in history(expected) if line["event"] == "prune"]
    assert min(prunes) <= step < max(prunes)  # it is killed between two prunes
    runs.killed(tmp_path / "run", step, *more)
    assert not (tmp_path / "run" / "student").exists()
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", expected)


def test_steps_after_the_last_checkpoint_are_repeated_and_logged_once(runs, tmp_path):
    runs.killed(tmp_path / "run", 8, save_every=3)
    assert max(line["step"] for line in history(tmp_path / "run")) == 8  # two steps ahead of the checkpoint
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"event": "train", "st')  # cut off by the death of the process
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_a_run_without_a_checkpoint_starts_again(runs, tmp_path):
    runs.killed(tmp_path / "run", 4, "--save-minutes", 15)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_a_damaged_checkpoint_is_skipped_in_favour_of_the_one_before(runs, tmp_path, capsys):
    """Two checkpoints are kept, each with its SHA-256 in its name."""
    runs.killed(tmp_path / "run", 7)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name[:15] for path in checkpoints] == ["step-0000000006", "step-0000000007"]
    path = checkpoints[-1]
    assert path.name == f"step-0000000007-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert resume(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert f"{path} is damaged" in printed and "resumed after step 6" in printed
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_an_unreadable_checkpoint_is_skipped_in_favour_of_the_one_before(runs, tmp_path, monkeypatch, capsys):
    runs.killed(tmp_path / "run", 7)
    newest, read_bytes = max((tmp_path / "run" / "checkpoints").iterdir()), Path.read_bytes

    def failing(path):
        if path == newest:
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    assert resume(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert f"{newest} is damaged or cannot be read" in printed and "resumed after step 6" in printed


def test_save_minutes_is_the_time_between_checkpoints(runs, tmp_path, monkeypatch):
    """With steps of 25 seconds; the last step is always saved."""
    clock, steps, training_batch = [0.0], [], MaskedRows.training_batch

    def slow(rows, *rest):
        clock[0] += 25
        return training_batch(rows, *rest)

    monkeypatch.setattr(MaskedRows, "training_batch", slow)
    monkeypatch.setattr("support.session.time",
                        SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))
    monkeypatch.setattr(run_folder, "save_checkpoint", lambda folder, values: steps.append(values["step"]))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    for minutes, expected in ((0, list(range(1, 11))), (1, [3, 6, 9, 10]), (60, [10])):
        steps.clear()
        assert runs.distill(tmp_path / str(minutes), "--save-minutes", minutes) == 0
        assert steps == expected


def test_a_resumed_run_refuses_flags_that_would_change_the_student(runs, checkpoint, corpus, tmp_path, capsys):
    runs.killed(tmp_path / "run", 4)
    other, text = shutil.copytree(checkpoint, tmp_path / "other"), tmp_path / "text.txt"
    (other / "special_tokens_map.json").write_text("{}")
    text.write_text(corpus.read_text() + " and more")
    for more, words in ((("--steps", 11), "--steps was 10 when the run started and is now 11"),
                        (("--learning-rate", 0.5), "--learning-rate was 0.001"),
                        (("--teacher", other), "teacher has changed"), (("--corpus", text), "corpus has changed"),
                        (("--alpha-mlm", 0.5), "--alpha-mlm was 1.0"),
                        (("--preset", "imitation"), "--preset was []"), (("--overwrite",), "excludes --overwrite")):
        assert resume(tmp_path / "run", *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert resume(tmp_path / "run", "--steps", 10, "--eval-rows", 3, "--eval-every", 3, "--log-every", 5,
                  "--save-minutes", 1, "--eval-prunes") == 0


def test_a_run_is_resumed_after_its_teacher_and_its_text_have_moved(runs, checkpoint, corpus, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "teacher")
    shutil.copy(corpus, tmp_path / corpus.name)
    runs.killed(tmp_path / "run", 4, "--teacher", tmp_path / "teacher", "--corpus", tmp_path / corpus.name)
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / corpus.name).unlink()
    assert resume(tmp_path / "run", "--teacher", checkpoint, "--corpus", corpus) == 0
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_a_folder_in_which_a_run_has_not_ended_is_refused(runs, tmp_path, capsys):
    runs.killed(tmp_path / "run", 4)
    before = history(tmp_path / "run")
    with run_folder.claimed(tmp_path / "run"):
        assert resume(tmp_path / "run") == runs.distill(tmp_path / "run", "--overwrite") == 2
    assert capsys.readouterr().err.count("has not ended") == 2
    assert history(tmp_path / "run") == before and resume(tmp_path / "run") == 0


def test_a_run_that_another_one_made_meanwhile_is_not_overwritten(runs, tmp_path, monkeypatch, capsys):
    load_rows = data.load_rows

    def tokenise_slowly(*args, **kwargs):
        shutil.copytree(runs.undisturbed(), tmp_path / "run")
        return load_rows(*args, **kwargs)

    runs.undisturbed()
    monkeypatch.setattr(data, "load_rows", tokenise_slowly)
    assert runs.distill(tmp_path / "run") == 2
    assert "is in use" in capsys.readouterr().err
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_overwriting_a_run_removes_what_was_made_of_it(runs, tmp_path):
    runs.killed(tmp_path / "run", 4)
    (tmp_path / "run" / "tensorboard").mkdir()
    assert runs.distill(tmp_path / "run", "--overwrite") == 0
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_overwriting_a_run_forgets_checkpoints_behind_a_link_and_leaves_them_where_they_are(runs, tmp_path):
    output, elsewhere = runs.killed(tmp_path / "run", 3), tmp_path / "elsewhere"
    (output / "checkpoints").rename(elsewhere)
    (output / "checkpoints").symlink_to(elsewhere)
    runs.killed(output, 0, "--overwrite")
    assert not (output / "checkpoints").exists() and len(list(elsewhere.iterdir())) == 2


def test_a_checkpoint_that_another_run_saves_meanwhile_is_not_overlooked(runs, tmp_path, monkeypatch, capsys):
    output, claimed = runs.killed(tmp_path / "run", 3), run_folder.claimed

    def after_the_other(output):
        (output / "checkpoints" / "step-0000000009-late.pt").touch()
        return claimed(output)

    monkeypatch.setattr(run_folder, "claimed", after_the_other)
    assert resume(output) == 2
    assert "has only just stopped: repeat the command" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--output", "--cache-dir"])
def test_a_folder_of_text_cannot_hold_the_run_or_the_cache(runs, corpus, tmp_path, capsys, flag):
    """Their files would be read as text when the run is resumed."""
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(corpus, texts / "text.txt")
    assert runs.distill(tmp_path / "run", "--corpus", texts, flag, texts / "inside") == 2
    assert f"{texts / 'inside'} is in the corpus {texts}" in capsys.readouterr().err
    assert [path.name for path in texts.iterdir()] == ["text.txt"]


def test_the_command_of_a_run_can_be_given_again_with_resume(tmp_path, refused):
    """Although run.json records what the program added to it: the preset demo, and the precision that auto chose."""
    flags = vars(distill.parse_arguments(["--preset", "imitation"])) | {"precision": "fp32", "output": tmp_path}
    record = {"flags": json.loads(json.dumps(flags, default=str))}
    (tmp_path / "run.json").write_text(json.dumps(record | {"checksum": run_folder.record_hash(record)}))
    resume_flags = ["--resume", "--output", str(tmp_path), "--precision", "auto", "--preset"]
    args = distill.parse_arguments([*resume_flags, "imitation"])
    assert args.preset == ["demo", "imitation"] and args.precision == "fp32" and args.alpha_mlm == 0
    assert args.command == "python distill.py --preset imitation"  # of the start, for the model card
    with refused("--preset was ['demo', 'imitation']"):
        distill.parse_arguments([*resume_flags, "compensated"])


def test_a_resumed_run_may_have_another_micro_batch_size(runs, tmp_path):
    """The student is the same up to rounding, but for dropout, whose random numbers depend on the micro-batches."""
    runs.killed(tmp_path / "run", 4, "--dropout", 0, "--micro-batch-size", 6)
    sizes, forward = set(), distill.Distiller.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.Distiller, "forward", lambda self, batch, *rest: (
            sizes.add(len(batch.input_ids)), forward(self, batch, *rest))[1])
        assert resume(tmp_path / "run", "--micro-batch-size", 2) == 0
    assert sizes == {2}
    assert_close_student(tmp_path / "run", runs.undisturbed("--dropout", 0))


def test_resume_needs_an_unfinished_run_of_this_version(runs, tmp_path, capsys, monkeypatch):
    assert distill.main(["--resume"]) == 2 and "needs the folder of the run" in capsys.readouterr().err
    assert resume(tmp_path / "nothing") == 2 and "nothing holds no run" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    shutil.copytree(runs.undisturbed(), tmp_path / "run")
    monkeypatch.setattr(Session, "__init__", lambda *_: pytest.fail("a finished run was resumed"))
    assert resume(tmp_path / "run") == 0 and "is finished" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"processes": 7}))
    assert resume(tmp_path / "run") == 2 and "wrong checksum" in capsys.readouterr().err
    old = {"flags": {"steps": 3}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(old | {"checksum": run_folder.record_hash(old)}))
    assert resume(tmp_path / "run") == 2 and "another version" in capsys.readouterr().err


@pytest.mark.parametrize("native, chosen, other", [(False, "fp32", "bf16"), (True, "bf16", "fp32")])
def test_run_json_records_the_precision_that_auto_chose(runs, tmp_path, monkeypatch, capsys, native, chosen, other):
    """Resuming on another device therefore keeps it."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    runs.killed(tmp_path / "run", 2, "--precision", "auto")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["flags"]["precision"] == chosen and f", {chosen}" in capsys.readouterr().out
    assert distill.main(["--resume", "--output", str(tmp_path / "run"), "--precision", other]) == 2


def test_resume_refuses_another_teacher_or_another_text(checkpoint, corpus, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "teacher")
    shutil.copy(corpus, tmp_path / "text.txt")
    Runs(tmp_path / "teacher", tmp_path / "text.txt", tmp_path).killed(tmp_path / "run", 4)
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["cls.predictions.bias"][0] += 1
    save_file(weights, tmp_path / "teacher" / "model.safetensors")
    assert resume(tmp_path / "run") == 2 and "the teacher has changed" in capsys.readouterr().err
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "teacher" / "model.safetensors")
    with open(tmp_path / "text.txt", "a") as text:
        text.write("\n\nmore\n")
    assert resume(tmp_path / "run") == 2 and "the corpus has changed" in capsys.readouterr().err


def test_run_json_records_flags_versions_and_fingerprints(runs, checkpoint):
    record = json.loads((runs.undisturbed() / "run.json").read_text())
    assert record["teacher"] == model_fingerprint(checkpoint) and len(record["corpus"]) == 32
    assert record["flags"]["steps"] == 10 and record["flags"]["seed"] == 0 and record["processes"] == 1
    assert set(record["versions"]) == {"python", "torch", "numpy", "tokenizers", "safetensors", "commit"}
    assert torch.__version__.startswith(record["versions"]["torch"])


# ---- Signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_before_the_next_micro_batch_and_saves_the_last_finished_step(runs, tmp_path, monkeypatch,
                                                                                     capsys, number):
    """It comes in the first of two micro-batches of the sixth step."""
    training_batch, batches = MaskedRows.training_batch, []

    def signalled(rows, seed, step, *rest):
        batches.append(step)
        if batches.count(5) == 1:
            os.kill(os.getpid(), number)
        return training_batch(rows, seed, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedRows, "training_batch", signalled)
        assert runs.distill(tmp_path / "my run", "--micro-batch-size", 4) == 128 + number
    assert batches == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "interrupted after step 5, which is saved" in error
    assert f"to resume: python distill.py --resume --output '{tmp_path / 'my run'}'\n" in error
    assert not (tmp_path / "my run" / "student").exists()
    assert [path.name[:15] for path in (tmp_path / "my run" / "checkpoints").iterdir()] == ["step-0000000005"]
    assert resume(tmp_path / "my run") == 0
    assert_same_end(tmp_path / "my run", runs.undisturbed("--micro-batch-size", 4))


def test_a_signal_is_answered_at_once_and_a_second_one_ends_the_process(capfd):
    before = signal.getsignal(signal.SIGINT)  # in the background of a shell it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), graceful_stop() as received:
            assert not received
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert "saving and stopping after this micro-batch or evaluation" in capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_several_processes_outlive_a_second_signal_which_torchrun_may_pass_on(monkeypatch):
    monkeypatch.setattr(session, "WORLD", 2)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would have ended"))
    with graceful_stop() as received:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] * 2


def test_a_signal_during_the_exchange_between_processes_is_reported_to_all_in_the_next_one(monkeypatch):
    """The others have not heard of it, so that this process must not stop alone; but it must not forget it either."""
    saved = []
    with graceful_stop() as received:
        session = SimpleNamespace(signals=received, save=saved.append, args=SimpleNamespace(output="run"))
        state = SimpleNamespace(step=3)
        monkeypatch.setattr(distributed, "all_gather_objects", lambda value: (
            os.kill(os.getpid(), signal.SIGTERM), [value, 0])[1])
        Session.stop_on_signal(session, state)
        assert not saved
        monkeypatch.setattr(distributed, "all_gather_objects", lambda value: [value, 0])
        with pytest.raises(Interrupted) as caught:
            Session.stop_on_signal(session, state)
    assert saved == [state] and caught.value.args[1] == 128 + signal.SIGTERM


# ---- Memory and processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 2 GiB")], ids=str)
def test_a_full_memory_is_reported_in_one_line(runs, tmp_path, monkeypatch, capsys, failure):
    def full(*_):
        raise failure

    monkeypatch.setattr(distill.Distiller, "forward", full)
    assert runs.distill(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--micro-batch-size" in error


@pytest.mark.parametrize("error, printed", [(LocalError("mine"), "p: error: mine\n"), (InputError("of all"), "")])
def test_of_several_processes_one_prints_a_common_error_and_each_its_own(monkeypatch, capsys, error, printed):
    def work():
        raise error

    monkeypatch.setattr(distributed, "RANK", 1)
    assert run_program("p", work, "", "") == 2
    assert capsys.readouterr().err == printed


def test_an_error_of_the_program_keeps_its_stack_trace(runs, tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(distill.Distiller, "forward", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        runs.distill(tmp_path / "run")


def test_the_micro_batch_size_follows_from_the_free_memory_and_is_recorded(monkeypatch, runs):
    """BERT-base needs less than 300 MB per row of 128 tokens, and no model gets fewer rows than one."""
    config = SimpleNamespace(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, vocab_size=30522)

    def chosen(device="cuda", free=80e9, batch_size=4096, deterministic=False):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(80e9)))
        return Session.default_micro_batch_size(SimpleNamespace(
            args=SimpleNamespace(seq_length=128, batch_size=batch_size, deterministic=deterministic),
            teacher=SimpleNamespace(config=config), device=torch.device(device)))

    assert chosen(device="cpu") == 64 and chosen(device="cpu", batch_size=10) == 10
    assert json.loads((runs.undisturbed() / "run.json").read_text())["flags"]["micro_batch_size"] == 6
    assert 80e9 / 2 / 300e6 < chosen() < 80e9 / 50e6
    assert chosen() == pytest.approx(2 * chosen(free=40e9), abs=1) and chosen(free=1000) == 1
    assert chosen(free=40e9, deterministic=True) == chosen()  # what other programs leave free may vary


def test_fewer_rows_than_processes_are_refused(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.session.WORLD", 7)
    assert runs.distill(tmp_path / "run") == 2
    assert "must be at least 7, the number of processes" in capsys.readouterr().err


def test_every_row_belongs_to_one_process(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setattr(distributed, "WORLD", world)
        for rows in (1, 5, 7, 64):
            slices = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "RANK", rank)
                slices.append(distributed.rank_slice(rows))
            assert [first for first, _ in slices] == [0] + [last for _, last in slices][:-1] and slices[-1][1] == rows
            assert max(last - first for first, last in slices) - min(last - first for first, last in slices) <= 1
