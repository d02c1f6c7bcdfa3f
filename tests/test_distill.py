"""The losses, the loop and the command line of distill.py, on a teacher of 2 layers x 32."""

import contextlib
import copy
import itertools
import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import distill
import prune
from model import Bert, BertConfig
from support import checkpoint, corpus, session
from support.checkpoint import load_config, load_model, load_tokenizer, save_model, save_tokenizer
from support.corpus import tokenise
from support.evaluation import evaluate
from support.flags import DATA_FLAGS, EVALUATION_FLAGS, RUN_FLAGS, WIKIPEDIA
from support.shapes import target_shape

ALPHAS = dict.fromkeys(("mlm", "pred", "hidn", "emb", "attn"), 1.0)
FEW_EVALUATIONS = ("--eval-every", 100, "--eval-rows", 4)  # for speed
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """`teacher`, with pooler and masked-LM head; `headless`, without the head; and `text.txt` of 60 documents."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*checkpoint.SPECIAL_TOKENS, *letters, *(f"##{c}" for c in letters), ".", "the", "of", "and"]
    tokenizer = checkpoint.wordpiece_tokenizer({word: i for i, word in enumerate(words)})
    torch.manual_seed(0)
    for name, head in (("teacher", True), ("headless", False)):
        (folder / name).mkdir()
        bert = Bert(BertConfig(vocab_size=len(words), **TINY), head=head)
        for p in bert.parameters():  # far from the initial values, so that every part matters
            p.data.add_(torch.randn_like(p) * 0.2)
        save_model(bert, folder / name)
        save_tokenizer(tokenizer, folder / name, 32)
    rng = random.Random(0)
    documents = [" ".join(rng.choice(["the", "of", "and", "abc", "deaf"]) for _ in range(80)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Call the program; returns its exit code and the run folder. The given flags win over those of a tiny run."""
    def call(*flags, teacher="teacher"):
        output = tmp_path / "run"
        code = distill.main([*tiny_flags(folder, teacher), "--output", str(output), *map(str, flags)])
        return code, output

    return call


def tiny_flags(folder: Path, teacher: str = "teacher") -> list[str]:
    """A run of 6 steps from width 32 to 16."""
    return ["--teacher", str(folder / teacher), "--corpus", str(folder / "text.txt"), "--cache-dir",
            str(folder / "cache"), "--target-width", "16", "--steps", "6", "--batch-size", "8", "--seq-length", "16",
            "--learning-rate", "1e-3", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory) -> Path:
    """The folder of a finished tiny run, which no test changes."""
    output = tmp_path_factory.mktemp("plain") / "run"
    assert distill.main([*tiny_flags(folder), "--output", str(output), "--log-every", "1"]) == 0
    return output


def read_log(output: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "model.safetensors")


def lineage(output: Path) -> dict[str, list[int]]:
    return json.loads((output / "student" / "lineage.json").read_text())


def recorded_flags(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())["flags"]


def tiny_distiller(folder, alphas=ALPHAS, temperature=1.0):
    teacher = load_model(folder / "teacher").eval()
    return teacher, distill.Distiller(copy.deepcopy(teacher), alphas, temperature).eval()


def tiny_batch(folder, step=0, rows=4) -> data.Batch:
    tokenizer = load_tokenizer(folder / "teacher", 100)
    tokens = tokenise([str(folder / "text.txt")], tokenizer, folder / "cache")
    return data.MaskedRows(tokens.train, 16, tokenizer).training_batch(0, step, rows)


# ---- Losses --------------------------------------------------------------------------------------------------


def test_distillation_losses_start_at_exactly_zero(folder):
    teacher, distiller = tiny_distiller(folder)
    batch = tiny_batch(folder)
    losses = distiller(batch, teacher(batch.input_ids, batch.positions, want_scores=True))
    assert {name: losses[name].item() for name in ("pred", "hidn", "emb", "attn")} == dict.fromkeys(
        ("pred", "hidn", "emb", "attn"), 0.0)
    assert losses["loss"].item() == losses["mlm"].item() > 0


def test_losses_equal_their_equations_on_the_outputs_of_transformers(folder):
    """Written out by hand, attention scores per head, for a student that differs from its teacher."""
    from transformers import BertForMaskedLM

    alphas = {"mlm": 0.5, "pred": 2.0, "hidn": 3.0, "emb": 0.25, "attn": 0.125}
    teacher, distiller = tiny_distiller(folder, alphas, temperature=2.0)
    torch.manual_seed(3)
    for p in distiller.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    batch = tiny_batch(folder)
    losses = distiller(batch, teacher(batch.input_ids, batch.positions, want_scores=True))

    outputs = []
    for bert in (teacher, distiller.student):
        standard = BertForMaskedLM.from_pretrained(folder / "teacher", attn_implementation="eager").eval()
        standard.load_state_dict({k: v for k, v in bert.state_dict().items() if "pooler" not in k}, strict=False)
        standard.tie_weights()
        out = standard(batch.input_ids, output_hidden_states=True)
        scores = []
        for layer, x in zip(standard.bert.encoder.layer, out.hidden_states, strict=False):
            attention = layer.attention.self
            q, k = (linear(x).view(4, 16, 4, 8).transpose(1, 2) for linear in (attention.query, attention.key))
            scores.append((q @ k.transpose(2, 3) / 8**0.5).mean(1))
        outputs.append((out.logits.flatten(0, 1)[batch.positions], out.hidden_states, scores))
    (z_t, h_t, a_t), (z_s, h_s, a_s) = outputs
    p_t, p_s = (z_t / 2).softmax(-1), (z_s / 2).softmax(-1)
    w_hidn, w_emb = [project.weight for project in distiller.hidden_projections], distiller.embedding_projection.weight
    expected = {
        "mlm": F.cross_entropy(z_s, batch.labels),
        "pred": (p_t * (p_t / p_s).log()).sum(-1).mean() * 4,
        "hidn": sum(((t - s @ w.T) ** 2).mean() for t, s, w in zip(h_t[1:], h_s[1:], w_hidn, strict=True)) / 2,
        "emb": ((h_t[0] - h_s[0] @ w_emb.T) ** 2).mean(),
        "attn": sum(((t - s) ** 2).mean() for t, s in zip(a_t, a_s, strict=True)) / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(losses["loss"], sum(alphas[name] * value for name, value in expected.items()))


def test_the_vocabulary_losses_of_bf16_logits_are_computed_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 300).bfloat16()
    labels = torch.randint(300, (6,))
    expected = distill.vocabulary_losses(student.float(), teacher.float(), labels, 2.5)
    for loss, value in zip(distill.vocabulary_losses(student, teacher, labels, 2.5), expected, strict=True):
        assert loss.dtype == torch.float32 and torch.equal(loss, value)


