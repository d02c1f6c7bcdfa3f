"""The benchmarks as programs, which start processes, and the GPU checks that run distill.py."""

import gc
import json
import sys
import types

import pytest
import torch
from conftest import ROOT

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import systems  # noqa: E402
import throughput  # noqa: E402
import tokenise  # noqa: E402

import prune  # noqa: E402

CPU = torch.device("cpu")
THREADS = ["--threads", str(torch.get_num_threads())]


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_throughput_measures_every_system_at_every_width(tmp_path, capsys, monkeypatch, precision, dtype):
    """And the rate of a matmul in the same precision."""
    dtypes, rate = [], throughput.matmul_rate
    monkeypatch.setattr(throughput, "matmul_rate", lambda matrix: dtypes.append(matrix.dtype) or (
        rate(matrix) if precision == "fp32" else 1e10))  # emulated bf16 is slow
    path = tmp_path / "toy.json"
    arguments = ["--shape", "toy", "--device", "cpu", "--quick", "--repeats", "2", *THREADS, "--json", str(path),
                 "--precision", precision]
    assert throughput.main(arguments) == 0
    result = json.loads(path.read_text())
    assert result["precision"] == precision and set(dtypes) == {dtype}
    rows = {(row["width"], row["system"]): row for row in result["rows"]}
    assert set(rows) == {(width, system) for width in (32, 24, 16, "run") for system in ("ours", *systems.PEERS)}
    for (width, system), row in rows.items():
        low, high = row["spread"]
        assert row["shape"] == "toy" and 0 < low <= row["tokens_per_second"] <= high
        assert 0 < row["utilisation"] < (1.5 if precision == "fp32" else 10) and row["peak_memory"] > 10
        assert ("ratio" in row) == (system != "ours") and ("prune_share" in row) == ((width, system) == ("run", "ours"))
    assert 0 < rows["run", "ours"]["prune_share"] < 1
    masked = [rows[width, "research code"]["flops_per_token"] for width in ("run", 32)]
    assert masked[0] == pytest.approx(masked[1])  # masks save nothing
    ours = [rows[width, "ours"]["flops_per_token"] for width in (32, "run", 16)]
    assert ours == sorted(ours, reverse=True)
    assert result["matmul_flops_per_second"] > 0 and result["versions"]["torch"] and result["date"]
    text = capsys.readouterr().out
    assert f"| 24 | {rows[24, 'ours']['tokens_per_second']:,.0f} |" in text and "| whole run |" in text


def test_all_processes_have_the_same_allocator_settings(monkeypatch):
    calls = []
    monkeypatch.setattr(throughput, "tune_malloc", lambda: calls.append(1))
    for name in ("ours", *systems.PEERS):
        throughput.start(name, "toy", CPU, False, torch.get_num_threads(), [1])
        throughput.SYSTEM.clear()
        throughput.BATCHES.clear()
    assert len(calls) == 1 + len(systems.PEERS)


def test_every_system_has_the_precision_that_was_asked_for():
    for name in ("ours", *systems.PEERS):
        throughput.start(name, "toy", CPU, True, torch.get_num_threads(), [1])
        (system,), dtypes = throughput.SYSTEM, []
        system.teacher.register_forward_hook(lambda *call, seen=dtypes: seen.append(call[-1].logits.dtype))
        system.losses(throughput.BATCHES[0])
        assert dtypes == [torch.bfloat16]
        throughput.SYSTEM.clear()
        throughput.BATCHES.clear()


def test_kept_units_leave_their_process_on_the_cpu(monkeypatch):
    """Torch refuses to pass on CUDA tensors that came from another process."""
    copied = object()
    ours = types.SimpleNamespace(prune_to=lambda *_: 0.1, sensitivity={},
                                 lineage={"hidden": types.SimpleNamespace(cpu=lambda: copied)})
    monkeypatch.setattr(throughput, "SYSTEM", [ours])
    assert throughput.prune_ours(None) == (0.1, {"hidden": copied})


def test_tokenise_measures_two_sizes_and_a_step(corpus, tmp_path):
    path = tmp_path / "tokenise.json"
    assert tokenise.main(["--corpus", str(corpus), "--repeats", "1", *THREADS, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    once, four = result["tokenise"]
    assert four["tokens"] == 4 * once["tokens"] > 0 and min(once["tokens_per_second"], once["peak_memory"]) > 0
    assert 0 < result["batch_seconds"] < result["step_seconds"]


def test_the_gpu_check_of_interrupted_runs_passes_on_the_cpu_and_finds_another_student(
        tmp_path, checkpoint, corpus, monkeypatch):
    flags = ["--teacher", str(checkpoint), "--corpus", str(corpus), "--cache-dir", str(tmp_path / "cache"),
             "--steps", "100", "--batch-size", "4", "--seq-length", "16", "--device", "cpu", "--eval-every", "50"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    gpu.check_resume(tmp_path, flags)
    assert (tmp_path / "interrupted" / "student").is_dir()
    load_file, codes = gpu.load_file, iter((0, 0, 143, 0))
    finished = types.SimpleNamespace(
        returncode=0, wait=lambda: next(codes), poll=lambda: 0, terminate=lambda: None)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command: finished)  # the runs exist already
    monkeypatch.setattr(gpu, "load_file", lambda path: {
        name: tensor + (path.parent.parent.name == "interrupted") for name, tensor in load_file(path).items()})
    with pytest.raises(SystemExit, match="a resumed run produces another student"):
        gpu.check_resume(tmp_path, flags)


def test_the_gpu_check_of_memory_finds_a_leak(monkeypatch):
    """The check needs a GPU's allocator. Here the bytes of all living tensors take its place."""
    def alive(_):
        gc.collect()
        storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    gc.freeze()  # leaves out what exists already
    monkeypatch.setattr(torch.cuda, "memory_allocated", alive)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"requested_bytes.all.current": alive(device)})
    measured = gpu.check_memory("toy", CPU)
    assert measured[0]["hidden_size"] == 32 and measured[-1]["hidden_size"] == 16
    leak, prune_units = [], prune.prune_units
    monkeypatch.setattr(prune, "prune_units", lambda model, *rest: (
        leak.extend(model.parameters()), prune_units(model, *rest)))
    with pytest.raises(SystemExit, match="a prune frees"):
        gpu.check_memory("toy", CPU)
    gc.unfreeze()
