"""The benchmarks at a toy shape: all systems compute the same, and the counted work is the work that is done."""

import json
import sys

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

import prune  # noqa: E402

CPU = torch.device("cpu")
CONFIG, SEQ_LENGTH, ROWS = systems.SHAPES["toy"]


@pytest.fixture
def toy():
    return systems.build("toy", list(systems.SYSTEMS), CPU, bf16=False)


@pytest.fixture
def batch():
    return systems.random_batch("toy", ROWS, CPU)


def test_losses_gradients_updates_and_sensitivities_of_the_systems_agree(toy, batch):
    for _ in range(3):
        for system in toy.values():
            system.step([batch])
        systems.check_agreement(toy, batch, "after a step")
    per_weight = dict(toy["research code"].sensitivity)
    for group, ours in toy["ours"].sensitivity.items():
        summed = torch.zeros_like(ours)
        for name, (_, dimensions) in toy["research code"].prunable.items():
            for dimension in [d for d, g in dimensions.items() if g == group and "projection" not in name]:
                summed += per_weight[name].sum(1 - dimension) if per_weight[name].dim() == 2 else per_weight[name]
        torch.testing.assert_close(toy["stock-best"].sensitivity[group], ours, rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(summed, ours, rtol=1e-2, atol=1e-6)


def test_a_system_that_computes_something_else_is_found(monkeypatch):
    correct = systems.ResearchDistiller.project_hidden
    monkeypatch.setattr(systems.ResearchDistiller, "project_hidden", lambda *args: [x * 1.01 for x in correct(*args)])
    with pytest.raises(RuntimeError, match="research code does not agree with ours at full width"):
        systems.check_all("toy", CPU)


def test_masked_units_stay_zero_through_steps(toy, batch):
    ours = toy["ours"]
    ours.prune_to(ours.target_shape, prune.unit_importance("magnitude", {}, ours.distiller.student, 0))
    for name in systems.PEERS:
        toy[name].prune_to(ours.target_shape, ours.lineage)
        toy[name].step([batch])
        words = toy[name].distiller.student.bert.embeddings.word_embeddings.weight
        assert words.any(0).nonzero().flatten().tolist() == ours.lineage["hidden"].tolist()
        rows = toy[name].distiller.student.bert.encoder.layer[1].intermediate.dense.weight.any(1)
        assert rows.nonzero().flatten().tolist() == ours.lineage["feed_forward.1"].tolist()


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_counted_flops_are_those_that_torch_counts(toy, batch, name):
    """With plain attention, because torch counts what fused attention computes twice."""
    system, target_shape = toy[name], toy["ours"].target_shape
    for shape in (prune.Shape.of(CONFIG), target_shape):
        if shape == target_shape and name == "ours":
            system.prune_to(shape, prune.unit_importance("magnitude", {}, system.distiller.student, 0))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            system.losses(batch)["loss"].backward()
        counted = system.flops_per_token(CONFIG, SEQ_LENGTH, shape)
        assert counter.get_total_flops() == pytest.approx(counted * ROWS * SEQ_LENGTH, rel=1e-9)


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        returned = result if isinstance(result, (tuple, list)) else [result]
        self.shapes |= {tuple(tensor.shape) for tensor in returned if isinstance(tensor, torch.Tensor)}
        return result

    def wasteful(self) -> set[str]:
        names = {(SEQ_LENGTH, ROWS * CONFIG.num_attention_heads * SEQ_LENGTH**2): "scores of every head",
                 (CONFIG.vocab_size, ROWS * SEQ_LENGTH * CONFIG.vocab_size): "logits at all positions"}
        return {names[key] for s in self.shapes if s and (key := (s[-1], torch.Size(s).numel())) in names}


@pytest.mark.parametrize(("name", "expected"), [
    ("ours", set()), ("stock-best", set()), ("research code", {"scores of every head", "logits at all positions"})])
def test_only_research_code_has_tensors_of_all_heads_or_all_positions(toy, batch, name, expected):
    with Shapes() as recorder:
        toy[name].step([batch])
    assert (ROWS, SEQ_LENGTH, SEQ_LENGTH) in recorder.shapes  # the averaged scores
    assert recorder.wasteful() == expected


@pytest.mark.parametrize("name", ["base-cpu", "small-cpu"])
def test_the_tables_in_the_documentation_are_those_of_the_saved_results(name):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    documentation = (ROOT / "docs" / "performance.md").read_text()
    for line in table.throughput_table(result).splitlines():
        assert not line.startswith("|") or line in documentation


def test_gpu_checks_pass_on_the_cpu_and_find_errors(monkeypatch, capsys):
    assert gpu.check_bf16("toy", CPU)["rank_correlation"] > gpu.RANK_CORRELATION
    gpu.check_prune("toy", CPU)
    monkeypatch.setattr(gpu, "LOSS_ERROR", 0)
    with pytest.raises(SystemExit, match="losses in bf16"):
        gpu.check_bf16("toy", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