@pytest.mark.parametrize("name", ALPHAS)
def test_a_loss_of_weight_zero_is_left_out(run, name):
    code, output = run(f"--alpha-{name}", 0, "--log-every", 1, "--steps", 2, *FEW_EVALUATIONS)
    assert code == 0
    logged = {key for key in read_log(output, "train")[-1] if key.startswith("loss_")}
    assert logged == {f"loss_{other}" for other in ALPHAS if other != name}


def test_without_the_masked_lm_loss_its_gradient_ranks_the_first_prune_but_trains_nothing(run, folder):
    """Everything is pruned at once after three of six steps. Until then the student stays the teacher, and the kept
    units are those of a run that is ranked by L_MLM alone and does not move (learning rate 0)."""
    code, output = run("--alpha-mlm", 0, "--prune-start", 0.5, "--prune-end", 0.5, "--eval-every", 1, "--eval-prunes")
    assert code == 0
    evals, (line,) = read_log(output, "eval"), read_log(output, "prune")
    assert [e["kl"] for e in evals[:3]] == [0.0] * 3 and line["eval_before"]["kl"] == 0.0 < evals[-1]["kl"]
    lineage = (output / "student" / "lineage.json").read_text()
    flags = [f"--alpha-{name}=0" for name in ("pred", "hidn", "emb", "attn")]
    code, output = run(*flags, "--prune-start", 0.5, "--prune-end", 0.5, "--learning-rate", 0, "--overwrite")
    assert code == 0 and (output / "student" / "lineage.json").read_text() == lineage


def test_a_teacher_without_head_is_ranked_by_its_output_and_unchanged_until_then(run, folder, tmp_path):
    """In every layer half of the feed-forward neurons are read with weights of a thousandth: they are pruned."""
    teacher = load_model(folder / "headless")
    weak = [torch.randperm(64, generator=torch.Generator().manual_seed(i))[:32] for i in range(2)]
    for layer, neurons in zip(teacher.bert.layers, weak, strict=True):
        layer.output.dense.weight.data[:, neurons] *= 1e-3
    shutil.copytree(folder / "headless", tmp_path / "teacher")
    save_model(teacher, tmp_path / "teacher")
    code, output = run("--prune-start", 0.5, "--prune-end", 0.5, "--eval-every", 1, "--eval-prunes",
                       teacher=tmp_path / "teacher")
    assert code == 0 and read_log(output, "prune")[0]["eval_before"]["hidden_mse"] == 0.0
    assert [e["hidden_mse"] for e in read_log(output, "eval")[:3]] == [0.0] * 3
    lineage = json.loads((output / "student" / "lineage.json").read_text())
    for i, neurons in enumerate(weak):
        assert not set(lineage[f"feed_forward.{i}"]) & set(neurons.tolist())


# ---- The loop ------------------------------------------------------------------------------------------------


def test_three_updates_equal_torch_s_own(run, folder):
    """Repeated with torch.optim.AdamW on a copy of the teacher. In the third step everything is pruned at once."""
    code, output = run("--steps", 3, "--prune-start", 0.9, "--prune-end", 0.9, "--warmup", 1, "--learning-rate", 0.01,
                       "--clip", 0.5, "--weight-decay", 0.1, "--target-width", 28)
    assert code == 0
    teacher, distiller = tiny_distiller(folder)
    distiller.student.bert.pooler.requires_grad_(False)
    named = [(name, p) for name, p in distiller.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() == 2 and "projection" not in name else 0.0}
         for name, p in named], betas=(0.9, 0.999), eps=1e-6)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 3
        batch = tiny_batch(folder, step, rows=8)
        distiller(batch, teacher(batch.input_ids, batch.positions, want_scores=True))["loss"].backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    kept = {group: torch.tensor(indices) for group, indices in lineage(output).items()}
    axes = prune.tensor_axes(distiller.student)
    for name, tensor in weights(output).items():
        expected = distiller.student.get_parameter(name).detach()
        for dimension, group in axes.get(name, {}).items():
            expected = expected.index_select(dimension, kept[group])
        scale = (7 / 8) ** 0.5 if ".query." in name else 1.0
        torch.testing.assert_close(tensor, expected * scale, rtol=1e-5, atol=1e-6, msg=name)


def test_the_learning_rate_rises_then_falls_linearly():
    rates = [distill.learning_rate(t, 100, 2.0, 0.1) for t in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (t + 1) for t in range(10)])
    assert rates[10:] == pytest.approx([2.0 * (100 - t) / 90 for t in range(10, 100)])
    assert max(distill.learning_rate(t, 25, 1.0, 0.1) for t in range(25)) == 1.0  # 2.5 steps of warmup do not exceed it
    assert distill.learning_rate(0, 10, 1.0, 0.0) == 1.0 and distill.learning_rate(4, 10, 1.0, 1.0) == 0.5


