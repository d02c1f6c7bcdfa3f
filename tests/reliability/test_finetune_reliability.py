"""Fine-tuning that is interrupted, fails, runs twice at a time or in several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from made_up_tasks import write_glue
from safetensors.torch import load_file

import finetune


@pytest.fixture
def argv(checkpoint, tmp_path) -> list[str]:
    """Flags of a small model and task, with the output folder tmp_path/out."""
    source = write_glue("rte", tmp_path / "RTE")
    return ["--model", str(checkpoint), "--task", "rte", "--data", str(source), "--device", "cpu", "--max-steps", "1",
            "--output", str(tmp_path / "out")]


def stored(output: Path) -> list[dict]:
    """All results by seed, each with its folder."""
    results = [json.loads(path.read_text()) | {"folder": path.parent} for path in output.glob("*/[!.]*/result.json")]
    return sorted(results, key=lambda result: result["seed"])


def test_an_interrupted_run_continues_with_the_same_command(argv, tmp_path, capsys, monkeypatch):
    fine_tune, calls = finetune.fine_tune, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fine_tune(*arguments)

    monkeypatch.setattr(finetune, "fine_tune", interrupted)
    assert finetune.main([*argv, "--seeds", "0", "1"]) == 130
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "run the same command again" in message
    (first,) = stored(tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_dir()] == [
        first["folder"].parent, first["folder"]]
    assert finetune.main([*argv, "--seeds", "0", "1"]) == 0
    assert [entry["seed"] for entry in stored(tmp_path / "out")] == [0, 1] and len(calls) == 3
    assert stored(tmp_path / "out")[0] == first


@pytest.mark.parametrize("error, code, hint", [
    (OSError("No space left on device"), 2, "run the same command again"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--batch-size"),
    (KeyboardInterrupt(), 130, "run the same command again")])
def test_a_failure_is_one_line_and_leaves_no_partial_model(error, code, hint, argv, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(finetune, "save_tokenizer", fail)
    assert finetune.main(argv) == code
    message = capsys.readouterr().err
    assert message.startswith("finetune.py: ") and message.count("\n") == 1 and hint in message
    assert not list((tmp_path / "out").glob("*/[!.]*"))


def test_a_killed_run_loses_only_the_result_it_was_computing(argv, tmp_path):
    command = [sys.executable, str(ROOT / "finetune.py"), *argv, "--seeds", *map(str, range(40))]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not stored(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = stored(tmp_path / "out")
    assert 0 < len(before) < 40
    seeds = map(str, range(len(before) + 1))
    assert finetune.main([*argv, "--seeds", *seeds]) == 0
    assert stored(tmp_path / "out")[:-1] == before
    for entry in stored(tmp_path / "out"):
        assert (entry["folder"] / "model.safetensors").is_file()


def test_two_calls_at_a_time_keep_each_others_results(argv, tmp_path, monkeypatch):
    read_task = finetune.read_task

    def meanwhile(*arguments):
        monkeypatch.setattr(finetune, "read_task", read_task)
        assert finetune.main([*argv, "--seeds", "1"]) == 0
        return read_task(*arguments)

    monkeypatch.setattr(finetune, "read_task", meanwhile)
    assert finetune.main([*argv, "--seeds", "0"]) == 0
    assert [entry["seed"] for entry in stored(tmp_path / "out")] == [0, 1]


def test_the_program_exits_with_2_after_a_one_line_error(tmp_path):
    command = [sys.executable, str(ROOT / "finetune.py"), "--model", "x", "--task", "imdb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "imdb" in done.stderr


def test_several_processes_share_the_jobs(checkpoint, tmp_path):
    """Two processes and three seeds give the same results as one process, each of them computed once."""
    source = write_glue("sst2", tmp_path / "SST-2", train=12, dev=12)
    argv = ["--model", str(checkpoint), "--task", "sst2", "--data", str(source), "--seeds", "0", "1", "2",
            "--max-steps", "2", "--device", "cpu", "--dropout", "0.1"]
    assert finetune.main([*argv, "--output", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "finetune.py"]
    done = subprocess.run([*torchrun, *argv, "--output", str(tmp_path / "two")], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dev, percent") == 1
    one, two = (stored(tmp_path / name) for name in ("one", "two"))
    assert [entry["seed"] for entry in two] == [0, 1, 2]
    for entry, other in zip(one, two, strict=True):
        assert entry["metrics"] == other["metrics"]
        first, second = (load_file(e["folder"] / "model.safetensors") for e in (entry, other))
        for name, tensor in first.items():  # up to rounding, because the numbers of threads differ
            torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=name)
    heads = [load_file(entry["folder"] / "model.safetensors")["classifier.weight"] for entry in one]
    assert not torch.allclose(heads[0], heads[1], rtol=0, atol=1e-3)  # seeds differ by far more than rounding
