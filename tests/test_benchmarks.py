"""The benchmarks at a toy shape: what they compare is the same computation, and what they count is what is computed."""

import copy
import gc
import json
import sys
import types

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import systems  # noqa: E402
import table  # noqa: E402
import throughput  # noqa: E402
import tokenise  # noqa: E402
import tricks  # noqa: E402

import prune  # noqa: E402

CPU = torch.device("cpu")
PEERS = ("stock-best", "usual")
THREADS = ["--threads", str(torch.get_num_threads())]
ARGUMENTS = ["--shape", "toy", "--device", "cpu", "--quick", "--repeats", "2", *THREADS]
CONFIG, SEQ_LENGTH, ROWS = systems.SHAPES["toy"]


@pytest.fixture
def toy():
    return systems.build("toy", list(systems.SYSTEMS), CPU, bf16=False)


@pytest.fixture
def batch():
    return systems.random_batch("toy", ROWS, CPU)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "toy.json"
    assert throughput.main([*ARGUMENTS, "--json", str(path)]) == 0
    return path


def test_throughput_rows(measured):
    result = json.loads(measured.read_text())
    rows = {(row["width"], row["system"]): row for row in result["rows"]}
    assert set(rows) == {(w, s) for w in (32, 24, 16, "run") for s in systems.SYSTEMS}
    for (width, system), row in rows.items():
        low, high = row["spread"]
        assert row["shape"] == "toy" and 0 < low <= row["tokens_per_second"] <= high
        assert 0 < row["utilisation"] < 1.5 and row["peak_memory"] > 10
        assert ("ratio" in row) == (system != "ours") and ("cut_share" in row) == ((width, system) == ("run", "ours"))
    assert 0 < rows["run", "ours"]["cut_share"] < 1
    assert rows["run", "usual"]["flops_per_token"] == pytest.approx(rows[32, "usual"]["flops_per_token"])
    ours = [rows[width, "ours"]["flops_per_token"] for width in (32, "run", 16)]
    assert ours == sorted(ours, reverse=True)
    assert result["matrix_product_flops"] > 0 and result["versions"]["torch"] and result["date"] and result["machine"]


def test_peers_that_compute_something_else_are_not_timed(monkeypatch, tmp_path):
    right = systems.UsualDistiller.hidden_loss
    monkeypatch.setattr(systems.UsualDistiller, "hidden_loss", lambda *args: right(*args) * 1.002)
    with pytest.raises(RuntimeError, match="usual does not agree with ours at full width"):
        throughput.main([*ARGUMENTS, "--json", str(tmp_path / "no.json")])
    assert not (tmp_path / "no.json").exists()