def test_micro_batches_add_up_to_one_batch(run, plain, monkeypatch):
    sizes, forward = [], distill.Distiller.forward
    monkeypatch.setattr(distill.Distiller, "forward", lambda self, batch, *rest: (
        sizes.append(len(batch.input_ids)), forward(self, batch, *rest))[1])
    code, output = run("--micro-batch-size", 3)
    assert code == 0 and sizes == [3, 3, 2] * 6
    assert lineage(output) == lineage(plain)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(output)[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_sensitivity_comes_from_complete_gradients_before_clipping(run, monkeypatch):
    norms, accumulate = [], prune.accumulate_importance

    def watched(criterion, statistics, bert, decay):
        norms.append(torch.stack([p.grad.norm() for p in bert.parameters() if p.grad is not None]).norm().item())
        accumulate(criterion, statistics, bert, decay)

    monkeypatch.setattr(prune, "accumulate_importance", watched)
    code, output = run("--micro-batch-size", 3, "--clip", 1e-3, "--log-every", 1, "--prune-end", 0.9,
                       "--alpha-hidn", 0, "--alpha-emb", 0)  # so that the projections have no gradients
    logged = [line["gradient_norm"] for line in read_log(output, "train")]  # before clipping
    last = read_log(output, "prune")[-1]["step"]  # afterwards there is nothing to rank
    assert code == 0 and norms == pytest.approx(logged[:last], rel=1e-4) and min(norms) > 1e-2


def test_the_statistics_of_importance_are_dropped_at_the_target_shape(run, monkeypatch):
    held, end_step = [], session.Session.end_step
    monkeypatch.setattr(session.Session, "end_step", lambda self, state, *rest: (
        held.append(len(state.statistics)), end_step(self, state, *rest)))
    code, output = run()
    last = read_log(output, "prune")[-1]["step"]
    assert code == 0 and held == [1] * (last - 1) + [0] * (7 - last)


def test_the_parts_of_a_step_happen_in_the_order_of_algorithm_1(run, monkeypatch):
    """Forward, importance, clipping, AdamW, prune; and importance sees the weights of the forward pass."""
    events, seen = [], {}

    def spy(owner, name, event, look=lambda *args: None):
        real = getattr(owner, name)

        def spied(*args, **kwargs):
            events.append(event)
            look(*args)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)

    def remember(distiller, *_):
        seen["weights"] = [p.detach().clone() for p in distiller.student.parameters()]

    def compare(criterion, statistics, bert, decay):
        assert not bert.bert.pooler["dense"].weight.requires_grad  # no loss reaches it, so it must not count
        assert all(torch.equal(p, old) for p, old in zip(bert.parameters(), seen["weights"], strict=True))

    spy(distill.Distiller, "forward", "forward", remember)
    spy(prune, "accumulate_importance", "importance", compare)
    spy(torch.nn.utils, "clip_grad_norm_", "clip")
    spy(torch.optim.AdamW, "step", "adam")
    spy(prune, "prune_units", "prune")
    code, _ = run("--micro-batch-size", 4, "--prune-start", 0.3, "--prune-end", 0.3)
    assert code == 0
    step = ["forward", "forward", "importance", "clip", "adam"]
    assert events == step + [*step, "prune"] + 4 * ["forward", "forward", "clip", "adam"]


def test_every_step_has_its_own_dropout_and_another_seed_another(run, monkeypatch):
    seeds, forward = [], distill.Distiller.forward
    monkeypatch.setattr(distill.Distiller, "forward", lambda self, batch, *rest: (
        seeds.append(torch.initial_seed()), forward(self, batch, *rest))[1])
    for seed in (0, 1):
        assert run("--dropout", 0.1, "--seed", seed, "--overwrite")[0] == 0
    assert len(seeds) == len(set(seeds)) == 12


