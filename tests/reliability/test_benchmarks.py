"""The benchmarks at a toy shape: all systems compute the same, and the counted work is the work that is done."""

import contextlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import systems  # noqa: E402
import throughput  # noqa: E402
import traffic  # noqa: E402

import prune  # noqa: E402

CPU = torch.device("cpu")
CONFIG, SEQ_LENGTH, ROWS = systems.SHAPES["toy"]


@pytest.fixture
def toy():
    return systems.build("toy", ["ours", *systems.PEERS], CPU, bf16=False)


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


@pytest.mark.parametrize("name", ["ours", *systems.PEERS])
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


def test_the_compiled_system_is_compiled_and_computes_the_same_before_and_after_a_prune(batch, monkeypatch):
    monkeypatch.setattr(systems.Compiled, "backend", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = {}
    for name in ("ours", "compiled"):  # in this order, because building the latter replaces functions of distill.py
        system = systems.build("toy", [name], CPU, bf16=False)[name]
        losses[name] = [system.losses(batch)]
        system.step([batch])
        system.prune_to(system.target_shape, system.sensitivity)
        losses[name].append(system.losses(batch))
    system.undo.close()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for ours, compiled in zip(*losses.values(), strict=True):
        for name, loss in ours.items():
            torch.testing.assert_close(compiled[name], loss, rtol=1e-4, atol=1e-6)


def test_the_time_of_a_run_includes_the_prunes_of_what_is_pruned(monkeypatch):
    """All steps take a second, and all prunes half a second for every step."""
    names = [*systems.PEERS, "compiled", "ours"]
    monkeypatch.setattr(throughput, "check_all", lambda *_: None)
    monkeypatch.setattr(throughput, "peak_memories", lambda *_: {name: [1.0] * 3 for name in names})
    monkeypatch.setattr(throughput, "time_steps", lambda args, *_: (
        {name: np.ones((2, 3)) for name in names}, np.full((2, 3), 1e9), args.steps / 2))
    result = throughput.measure(SimpleNamespace(
        shape="toy", quick=True, batch_size=3, micro_batch_size=3, steps=300, repeats=2, precision="fp32"), CPU)
    rows = {row["system"]: row for row in result["rows"] if row["width"] == "run"}
    seconds = {name: 3 * SEQ_LENGTH / row["tokens_per_second"] for name, row in rows.items()}
    assert seconds == pytest.approx(dict.fromkeys(systems.PEERS, 1.0) | {"compiled": 1.5, "ours": 1.5})
    assert rows["stock-best"]["ratio"] == pytest.approx([2 / 3] * 3) and rows["compiled"]["ratio"] == [1, 1, 1]
    assert rows["ours"]["prune_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["base-cpu-fp32", "base-cpu-bf16", "small-cpu-fp32", "small-cpu-bf16"])
def test_the_tables_in_the_documentation_are_those_of_the_saved_results(name):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    documentation = (ROOT / "docs" / "performance.md").read_text()
    for line in throughput.table(result).splitlines():
        assert not line.startswith("|") or line in documentation


def test_a_short_schedule_measures_every_shape_once():
    steps_at, measured = throughput.schedule(SimpleNamespace(shape="small", steps=10, quick=False), cuda=False)
    assert len(measured) == len(set(measured)) < 5 and measured[-1] == systems.target(systems.SHAPES["small"][0])


def test_the_kernels_of_attention_on_a_gpu_are_those_of_the_program(monkeypatch):
    for name, answer in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.backends.cuda.enable_cudnn_sdp(True)
    systems.build("toy", [], torch.device("cuda"), bf16=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_gpu_checks_pass_on_the_cpu_and_find_errors(monkeypatch, capsys):
    gpu.check_bf16("toy", CPU)
    shapes, prune_to = [], systems.Ours.prune_to
    with monkeypatch.context() as patch:
        patch.setattr(systems.Ours, "prune_to", lambda ours, *args: (shapes.append(args[0]), prune_to(ours, *args)))
        gpu.check_bf16("toy", CPU, pruned=True)
    assert shapes == 2 * [systems.target(systems.SHAPES["toy"][0])]
    gpu.check_prune("toy", CPU)
    choose_units, calls = prune.choose_units, []

    def other_units_at_the_second_call(importance, *shapes):
        calls.append(shapes)
        keep = choose_units(importance, *shapes)
        return keep | {"hidden": keep["hidden"] - 1} if len(calls) == 2 else keep

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="differs from the CPU's"):
        patch.setattr(prune, "choose_units", other_units_at_the_second_call)
        gpu.check_prune("toy", CPU)
    monkeypatch.setattr(gpu, "LOSS_ERROR", 0)
    with pytest.raises(SystemExit, match="losses in bf16"):
        gpu.check_bf16("toy", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- traffic.py ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compiled", "forward", "backward"), [
    # In multiples of the bytes of h. Eager: gelu 2, add 3, sum 1; backwards gelu 2 and the sum of two gradients 2, each
    # beside a gradient that is one number. Compiled: one kernel reads h; one reads h and writes its gradient.
    (False, 6, 4), (True, 1, 2)])
def test_traffic_is_that_of_a_hand_computed_case(compiled, forward, backward):
    """h = x W with x (64,64,8), W (8,64); sum(gelu(h) + h), by parts, and backwards twice."""
    recorder = traffic.Traffic()

    def elementwise(h):
        return (F.gelu(h) + h).sum()

    if compiled:
        torch._dynamo.reset()
        elementwise = torch.compile(elementwise, backend=recorder.backend, fullgraph=True, dynamic=False)
    with FakeTensorMode():
        x, w = torch.empty(64, 64, 8), torch.empty(8, 64, requires_grad=True)
        for counted in (contextlib.nullcontext(), recorder):  # compiles, and makes the gradient
            recorder.operations.clear()
            with counted:
                recorder.enter("matmul")
                h = x @ w
                recorder.enter("elementwise")
                loss = elementwise(h.flatten(0, 1))
                forward_count = len(recorder.operations)
                loss.backward()
    total, n, x_bytes, w_bytes = {}, 4096 * 64 * 4, 4096 * 8 * 4, 8 * 64 * 4
    for number, operation in enumerate(recorder.operations):
        key = operation.part, number >= forward_count
        total[key] = [a + b for a, b in zip(total.get(key, (0, 0)), operation[2:], strict=True)]
    one_matmul = [2 * 4096 * 8 * 64, x_bytes + w_bytes + n]
    assert total["matmul", False] == total["matmul", True] == one_matmul
    assert total["elementwise", False] == [0, pytest.approx(forward * n, rel=1e-3)]
    assert total["elementwise", True] == [0, pytest.approx(backward * n, rel=1e-3)]
    assert total[traffic.GRADIENTS, True] == [0, 3 * w_bytes]  # the old gradient, the new one, their sum


def test_traffic_of_a_step(toy):
    rows = 1024  # so many that biases and the like do not count
    tokens, d, f, n = rows * SEQ_LENGTH, CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_hidden_layers
    logits = 2 * rows * systems.masked_positions(SEQ_LENGTH) * CONFIG.vocab_size  # bytes in bf16
    for shape in (prune.Shape.of(CONFIG), systems.target(CONFIG)):
        recomputed = 2 * n * tokens * SEQ_LENGTH * shape.num_heads * shape.head_size  # scores, in the backward pass
        flops = systems.Ours.flops_per_token(CONFIG, SEQ_LENGTH, shape) * tokens + recomputed
        totals = {}
        for compiled in (False, True):
            operations = traffic.count(CONFIG, shape, rows, SEQ_LENGTH, compiled)
            assert sum(o.flops for o in operations) == pytest.approx(flops, rel=1e-9)
            assert {o.name for o in operations if o.flops} >= traffic.MATMULS
            for o in operations:
                if o.name not in traffic.MATMULS:
                    totals[o.part, compiled] = totals.get((o.part, compiled), 0) + o.bytes
        # Forward, the kernels read the logits of both and those of the student again; backward, they read both and
        # write a gradient. Beside these there are maxima, sums and labels.
        assert totals["vocabulary losses", True] == pytest.approx(6 * logits, rel=0.05)
        # Squared errors read two tensors, and read them again to write a gradient.
        errors = 5 * 2 * ((n + 1) * tokens * d + n * tokens * SEQ_LENGTH)
        assert totals["other losses, with projections", True] == pytest.approx(errors, rel=0.01)
        # A layer of the teacher: attention and both residual LayerNorms access 4 + 3 + 3 states in bf16, GELU 2, and
        # the division of scores 2; attention writes a number per row and head. Weights are cast.
        layer = 2 * (tokens * (10 * d + 2 * f) + 2 * tokens * SEQ_LENGTH) + 4 * tokens * CONFIG.num_attention_heads
        layer += 6 * (4 * d * d + 2 * d * f)
        assert totals["teacher: layers", True] == pytest.approx(n * layer, rel=0.001)
        if shape == prune.Shape.of(CONFIG):  # AdamW may change weights, gradients and moments, once in 4 micro-batches
            adamw = sum(o.bytes for o in operations if o.name == "_fused_adamw_")
            weights = sum(p.numel() for p in toy["ours"].distiller.parameters())
            assert adamw == pytest.approx(8 * 4 * weights / 4, rel=0.001)


def test_predictions_follow_from_the_schedule(checkpoint, capsys, monkeypatch):
    """A step of one operation, which waits for memory."""
    monkeypatch.setattr(traffic, "count", lambda config, shape, rows, length, compiled: [
        traffic.Operation("all", "mul", 1, shape.hidden_size**2 * rows * length // (1 + compiled))])
    traffic.main(["--teacher", str(checkpoint), "--widths", "16", "32", "--seq-length", "16", "--tflops", "600",
                  "--gb-per-s", "100", "200"])
    output = capsys.readouterr().out
    assert "not measured" in output and "Predicted" in output
    rows = [line.split(" | ") for line in output.splitlines()[-4:]]
    assert [row[1] for row in rows] == ["before", "after"] * 2
    milliseconds = [[float(t) for t in row[2].split(" / ")] for row in rows]
    assert milliseconds[0] == pytest.approx([2 * t for t in milliseconds[2]], rel=0.01)
    for row, (widest, narrowest) in zip(rows, milliseconds, strict=True):
        # The width is 16 + 16 (1 - t / 0.7)^3 in multiples of 8: 32 for 6.4 % of the steps, 24 for 19.5 %, then 16.
        hours = 28_000 * 16 * (0.1615 * widest + 0.8385 * narrowest) / 3.6e6
        assert float(row[3].strip(" |")) == pytest.approx(hours, rel=0.01)
