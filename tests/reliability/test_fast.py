"""Faster training steps (support/fast.py): equal to the textbook forms, compiled few times, and never eager in silence.
The backend aot_eager traces and differentiates as inductor does, and runs the result without generating code."""

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

import data
import distill
import prune
from model import Bert, BertConfig, Layer, LayerNorm
from support import fast
from support.checkpoint import load_model
from support.session import Session

VOCABULARY, LENGTH = 50, 16
CONFIG = BertConfig(vocab_size=VOCABULARY, hidden_size=72, num_hidden_layers=2, num_attention_heads=6,
                    intermediate_size=144, max_position_embeddings=LENGTH, initializer_range=0.2)
TARGET = prune.Shape(36, 72, 3, 12)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make_state(seed: int = 0):
    """A random teacher, and a Distiller whose student is not the teacher, so that all losses have gradients."""
    torch.manual_seed(seed)
    teacher = Bert(copy.copy(CONFIG)).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.set_dropout(0.0)
    for p in student.parameters():
        p.data += 0.05 * torch.randn_like(p)
    alphas = dict.fromkeys(("mlm", "pred", "hidn", "emb", "attn"), 1.0)
    return teacher, distill.Distiller(student, alphas, temperature=1.0).train()


def losses_and_gradients(teacher, distiller, rows: int, bf16: bool = False):
    """Of one batch, which is always the same: {name: loss} and {name: gradient}."""
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
    positions = torch.arange(0, rows * LENGTH, 5)
    batch = data.Batch(tokens, positions, tokens.flatten()[positions])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            target = teacher(batch.input_ids, batch.positions, want_scores=True)
        losses = distiller(batch, target)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    distiller.zero_grad()
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@contextlib.contextmanager
def switched_on(teacher, distiller, backend: str = "aot_eager"):
    with contextlib.ExitStack() as undo:
        fast.switch_on(undo, distiller.student, teacher, distill, backend)
        yield


def compilations(function) -> int:
    return len(torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__))


@pytest.fixture
def no_compilations():
    torch._dynamo.reset()


# ---- When it is on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, steps, deterministic, disabled, expected", [
    (GPU, 28_000, False, "0", True), (GPU, 1_000, False, "0", False), (CPU, 28_000, False, "0", False),
    (GPU, 28_000, True, "0", False), (GPU, 28_000, False, "1", False)])
def test_it_is_on_for_long_runs_on_a_gpu(monkeypatch, device, steps, deterministic, disabled, expected):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", disabled)
    args = SimpleNamespace(steps=steps, batch_size=4096, seq_length=128, deterministic=deterministic)
    teacher = SimpleNamespace(parameter_count=lambda: 110e6)
    assert fast.worth_compiling(SimpleNamespace(args=args, device=device, teacher=teacher)) == expected


def test_every_process_must_have_enough_work(monkeypatch):
    args = SimpleNamespace(steps=28_000, batch_size=4096, seq_length=128, deterministic=False)
    session = SimpleNamespace(args=args, device=GPU, teacher=SimpleNamespace(parameter_count=lambda: 110e6))
    for world, expected in ((8, True), (32, False)):
        monkeypatch.setattr(fast, "WORLD", world)
        assert fast.worth_compiling(session) == expected


# ---- Equal to the textbook forms -----------------------------------------------------------------------------