def test_training_fits_and_alignment_never_read_a_held_out_row_and_evaluation_reads_no_other(run, folder, monkeypatch):
    rows, inside, batch = {True: set(), False: set()}, [False], data.MaskedRows.batch

    def spied_batch(self, indices, *args, **kwargs):
        rows[inside[0]].update(tuple(row) for row in self.text[indices].tolist())
        return batch(self, indices, *args, **kwargs)

    def spied_evaluate(*args):
        inside[0] = True
        result = evaluate(*args)
        inside[0] = False
        return result

    monkeypatch.setattr(data.MaskedRows, "batch", spied_batch)
    monkeypatch.setattr(session, "evaluate", spied_evaluate)
    monkeypatch.setattr(session, "milliseconds_per_row", lambda *_: [0.0, 0.0])
    assert run("--align-heads", "--compensate", "--eval-prunes", "--steps", 60)[0] == 0
    tokens = tokenise([str(folder / "text.txt")], load_tokenizer(folder / "teacher", 100), folder / "cache")
    heldout, train = (set(map(tuple, part[: len(part) // 14 * 14].reshape(-1, 14).tolist()))
                      for part in (tokens.heldout, tokens.train))
    assert rows[True] == heldout and rows[False] <= train and len(rows[False]) >= 400 and not heldout & train


def test_the_same_seed_gives_the_same_student_bit_for_bit_and_another_seed_another(run):
    students = []
    for seed in (5, 5, 6):
        code, output = run("--seed", seed, "--overwrite", "--dropout", 0.1, *FEW_EVALUATIONS)
        assert code == 0
        students.append(weights(output))
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert not all(torch.equal(students[0][name], students[2][name]) for name in students[0])


def test_without_learning_the_student_is_the_submatrix_of_the_teacher_that_lineage_json_names(run, folder):
    code, output = run("--learning-rate", 0, "--weight-decay", 0)
    assert code == 0
    student, teacher = weights(output), load_file(folder / "teacher" / "model.safetensors")
    kept = {group: torch.tensor(indices) for group, indices in lineage(output).items()}
    axes = prune.tensor_axes(load_model(folder / "teacher"))
    assert set(student) == set(teacher)
    for name, tensor in student.items():
        expected = teacher[name]
        for dimension, group in axes.get(name, {}).items():
            expected = expected.index_select(dimension, kept[group])
        scale = (4 / 8) ** 0.5 if ".query." in name else 1.0
        torch.testing.assert_close(tensor, expected * scale, msg=name)


def test_units_are_pruned_by_sensitivity_unless_another_criterion_is_given(run):
    kept = {}
    for criterion in ("sensitivity", "magnitude", "random", None):
        code, output = run(*(("--importance", criterion) if criterion else ()), "--overwrite", "--learning-rate", 0,
                           *FEW_EVALUATIONS)
        assert code == 0
        kept[criterion] = lineage(output)["hidden"]
    assert kept.pop(None) == kept["sensitivity"]
    assert len(set(map(tuple, kept.values()))) == 3


def test_equal_start_and_end_prune_everything_at_once(run):
    code, output = run("--prune-start", 0.5, "--prune-end", 0.5)
    assert code == 0
    prunes = read_log(output, "prune")
    assert [line["step"] for line in prunes] == [3] and prunes[0]["after"]["hidden_size"] == 16


def test_granularity_sets_the_widths_in_between(run):
    for granularity, widths in ((4, {32, 28, 24, 20, 16}), (16, {32, 16})):
        code, output = run("--granularity", granularity, "--prune-start", 0.2, "--prune-end", 0.9, "--steps", 20,
                           "--overwrite", "--log-every", 1, *FEW_EVALUATIONS)
        assert code == 0
        train = read_log(output, "train")
        assert {line["hidden_size"] for line in train} == widths
        assert [line["hidden_size"] for line in train[:3]] == [32] * 3


def test_a_truncated_student_starts_as_the_first_units_of_the_teacher(run, folder):
    code, output = run("--init", "truncated", "--learning-rate", 0, "--target-heads", 2)
    assert code == 0 and not read_log(output, "prune")
    assert lineage(output)["hidden"] == list(range(16)) and lineage(output)["query_key.0"] == list(range(16))
    teacher = load_file(folder / "teacher" / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(weights(output)[name], teacher[name][:32, :16])


def test_a_random_student_starts_at_its_target_shape_with_the_random_weights_of_its_seed(run):
    flags, values = ("--init", "random", "--learning-rate", 0, "--overwrite", "--log-every", 1, *FEW_EVALUATIONS), []
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    for seed in (0, 0, 1):
        torch.rand(7)  # it depends on --seed alone
        code, output = run(*flags, "--seed", seed)
        assert code == 0
        values.append(weights(output)[name])
    assert not read_log(output, "prune") and {line["hidden_size"] for line in read_log(output, "train")} == {16}
    assert lineage(output) == {} and read_log(output, "eval")[0]["kl"] > 0.05
    assert values[0].shape == (32, 16) and 0.015 < values[0].std() < 0.025  # the teacher's is ten times as large
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


@pytest.mark.parametrize("flags", [
    ("--warmup", 1), ("--dropout", 0.3), ("--clip", 1e-3), ("--temperature", 3), ("--sensitivity-decay", 0),
    ("--weight-decay", 10), ("--precision", "bf16"), ("--seq-length", 12), ("--alpha-mlm", 3),
    ("--learning-rate", 0.01), ("--batch-size", 9), ("--steps", 7), ("--prune-power", 1)], ids=lambda flags: flags[0])
def test_every_setting_of_the_training_changes_the_student(run, plain, flags):
    code, output = run(*flags, *FEW_EVALUATIONS)
    assert code == 0
    before, after = weights(plain), weights(output)
    assert lineage(output) != lineage(plain) or any(not torch.equal(before[name], after[name]) for name in before)


def test_deterministic_is_passed_on_to_torch(run, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # torch's default
    seen, rate = [], distill.learning_rate
    monkeypatch.setattr(distill, "learning_rate", lambda *a: seen.append(torch.are_deterministic_algorithms_enabled())
                        or rate(*a))
    for flags, expected in ((["--deterministic"], True), (["--overwrite"], False)):
        seen.clear()
        assert run(*flags, *FEW_EVALUATIONS)[0] == 0 and seen == [expected] * 6
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_student_that_is_not_finite_after_the_last_step_is_not_saved(run, capsys):
    code, output = run("--learning-rate", 1e9, "--clip", 0, "--steps", 1)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "not finite after the last step" in error
    assert not (output / "student").exists()


def test_a_loss_that_is_not_finite_stops_the_run_in_one_line(run, capsys):
    code, output = run("--learning-rate", 1e9, "--clip", 0)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "not finite" in error and "step " in error and "mlm " in error
    assert (output / "log.jsonl").exists() and not (output / "student").exists()


def test_evaluations_are_means_over_what_transformers_computes_for_held_out_rows(folder, tmp_path):
    """KL(teacher || student), masked-LM losses, accuracies and L_hidn, written out for all rows at once, on the outputs
    of both models in `transformers`."""
    from transformers import BertForMaskedLM

    teacher, distiller = tiny_distiller(folder)
    torch.manual_seed(3)
    for p in distiller.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    tokenizer = load_tokenizer(folder / "teacher", 100)
    for bert, words in ((teacher, ("the", "of", "and")), (distiller.student, ("of", "the", "and"))):
        for bonus, word in zip((30, 20, 10), words, strict=True):  # so that some predictions are right
            bert.cls["predictions"].bias.data[tokenizer.token_to_id(word)] += bonus
    heldout = data.MaskedRows(tokenise([str(folder / "text.txt")], tokenizer, folder / "cache").heldout, 16, tokenizer)
    batch = heldout.batch(np.arange(7) * len(heldout) // 7, seed=0, step=0)
    with torch.no_grad():
        outputs = []
        for bert in (teacher, distiller.student):
            save_model(bert, tmp_path)
            reference = BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
            outputs.append(reference(batch.input_ids, output_hidden_states=True))
        t, s = (output.hidden_states[1:] for output in outputs)  # without the embedding output
        p, q = (output.logits.flatten(0, 1)[batch.positions].softmax(-1) for output in outputs)
        rows = torch.arange(len(batch.labels))
        expected = {
            "hidden_mse": sum(((a - b @ w.weight.T) ** 2).mean() for a, b, w in zip(
                t, s, distiller.hidden_projections, strict=True)) / 2,
            "kl": (p * (p / q).log()).sum(-1).mean(),
            "masked_lm_loss": -q[rows, batch.labels].log().mean(),
            "teacher_masked_lm_loss": -p[rows, batch.labels].log().mean(),
            "top1": (q.argmax(-1) == batch.labels).float().mean(),
            "teacher_top1": (p.argmax(-1) == batch.labels).float().mean()}
    expected["masked_lm_loss_difference"] = expected["masked_lm_loss"] - expected["teacher_masked_lm_loss"]
    per_row = (q[rows, batch.labels].log() - p[rows, batch.labels].log()).view(7, -1).mean(1).numpy()
    assert 0 < expected["top1"] < 1
    for micro_batch_size in (2, 7):
        values = evaluate(distiller, teacher, heldout, 7, micro_batch_size, "cpu", contextlib.nullcontext)
        errors = {name: values.pop(name) for name in list(values) if name.endswith("_se")}
        assert values == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
        assert set(errors) == {f"{name}_se" for name in expected}
        assert errors["masked_lm_loss_difference_se"] == pytest.approx(scipy.stats.sem(per_row), rel=1e-4)


def test_evaluation_rows_are_spread_over_the_held_out_part(folder):
    """Three rows of seven: 0, 2 and 4, with the masks of rows 0, 1 and 2."""
    teacher, distiller = tiny_distiller(folder)
    tokenizer = load_tokenizer(folder / "teacher", 100)
    tokens = tokenise([str(folder / "text.txt")], tokenizer, folder / "cache").heldout[:98]
    heldout = data.MaskedRows(tokens, 16, tokenizer)
    assert len(heldout) == 7
    batch = heldout.batch(np.array([0, 2, 4]), seed=0, step=0)
    with torch.no_grad():
        loss = F.cross_entropy(teacher(batch.input_ids, batch.positions).logits, batch.labels)
    values = evaluate(distiller, teacher, heldout, 3, 2, "cpu", contextlib.nullcontext)
    assert values["teacher_masked_lm_loss"] == pytest.approx(loss.item(), rel=1e-5)


# ---- The run folder ------------------------------------------------------------------------------------------


def test_a_run_ends_at_the_target_shape_and_its_student_loads_in_transformers(run, folder):
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

    code, output = run("--target-intermediate", 24, "--target-heads", 2, "--granularity", 4)
    assert code == 0
    standard, info = AutoModelForMaskedLM.from_pretrained(output / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) <= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    _, info = AutoModel.from_pretrained(output / "student", output_loading_info=True)
    assert not info["missing_keys"] and all(key.startswith("cls.") for key in info["unexpected_keys"])
    config = standard.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (16, 24, 2)
    ours = load_model(output / "student").eval()
    batch = tiny_batch(folder)
    logits = standard.eval()(batch.input_ids).logits.flatten(0, 1)[batch.positions]
    torch.testing.assert_close(ours(batch.input_ids, batch.positions).logits, logits, rtol=0, atol=1e-4)
    text = "the deaf and of abc"
    expected = load_tokenizer(folder / "teacher", 100).encode(text).ids
    assert AutoTokenizer.from_pretrained(output / "student")(text)["input_ids"] == expected
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "lineage.json",
             "README.md"}
    assert {p.name for p in (output / "student").iterdir()} == names
    assert {p.name for p in output.iterdir()} == {"run.json", "log.jsonl", "student"}


def test_a_bert_with_an_xlmr_tokenizer_is_distilled_with_its_special_tokens(xlmr_checkpoint, run):
    from transformers import AutoTokenizer

    code, output = run("--teacher", xlmr_checkpoint)
    assert code == 0
    student, teacher = (AutoTokenizer.from_pretrained(path) for path in (output / "student", xlmr_checkpoint))
    assert student("the <mask> king", "old")["input_ids"] == teacher("the <mask> king", "old")["input_ids"]
    assert student.special_tokens_map.items() <= teacher.special_tokens_map.items()


def test_text_column_names_the_fields_of_the_corpus(run, folder, tmp_path, capsys):
    documents = (folder / "text.txt").read_text().split("\n\n")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"body": text, "title": "the"}) for text in documents))
    assert run("--corpus", tmp_path / "x.jsonl", "--text-column", "title", "body")[0] == 0
    assert run("--corpus", tmp_path / "x.jsonl", "--overwrite")[0] == 2
    assert "record 1" in capsys.readouterr().err


def test_overwriting_a_run_does_not_delete_the_teacher_in_it(run, capsys):
    _, output = run(*FEW_EVALUATIONS)
    before = weights(output)
    assert run("--teacher", output / "student", "--target-width", 8, "--overwrite")[0] == 2
    assert "contains the teacher" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(output).items())


