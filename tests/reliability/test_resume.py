"""Runs that are killed at every kind of step, often, or by a full disk, and checkpoints that are damaged."""

from pathlib import Path

import pytest
from test_session import Runs, assert_same_end, dies, history, resume

import distill
from support import checkpoint as checkpoint_files


@pytest.fixture(scope="module")
def runs(checkpoint, corpus, tmp_path_factory) -> Runs:
    return Runs(checkpoint, corpus, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("more", [
    (), ("--micro-batch-size", 4), ("--align-heads", "--compensate"), ("--importance", "platon"), ("--alpha-mlm", 0)])
@pytest.mark.parametrize("step", [0, 1, 3, 6, 9])
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(runs, tmp_path, more, step):
    """Killed before the first prune, between two of them, in the step of one, after the last one, in the last step."""
    expected = runs.undisturbed(*more)
    prunes = [line["step"] for line in history(expected) if line["event"] == "prune"]
    assert {2, 4} <= set(prunes) and min(prunes) <= 2 and max(prunes) <= 7
    runs.killed(tmp_path / "run", step, *more)
    assert not (tmp_path / "run" / "student").exists()
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", expected)


def test_a_run_can_be_resumed_many_times(runs, tmp_path):
    runs.killed(tmp_path / "run", 2)
    with pytest.MonkeyPatch.context() as patch:
        for step in (3, 5, 6):
            dies(patch, step, lambda: resume(tmp_path / "run"))
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", runs.undisturbed())


@pytest.mark.parametrize("init", ["truncated", "random"])
def test_a_run_that_starts_at_the_target_shape_is_resumed_bit_for_bit(runs, tmp_path, init):
    runs.killed(tmp_path / "run", 5, "--init", init, save_every=2)
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", runs.undisturbed("--init", init))


def test_after_a_failed_export_no_step_is_repeated(runs, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_model", full)
        assert runs.distill(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and "--resume" in error
    assert not (tmp_path / "run" / "student").exists()
    monkeypatch.setattr(distill, "learning_rate", lambda *_: pytest.fail("a step was repeated"))
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_a_full_disk_stops_the_run_and_leaves_the_older_checkpoints(runs, tmp_path, capsys):
    write = Path.write_bytes

    def full(path, content):
        if list((tmp_path / "run" / "checkpoints").glob("step-0000000004*")):
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert runs.distill(tmp_path / "run", "--save-minutes", 0) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error
    names = {path.name[:15] for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-0000000003", "step-0000000004"}
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", runs.undisturbed())


def test_damage_to_a_checkpoint_is_always_noticed(runs, tmp_path, capsys):
    runs.killed(tmp_path / "run", 3, save_every=3)
    path, = (tmp_path / "run" / "checkpoints").iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 3], whole[:10] + bytes([whole[10] ^ 8]) + whole[11:], whole[:-1]):
        path.write_bytes(damaged)
        assert resume(tmp_path / "run") == 2
        out, error = capsys.readouterr()
        assert "step-0000000003" in out and "damaged" in out
        assert error.count("\n") == 1 and "no checkpoint" in error and "--overwrite" in error