def test_peers_stay_together_through_steps(toy, batch):
    """Not the losses alone: gradients, clipping, optimizer and unit sensitivities, too."""
    for _ in range(3):
        for system in toy.values():
            system.step([batch])
        systems.check_agreement(toy, batch, "after a step")
    full = dict(toy["usual"].sensitivity)
    for units, ours in toy["ours"].sensitivity.items():
        usual = torch.zeros_like(ours)
        for name, (_, dimensions) in toy["usual"].cuttable.items():
            for dimension in [d for d, u in dimensions.items() if u == units]:
                usual += full[name].sum(1 - dimension) if full[name].dim() == 2 else full[name]
        torch.testing.assert_close(toy["stock-best"].sensitivity[units], ours, rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(usual, ours, rtol=1e-2, atol=1e-6)


def test_masks_hold_through_steps(toy, batch):
    ours = toy["ours"]
    ours.narrow(ours.last, prune.unit_importance("magnitude", ours.distiller, {}, 0))
    for name in PEERS:
        toy[name].narrow(ours.last, ours.lineage)
        toy[name].step([batch])
        words = toy[name].distiller.student.bert.embeddings.word_embeddings.weight
        assert words.any(0).nonzero().flatten().tolist() == ours.lineage["hidden"].tolist()
        rows = toy[name].distiller.student.bert.encoder.layer[1].intermediate.dense.weight.any(1)
        assert rows.nonzero().flatten().tolist() == ours.lineage["feed_forward.1"].tolist()


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_flops_are_those_that_torch_counts(toy, batch, name):
    """Exactly, with attention in its plain form: torch counts what fused attention computes twice."""
    system, widths = toy[name], toy["ours"].last
    for narrow in (False, True):
        if narrow and name == "ours":
            system.narrow(widths, prune.unit_importance("magnitude", system.distiller, {}, 0))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            system.losses(batch)["loss"].backward()
        counted = system.flops_per_token(CONFIG, SEQ_LENGTH, widths if narrow else prune.Widths.of(CONFIG))
        assert counter.get_total_flops() == pytest.approx(counted * ROWS * SEQ_LENGTH, rel=1e-9)


class Shapes(TorchDispatchMode):
    """The shapes of everything that any operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        returned = result if isinstance(result, (tuple, list)) else [result]
        self.seen |= {tuple(tensor.shape) for tensor in returned if isinstance(tensor, torch.Tensor)}
        return result

    def wasteful(self) -> set[str]:
        names = {(SEQ_LENGTH, ROWS * CONFIG.num_attention_heads * SEQ_LENGTH**2): "scores of every head",
                 (CONFIG.vocab_size, ROWS * SEQ_LENGTH * CONFIG.vocab_size): "logits at all positions"}
        return {names[key] for s in self.seen if s and (key := (s[-1], torch.Size(s).numel())) in names}


@pytest.mark.parametrize(("name", "expected"), [
    ("ours", set()), ("stock-best", set()), ("usual", {"scores of every head", "logits at all positions"})])
def test_no_tensor_of_all_heads_or_all_positions(toy, batch, name, expected):
    with Shapes() as shapes:
        toy[name].step([batch])
    assert (ROWS, SEQ_LENGTH, SEQ_LENGTH) in shapes.seen  # the averaged scores
    assert shapes.wasteful() == expected


def test_table_round_trip(measured, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    result = json.loads(measured.read_text())
    (results / "toy.json").write_text(json.dumps(result))
    (results / "other.json").write_text(json.dumps({"bf16": 1}))
    arguments = ["--readme", str(readme), "--results", str(results)]
    readme.write_text("no marks")
    assert table.main(arguments) == 1 and readme.read_text() == "no marks"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.main([*arguments, "--check"]) == 1 and "old" in readme.read_text()
    assert table.main(arguments) == 0 and table.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert f"| 24 | {result['rows'][1]['tokens_per_second']:,.0f} |" in text and "| whole run |" in text
    assert table.main(arguments) == 0 and readme.read_text() == text
    result["rows"][1]["tokens_per_second"] *= 2
    (results / "toy.json").write_text(json.dumps(result))
    assert table.main([*arguments, "--check"]) == 1


def test_tokenise(corpus, tmp_path):
    path = tmp_path / "tokenise.json"
    assert tokenise.main(["--corpus", str(corpus), "--repeats", "1", *THREADS, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    once, four = result["tokenise"]
    assert four["tokens"] == 4 * once["tokens"] > 0 and min(once["tokens_per_second"], once["peak_memory"]) > 0
    assert 0 < result["batch_seconds"] < result["step_seconds"]
    assert "| 4 x |" in table.tables(tmp_path)


EXACT = {name: system for name, system in tricks.TRICKS.items()
         if system not in (tricks.CompiledLayers, tricks.NoBookkeeping)}  # compiling takes a minute


@pytest.mark.parametrize("name", EXACT)
def test_a_trick_changes_no_step(batch, name):
    """Weights after two steps; a trick that computes something else could not be compared."""
    steps = []
    for system in (systems.Ours, EXACT[name]):
        torch.manual_seed(0)
        bert = systems.Bert(copy.copy(CONFIG), pooler=False)
        made = system(bert, copy.deepcopy(bert), copy.copy(CONFIG), CPU, False)
        for _ in range(2):
            made.step([batch])
        steps.append(dict(made.distiller.named_parameters()))
    for parameter, tensor in steps[0].items():
        torch.testing.assert_close(steps[1][parameter], tensor, rtol=1e-4, atol=1e-6)


def test_tricks_as_a_program(monkeypatch, tmp_path):
    monkeypatch.setattr(tricks, "TRICKS", dict(list(EXACT.items())[:1]))
    sizes, steps = [], []
    monkeypatch.setattr(tricks, "random_batch", lambda *of: sizes.append(of[1]) or systems.random_batch(*of))
    monkeypatch.setattr(systems.Ours, "step", lambda self, batches, real=systems.Ours.step: (
        steps.append(type(self)), real(self, batches)))
    assert tricks.main(["--shape", "toy", "--device", "cpu", "--repeats", "2", "--batch-size", "2", *THREADS,
                        "--json", str(tmp_path / "tricks.json")]) == 0
    assert sizes == [2] and len(steps) == 2 * 2 * (2 + 2)  # systems, widths, repeats and two to warm up
    rows = json.loads((tmp_path / "tricks.json").read_text())["tricks"]
    assert [(row["trick"], row["width"]) for row in rows] == [("grouped Q, K, V", 32), ("grouped Q, K, V", 16)]
    assert all(low <= median <= high for median, low, high in (row["gain"] for row in rows))
    assert "| grouped Q, K, V | 16 |" in table.tables(tmp_path)


def test_gpu_script_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_gpu_checks_where_they_can_run(monkeypatch):
    assert gpu.bf16_beside_float32("toy", CPU)["rank_correlation"] > gpu.RANK_CORRELATION
    gpu.cut_equals_cpu("toy", CPU)
    monkeypatch.setattr(gpu, "LOSS_ERROR", 0)
    with pytest.raises(SystemExit, match="losses in bf16"):
        gpu.bf16_beside_float32("toy", CPU)


def test_gpu_check_of_interrupted_runs(tmp_path, checkpoint, corpus, monkeypatch):
    """It passes on the CPU, and finds a student that is not the same."""
    flags = ["--teacher", str(checkpoint), "--corpus", str(corpus), "--cache-dir", str(tmp_path / "cache"),
             "--steps", "300", "--batch-size", "4", "--seq-length", "16", "--device", "cpu", "--eval-every", "150"]
    gpu.interrupted_ends_the_same(tmp_path, flags)
    assert (tmp_path / "interrupted" / "student").is_dir()
    real, codes = gpu.load_file, iter((0, 0, 143, 0))
    done = types.SimpleNamespace(
        returncode=0, wait=lambda: next(codes), poll=lambda: 0, terminate=lambda: None)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command: done)  # the runs are there already
    monkeypatch.setattr(gpu, "load_file", lambda path: {
        name: tensor + (path.parent.parent.name == "interrupted") for name, tensor in real(path).items()})
    with pytest.raises(SystemExit, match="a resumed run ends elsewhere"):
        gpu.interrupted_ends_the_same(tmp_path, flags)


def test_gpu_memory_check_by_the_tensors_alive(monkeypatch):
    """The check that needs a GPU's allocator, with a count of living tensors in its place, and with a leak."""
    def alive(_):
        gc.collect()
        storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    gc.freeze()  # what is here already is not counted
    monkeypatch.setattr(torch.cuda, "memory_allocated", alive)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"requested_bytes.all.current": alive(device)})
    seen = gpu.memory_falls("toy", CPU)
    assert seen[0]["hidden"] == 32 and seen[-1]["hidden"] == 16
    leak, cut = [], prune.cut
    monkeypatch.setattr(prune, "cut", lambda model, *rest: (leak.extend(model.parameters()), cut(model, *rest)))
    with pytest.raises(SystemExit, match="a cut frees"):
        gpu.memory_falls("toy", CPU)
    gc.unfreeze()