def test_corpus_tokens_limits_the_corpus_and_fills_at_least_a_batch(run, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "TOKENISE_AT_ONCE", 2000)
    rows = []
    for flags in ([], ["--corpus-tokens", 800, "--overwrite"]):
        assert run(*flags)[0] == 0
        rows.append(int(re.search(r"corpus of ([\d,]+) rows", capsys.readouterr().out)[1].replace(",", "")))
    assert 800 / 14 - 1 <= rows[1] < rows[0] / 2
    assert run("--corpus-tokens", 127, "--overwrite")[0] == 2  # a batch is 8 x 16
    assert "--corpus-tokens 127" in capsys.readouterr().err


def test_a_teacher_without_masked_lm_head_gives_a_student_without_one(run, capsys):
    from transformers import AutoModel

    code, output = run(teacher="headless")
    printed = capsys.readouterr().out
    assert code == 0 and printed.count("no masked-LM head") == 1
    logged = {key for key in read_log(output, "train")[0] if key.startswith("loss_")}
    assert logged == {"loss_hidn", "loss_emb", "loss_attn"}
    _, info = AutoModel.from_pretrained(output / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not [name for name in weights(output) if name.startswith("cls")]
    evals = read_log(output, "eval")
    assert set(evals[0]) == {"event", "step", "hidden_mse", "hidden_mse_se"}
    assert evals[0]["hidden_mse"] == 0 < evals[-1]["hidden_mse"]


def test_log_jsonl_has_every_training_line_evaluation_and_prune(run):
    code, output = run("--log-every", 2, "--eval-every", 3, "--prune-end", 0.5)
    assert code == 0
    train, evals, prunes = (read_log(output, event) for event in ("train", "eval", "prune"))
    assert [line["step"] for line in train] == [2, 4, 6] and [line["step"] for line in evals] == [0, 3, 6]
    assert set(train[0]) == {
        "event", "step", "tokens", "loss", "loss_mlm", "loss_pred", "loss_hidn", "loss_emb", "loss_attn", "hidden_size",
        "intermediate_size", "num_heads", "head_size", "parameters", "learning_rate", "gradient_norm",
        "tokens_per_second", "memory_mb"}
    shape = [train[-1][name] for name in prune.Shape._fields]
    assert train[-1]["tokens"] == 6 * 8 * 16 and shape == [16, 32, 4, 4]
    assert train[-1]["parameters"] == sum(tensor.numel() for tensor in weights(output).values())
    assert evals[0]["kl"] == 0 and evals[0]["masked_lm_loss"] == evals[0]["teacher_masked_lm_loss"]
    assert evals[0]["top1"] == evals[0]["teacher_top1"] and evals[-1]["kl"] > 0
    assert prunes[0]["before"] == {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "head_size": 8}
    assert prunes[-1]["after"] == {"hidden_size": 16, "intermediate_size": 32, "num_heads": 4, "head_size": 4}
    assert prunes[-1]["step"] <= 3 and all(line["milliseconds"] > 0 for line in prunes)


def test_a_run_is_evaluated_at_the_start_and_after_every_tenth_of_it_by_default(run):
    code, output = run("--steps", 25, "--eval-rows", 2)
    assert code == 0 and [line["step"] for line in read_log(output, "eval")] == [*range(0, 25, 2), 25]


def test_eval_prunes_evaluates_right_before_and_after_every_prune(run):
    code, output = run("--eval-prunes", "--eval-every", 1, "--learning-rate", 0, "--weight-decay", 0)
    prunes, evals = read_log(output, "prune"), {line["step"]: line["kl"] for line in read_log(output, "eval")}
    assert code == 0 and prunes
    for line in prunes:  # without learning, nothing else changes between two steps
        assert line["eval_before"]["kl"] == pytest.approx(evals[line["step"] - 1], abs=1e-7)
        assert line["eval_after"]["kl"] == pytest.approx(evals[line["step"]], abs=1e-7)
        assert line["eval_after"]["kl"] > line["eval_before"]["kl"]


def test_eval_rows_of_a_run_on_two_corpora(run, folder, tmp_path):
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": "abc deaf " * 40}) + "\n" for _ in range(60)))
    losses = []
    for rows in (2, 4):
        code, output = run("--corpus", folder / "text.txt", tmp_path / "more.jsonl", "--eval-rows", rows, "--overwrite",
                           "--steps", 1)
        assert code == 0
        losses.append(read_log(output, "eval")[-1]["teacher_masked_lm_loss"])
    assert losses[0] != losses[1]


def test_tokenised_text_is_kept_in_cache_dir(run, tmp_path):
    code, _ = run("--cache-dir", tmp_path / "elsewhere", "--steps", 1)
    assert code == 0 and {path.name for path in (tmp_path / "elsewhere").glob("*/*")} >= {"train.bin", "heldout.bin"}


def test_the_default_run_folder_is_named_after_the_teacher_and_the_width(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert distill.main([*tiny_flags(folder), "--steps", "1", "--target-width", "20"]) == 0
    assert (tmp_path / "runs" / "teacher-20" / "student").is_dir()
    assert "student: runs/teacher-20/student" in capsys.readouterr().out


def test_the_default_width_is_half_of_the_teacher_s(folder, tmp_path):
    flags = tiny_flags(folder)
    where = flags.index("--target-width")
    assert distill.main([*flags[:where], *flags[where + 2 :], "--steps", "1", "--output", str(tmp_path / "run")]) == 0
    assert load_config(tmp_path / "run" / "student").hidden_size == 16


def test_a_run_folder_is_never_overwritten_by_accident(run, plain, tmp_path, capsys):
    shutil.copytree(plain, tmp_path / "run")
    code, output = run()
    assert code == 2 and "--overwrite" in capsys.readouterr().err
    assert (output / "log.jsonl").read_text() == (plain / "log.jsonl").read_text()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("do not delete")
    for path in (precious, precious / "thesis.txt"):
        code, _ = run("--output", path, "--overwrite")
        assert code == 2 and f"{path} is in use" in capsys.readouterr().err and len(list(precious.iterdir())) == 1
    code, _ = run("--output", precious / "thesis.txt" / "run")
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- Bad input -----------------------------------------------------------------------------------------------


BAD_FLAGS = {
    ("--teacher", "no/such/folder/anywhere"): "no such folder",
    ("--teacher", "setup.cfg/../x y"): "no such folder",
    ("--target-width", "32"): "from 1 to 31",
    ("--target-width", "0"): "from 1 to 31",
    ("--target-width", "-4"): "from 1 to 31",
    ("--target-width", "13"): "use a multiple of 4",
    ("--target-width", "wide"): "invalid int value",
    ("--target-heads", "3"): "into 3 heads",
    ("--target-heads", "5"): "from 1 to 4",
    ("--target-intermediate", "65"): "from 1 to 64",
    ("--target-intermediate", "0"): "from 1 to 64",
    ("--corpus", "nowhere.txt"): "no such file or folder",
    ("--batch-size", "100000"): "the training rows of 16 tokens",
    ("--batch-size", "0"): "0 is not from 1",
    ("--steps", "1.5"): "invalid int value",
    ("--seq-length", "33"): "--seq-length 33 exceeds the teacher's 32",
    ("--seq-length", "2"): "from 8",
    ("--eval-rows", "1"): "from 2",
    ("--prune-start", "0.9"): "is after --prune-end",
    ("--prune-end", "1"): "from 0 to 0.9",
    ("--learning-rate", "nan"): "nan is not from 0",
    ("--learning-rate", "inf"): "inf is not from 0",
    ("--temperature", "0"): "from 0.001",
    ("--seed", "-1"): "from 0 to",
    ("--device", "tpu"): "use auto, cpu, cuda",
    ("--device", "cuda:99"): "CUDA devices", ("--device", "cuda:256"): "use auto, cpu, cuda",
    ("--precision", "fp8"): "invalid choice",
    ("--importance", "beauty"): "invalid choice",
    ("--prune-power", "0"): "from 0.1",
    ("--preset", "imitation", "homobert-huge"): "homobert-huge is unknown",
    ("--no-such-flag",): "unrecognized arguments",
    tuple(word for name in ALPHAS for word in (f"--alpha-{name}", "0")): "nothing to learn",
}


def assert_refused(code: int, output: Path, capsys, words: str):
    """Exit code 2, one line that says why, and no folder left."""
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("distill.py: error: ")
    assert words in error
    assert not output.exists()


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_flags_are_refused_in_one_line_before_anything_is_written(run, capsys, flags):
    assert_refused(*run(*flags), capsys, BAD_FLAGS[flags])


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(run, folder, tmp_path, capsys):
    shutil.copytree(folder / "teacher", tmp_path / "bad")
    words = (tmp_path / "bad" / "vocab.txt").read_text() + "one\nmore\n"
    (tmp_path / "bad" / "vocab.txt").write_text(words)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bad" / name).unlink()
    assert_refused(*run("--teacher", tmp_path / "bad"), capsys, "outside the model's vocabulary")


def test_a_damaged_teacher_is_refused(run, folder, tmp_path, capsys):
    shutil.copytree(folder / "teacher", tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert_refused(*run("--teacher", tmp_path / "bad"), capsys, "model.safetensors is damaged")
    path.write_bytes(content)
    tensors = load_file(path)
    tensors["bert.encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    assert_refused(*run("--teacher", tmp_path / "bad"), capsys, "not all numbers are finite")


def test_a_corpus_without_text_is_refused(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_refused(*run("--corpus", tmp_path / "empty.txt"), capsys, "the corpus is empty")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    assert_refused(*run("--corpus", tmp_path / "binary.txt"), capsys, "binary")


def test_an_output_folder_that_may_not_be_written_is_refused(run, monkeypatch, capsys):
    mkdir = Path.mkdir

    def forbidden(path, **options):  # the tests may run as root, who may write anywhere
        if path.name == "run":
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, **options)

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert_refused(*run(), capsys, "Permission denied")


# ---- The command line ----------------------------------------------------------------------------------------


def test_the_defaults_are_the_paper_s_settings():
    args = distill.parse_arguments(["--teacher", "bert-base-uncased", "--target-width", "384"])
    assert (args.steps, args.batch_size, args.seq_length, args.learning_rate) == (28000, 4096, 128, 3e-4)
    assert (args.warmup, args.prune_start, args.prune_end, args.prune_power) == (0.1, 0.0, 0.7, 3)
    assert args.importance == "sensitivity" and args.init == "teacher"
    assert not args.align_heads and not args.compensate
    assert args.preset == [] and args.corpus == [WIKIPEDIA]


@pytest.mark.parametrize("preset, width, intermediate, rate, millions", [
    ("homobert-base", 576, 2304, 3e-4, 65), ("homobert-small", 256, 1024, 6e-4, 17.3),
    ("homobert-xsmall", 240, 960, 6e-4, 15.6), ("homobert-tiny", 224, 896, 6e-4, 14.1)])
def test_the_homobert_presets_are_the_paper_s_students(preset, width, intermediate, rate, millions):
    args = distill.parse_arguments(["--preset", preset])
    assert (args.teacher, args.target_width, args.target_intermediate) == ("bert-base-uncased", width, intermediate)
    assert args.learning_rate == rate and args.steps == 28000
    shape = target_shape(BertConfig(30522, 768, 12, 12, 3072), width, intermediate)
    with torch.device("meta"):
        student = Bert(BertConfig(30522, width, 12, shape.num_heads, intermediate))
    # The paper's count has no pooler, no MLM transform and no position embeddings (30522 D + 144 D^2).
    matrices = sum(p.numel() for name, p in student.named_parameters() if "layer" in name and p.dim() == 2)
    assert (matrices + 30522 * width) / 1e6 == pytest.approx(millions, abs=0.5)


def test_the_compensated_presets_change_the_method_and_nothing_else():
    """`imitation` is `compensated` without the masked-LM loss."""
    paper = vars(distill.parse_arguments(["--teacher", "x"]))
    expected = {"align_heads": True, "compensate": True, "prune_start": 1 / 30, "prune_end": 1 / 30}
    for preset, changes in (("compensated", expected), ("imitation", expected | {"alpha_mlm": 0.0})):
        args = vars(distill.parse_arguments(["--teacher", "x", "--preset", preset]))
        del args["command"]
        assert {name: value for name, value in args.items() if value != paper[name]} == changes | {"preset": [preset]}


def test_presets_combine_and_flags_win_over_them():
    args = distill.parse_arguments(["--preset", "homobert-tiny", "imitation", "--learning-rate", "0.1",
                                    "--target-width", "192"])
    assert args.preset == ["homobert-tiny", "imitation"] and args.compensate and args.alpha_mlm == 0
    assert args.target_intermediate == 896 and args.learning_rate == 0.1 and args.target_width == 192


def test_a_preset_is_printed_applied_and_recorded(run, capsys):
    code, output = run("--preset", "imitation", "--steps", 30, "--alpha-attn", 0, "--prune-end", 0.1, *FEW_EVALUATIONS)
    assert code == 0 and "settings: preset imitation and the flags given; learning rate " in capsys.readouterr().out
    flags = recorded_flags(output)
    assert {name: flags[name] for name in ("align_heads", "compensate", "alpha_mlm", "prune_start", "prune_end")} == {
        "align_heads": True, "compensate": True, "alpha_mlm": 0, "prune_start": 1 / 30, "prune_end": 0.1}
    assert {key for key in read_log(output, "train")[0] if key.startswith("loss_")} == {
        "loss_pred", "loss_hidn", "loss_emb"}


@pytest.mark.parametrize("alphas, expected", [
    ({}, True), ({"mlm": 0.0}, True), ({"attn": 0.0}, True), ({"hidn": 0.0}, False), ({"emb": 0.0}, False),
    ({"mlm": 0.0, "pred": 0.0}, False)])
def test_ddp_looks_for_unused_parameters_only_if_there_are_some(folder, alphas, expected):
    teacher, distiller = tiny_distiller(folder, ALPHAS | alphas)
    batch = tiny_batch(folder)
    distiller(batch, teacher(batch.input_ids, batch.positions, want_scores=True))["loss"].backward()
    used = all(p.grad is not None for name, p in distiller.named_parameters() if "pooler" not in name)
    assert used == distiller.uses_all_parameters() == expected


def test_the_size_of_the_run_is_printed_before_anything_is_downloaded(tmp_path, capsys):
    """The paper's settings: 28,000 steps of 4,096 rows of 128 tokens."""
    code = distill.main(["--teacher", str(tmp_path / "missing"), "--device", "cpu", "--precision", "fp32"])
    assert code == 2 and capsys.readouterr().out.splitlines() == [
        "settings: those of the paper and the flags given; learning rate 0.0003, fp32",
        "28,000 steps of 4,096 x 128 tokens on cpu: 14,680.1 million tokens"]


def test_passes_over_the_corpus_and_the_time_left_are_printed(run, capsys, monkeypatch):
    """The clock is read at the end of a step and when it goes on, so here a step takes ten seconds; the first, 100."""
    clock = itertools.chain([0], itertools.count(100, 10))
    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic))
    code, _ = run("--steps", 8, *FEW_EVALUATIONS)
    printed = capsys.readouterr().out
    passes, rows = re.search(r"^([\d.]+) passes over the corpus of (\d+) rows", printed, re.MULTILINE).groups()
    assert code == 0 and passes == f"{8 * 8 / int(rows):.2f}" != "1.00"
    assert re.search(r"^about 0:00:50 left.* --steps$", printed, re.MULTILINE)


def test_without_a_teacher_the_bundled_one_is_distilled_with_the_preset_demo():
    demo = distill.PRESETS["demo"]
    for flags, preset in (([], ["demo"]), (["--preset", "imitation"], ["demo", "imitation"])):
        args = distill.parse_arguments(flags)
        assert args.preset == preset and args.teacher == demo["teacher"] and args.steps == demo["steps"]
        assert args.corpus == ["demo"] and (Path(args.teacher) / "config.json").is_file()
    args = distill.parse_arguments(["--corpus", "text.txt", "--steps", "5"])
    assert args.preset == ["demo"] and args.teacher == demo["teacher"]
    assert args.corpus == ["text.txt"] and args.steps == 5 and args.batch_size == demo["batch_size"]


def test_a_long_first_document_is_reported_because_all_of_it_is_held_out(run, tmp_path, capsys):
    code, _ = run()
    assert code == 0 and "of the text is held out" not in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("the abc of deaf\n" * 1000 + "\n\n" + "of the abc\n" * 800)
    code, _ = run("--corpus", tmp_path / "text.txt", "--overwrite")
    assert code == 0 and "more than a fifth of the text is held out" in capsys.readouterr().out


def test_the_demo_runs_on_given_text(folder, tmp_path, capsys):
    assert distill.main(["--corpus", str(folder / "text.txt"), "--cache-dir", str(tmp_path), "--output",
                         str(tmp_path / "run"), "--steps", "1", "--batch-size", "2", "--seq-length", "16",
                         "--eval-rows", "2", "--device", "cpu"]) == 0
    assert "settings: preset demo and the flags given; learning rate " in capsys.readouterr().out
    teacher, student = (json.loads((path / "config.json").read_text())["hidden_size"]
                        for path in (Path(distill.PRESETS["demo"]["teacher"]), tmp_path / "run" / "student"))
    assert student == teacher // 2


def test_help_explains_every_flag_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        distill.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert sorted(flags) == sorted(
        flag.name for group in (distill.METHOD_FLAGS, DATA_FLAGS, RUN_FLAGS, EVALUATION_FLAGS) for flag in group)
    for flag in flags:
        explanation = re.search(rf"^  {flag}\b(.*?)(?=^  -|^\w|\Z)", text, re.MULTILINE | re.DOTALL)[1]
        assert "." in explanation, flag