def test_a_layer_norm_rounds_only_its_output_to_bf16():
    torch.manual_seed(0)
    plain, hooked = LayerNorm(64, 1e-12), LayerNorm(64, 1e-12)
    hooked.register_forward_hook(fast.in_autocast_dtype)
    x = torch.randn(7, 64) * 0.01 + 3  # in bf16, statistics of such values would be far off
    assert hooked(x).dtype == torch.float32 and torch.equal(hooked(x), plain(x))
    compiled = torch.compile(lambda x: hooked(x), fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hooked(x), plain(x).bfloat16()) and torch.equal(compiled(x), hooked(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_losses_equal_the_plain_ones(dtype):
    teacher, distiller = make_state()
    logits, target = torch.randn(2, 9, VOCABULARY).to(dtype).requires_grad_()
    hidden = [torch.randn(2, 8, 6).to(dtype).requires_grad_() for _ in range(3)]
    labels = torch.arange(9)

    def results():
        losses = [*distill.vocabulary_losses(logits, target.detach(), labels, 1.0),
                  distill.mean_mse(hidden, [torch.ones_like(h) for h in hidden])]
        return losses, torch.autograd.grad(sum(losses), [logits, *hidden])

    plain = results()
    with switched_on(teacher, distiller):
        compiled = results()
    # Both compute in float32. Only gradients of bf16 tensors are rounded to bf16, once in each form.
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(compiled[1], plain[1], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_bf16_between_layers_adds_little_to_the_rounding_of_autocast():
    teacher, distiller = make_state()
    exact, exact_gradients = losses_and_gradients(teacher, distiller, rows=4)
    plain = losses_and_gradients(teacher, distiller, rows=4, bf16=True)
    with switched_on(teacher, distiller), torch.compiler.set_stance("force_eager"):  # all of it but the compilation
        quick = losses_and_gradients(teacher, distiller, rows=4, bf16=True)

    def error(gradients):  # relative
        squares = [((gradients[name] - exact_gradients[name]).square().sum(), exact_gradients[name].square().sum())
                   for name in exact_gradients]
        return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()

    # A bf16 number has a relative error of up to 2^-9; the error of one step is some ten times that in both forms.
    print(f"relative error of gradients in bf16: {error(plain[1]):.4f}, with bf16 between layers {error(quick[1]):.4f}")
    assert 0 < error(quick[1]) < 1.5 * error(plain[1])
    torch.testing.assert_close(quick[0], exact, rtol=0.02, atol=0)


# ---- A whole schedule ----------------------------------------------------------------------------------------


def test_a_step_never_becomes_eager_in_silence(no_compilations):
    teacher, distiller = make_state()
    with switched_on(teacher, distiller, "eager"), torch._dynamo.config.patch(recompile_limit=1):
        tokens = torch.zeros(4, LENGTH, dtype=torch.int64)
        teacher(tokens)
        with pytest.raises(FailOnRecompileLimitHit):
            teacher(tokens[:3])  # another batch size


def test_nine_widths_are_compiled_once_and_equal_eager_steps(no_compilations):
    teacher, distiller = make_state()
    full = shape = prune.Shape.of(CONFIG)
    widths = set()
    for step in range(9):
        new_shape = prune.scheduled_shape(step, 0, 8, full, TARGET, granularity=4, power=1)
        if new_shape != shape:
            importance = {group: torch.rand(len(ids)) for group, ids in prune.teacher_indices(distiller).items()}
            keep = prune.choose_units(importance, shape, new_shape)
            prune.prune_units(distiller, keep, new_shape)
            shape = new_shape
        widths.add(shape)
        rows = 3 if step == 4 else 4  # the last micro-batch may be smaller
        losses, gradients = losses_and_gradients(teacher, distiller, rows)
        with switched_on(teacher, distiller):
            quick_losses, quick_gradients = losses_and_gradients(teacher, distiller, rows)
        torch.testing.assert_close(quick_losses, losses, rtol=1e-5, atol=0)
        assert quick_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (quick_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    assert len(widths) == 9 and shape == TARGET
    counts = {f.__name__: compilations(f) for f in (
        fast.student_layer, Layer.forward, distill.vocabulary_losses, distill.mean_mse)}
    print("compilations:", counts)
    assert counts["student_layer"] == counts["vocabulary_losses"] == counts["mean_mse"] == 1
    assert counts["forward"] == 2  # the layers of the teacher, for two batch sizes


def test_rows_of_several_lengths_as_of_a_teacher_without_head_are_compiled_as_rarely(no_compilations):
    teacher, distiller = make_state()
    for rows, length in ((4, 16), (8, 8), (16, 4)):
        ids = torch.zeros(rows, length, dtype=torch.int64)
        with switched_on(teacher, distiller):
            teacher(ids)
            distiller.student(ids).hidden[-1].sum().backward()
    assert compilations(fast.student_layer) == 1 and compilations(Layer.forward) == 2


def test_layers_are_not_compiled_in_pieces_with_several_processes(no_compilations, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        teacher, distiller = make_state()
        buckets = torch.nn.parallel.DistributedDataParallel(distiller, bucket_cap_mb=0.02, find_unused_parameters=True)
        with switched_on(teacher, distiller):
            losses_and_gradients(teacher, buckets, rows=4)
    finally:
        torch.distributed.destroy_process_group()
    assert compilations(fast.student_layer) == 1


# ---- Whole runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path, checkpoint, corpus):
    """Call distill.py for 4 steps, 2 prunes and compensation: the student's weights, or the exit code if not 0."""
    compiled = fast.compiled

    def call(name: str, backend=None):
        monkeypatch.setattr(fast, "worth_compiling", lambda session: backend is not None)
        monkeypatch.setattr(fast, "compiled", functools.partial(compiled, backend=backend))
        code = distill.main([
            "--teacher", str(checkpoint), "--corpus", str(corpus), "--cache-dir", str(tmp_path / "cache"), "--steps",
            "4", "--batch-size", "4", "--seq-length", "16", "--target-width", "16", "--granularity", "8",
            "--prune-start", "0.25", "--prune-end", "0.75", "--compensate", "--eval-rows", "4", "--eval-every", "4",
            "--device", "cpu", "--precision", "fp32", "--output", str(tmp_path / name)])
        return code or dict(load_model(tmp_path / name / "student").named_parameters())

    return call


def test_a_fast_run_ends_at_the_same_student(run, tmp_path, capsys, no_compilations):
    plain_losses = distill.vocabulary_losses, distill.mean_mse
    plain, quick = run("plain"), run("quick", "aot_eager")
    assert compilations(fast.student_layer) >= 1 and "failed" not in capsys.readouterr().out
    lineages = [(tmp_path / name / "student" / "lineage.json").read_text() for name in ("plain", "quick")]
    assert lineages[0] == lineages[1]
    for name, p in plain.items():
        # Adam turns rounding in gradients near zero into steps of up to the learning rate.
        assert (quick[name] - p).norm() < 1e-3 * p.norm() + 1e-5, name
    assert (distill.vocabulary_losses, distill.mean_mse) == plain_losses


def test_a_run_whose_later_compilation_fails_is_saved_and_resumed_without_compiling(run, tmp_path, capsys, monkeypatch,
                                                                                   no_compilations):
    """Before step 3 the teacher's layers see another batch size and would be compiled again, which is not allowed."""
    micro_batches = Session.micro_batches

    def with_another_size(self, state):
        if state.step == 2:
            self.teacher(torch.zeros(3, 16, dtype=torch.int64))
        yield from micro_batches(self, state)

    with monkeypatch.context() as patch, torch._dynamo.config.patch(recompile_limit=1):
        patch.setattr(Session, "micro_batches", with_another_size)
        assert run("broken", "aot_eager") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "a compilation failed after step 2, which is saved" in line and "TORCH_COMPILE_DISABLE=1" in line
    monkeypatch.setattr(fast, "worth_compiling", lambda session: False)
    assert distill.main(["--resume", "--output", str(tmp_path / "broken")]) == 0
    assert "resumed after step 2" in capsys.readouterr().out


def test_where_compiling_fails_a_line_says_so_and_the_run_is_the_plain_one(run, capsys):
    def no_compiler(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify it.")

    plain = run("plain")
    capsys.readouterr()
    eager = run("eager", no_compiler)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "torch.compile failed" in line]
    assert "Failed to find C compiler" in line and "eagerly" in line
    assert all(torch.equal(eager[name], p) for name, p in plain.items())
