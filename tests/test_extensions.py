"""Aligned heads and compensated pruning, against svd, lstsq and the unchanged model, and on the bundled teacher."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_prune import ALPHAS, IDS, POSITIONS, assert_same, outputs, prune_to, random_bert

import distill
import prune
from data import Batch, MaskedRows, UnmaskedRows
from extensions.align_heads import align_heads, balancing_transforms, extended
from extensions.compensate import UNMASKED_WEIGHT, Place, compensate, fit_batches
from model import LayerNorm
from prune import Shape
from support.checkpoint import load_model, load_tokenizer, save_model, save_tokenizer


def random_batches(count: int = 20) -> list[Batch]:
    """Batches of 30 random tokens, of which the first 12 count as masked."""
    generator = torch.Generator().manual_seed(0)
    masked = POSITIONS[:12]
    return [Batch(torch.randint(97, (2, 15), generator=generator), masked, masked) for _ in range(count)]


# The weight of each of their tokens in a fit
TOKEN_WEIGHTS = torch.tensor([1.0] * 12 + [UNMASKED_WEIGHT] * 18, dtype=torch.float64).repeat(20)[:, None]


def as_distiller(bert) -> distill.Distiller:
    return distill.Distiller(bert, ALPHAS).to(bert.cls["predictions"].bias.dtype)


# ---- Aligned heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [random_batches(), [Batch(IDS[:1, :5], POSITIONS[:0], POSITIONS[:0])]],
                         ids=["many tokens", "five tokens in 24 dimensions"])
def test_alignment_changes_attention_weights_and_nothing_that_is_computed(batches):
    bert = random_bert()
    aligned = copy.deepcopy(bert)
    align_heads(aligned, batches)
    assert_same(outputs(aligned), outputs(bert))
    assert_same(aligned(IDS, want_scores=True).scores, bert(IDS, want_scores=True).scores)
    for name, p in bert.named_parameters():
        transformed = any(part in name for part in (".query.", ".key.", ".value.", "attention.output.dense.weight"))
        assert torch.equal(p, aligned.get_parameter(name)) != transformed, name


def test_alignment_of_heads_with_unused_dimensions_changes_nothing_that_is_computed():
    bert = random_bert()
    attention = bert.bert.layers[0].attention
    for linear, rows in (("query", slice(0, 6)), ("key", slice(6, 9)), ("value", slice(0, 12))):
        getattr(attention["self"], linear).weight.data[rows] = 0
        getattr(attention["self"], linear).bias.data[rows] = 0
    attention["output"].dense.weight.data[:, 12:18] = 0
    expected = outputs(bert)
    align_heads(bert, random_batches())
    assert_same(outputs(bert), expected)


def test_balancing_transforms_are_inverse_and_make_both_second_moments_the_same_descending_diagonal():
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 50, 5, dtype=torch.float64) * torch.tensor([1.0, 5.0])[:, None, None, None]  # (H,T,K)
    m, n = balancing_transforms(p.mT @ p, q.mT @ q)
    torch.testing.assert_close(m.mT @ n, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    s = torch.linalg.svdvals(p @ q.mT)[:, :5]
    for transform, factor in ((m, p), (n, q)):
        torch.testing.assert_close(transform @ factor.mT @ factor @ transform.mT, torch.diag_embed(s), rtol=1e-6,
                                   atol=1e-5)


def test_aligned_dimensions_are_the_singular_directions_of_the_two_matmuls_of_a_head():
    bert = random_bert()
    x = torch.cat([extended(bert(b.input_ids).hidden[0]) for b in random_batches()]).detach()  # the input of layer 1
    x = x / len(x) ** 0.5
    layer = bert.bert.layers[1]

    def factors(head: int):
        rows = slice(6 * head, 6 * head + 6)
        a = layer.attention["self"]
        q, k, v = (x @ torch.cat([m.weight[rows], m.bias[rows, None]], 1).T for m in (a.query, a.key, a.value))
        return (q, k), (v, layer.attention["output"].dense.weight[:, rows])

    expected = [[torch.linalg.svdvals(a @ b.T)[:6] for a, b in factors(head)] for head in range(4)]
    align_heads(bert, random_batches())
    for head in range(4):
        for (a, b), values in zip(factors(head), expected[head], strict=True):
            torch.testing.assert_close(a.T @ a, values.diag(), rtol=1e-6, atol=1e-6 * values[0].item())
            torch.testing.assert_close(b.T @ b, values.diag(), rtol=1e-6, atol=1e-6 * values[0].item())


def test_an_aligned_model_computes_the_same_in_transformers(checkpoint, tmp_path):
    from transformers import AutoModelForMaskedLM

    bert = load_model(checkpoint).eval()
    ids = torch.arange(5, 45).reshape(2, 20)
    align_heads(bert, [Batch(ids, POSITIONS[:0], POSITIONS[:0])])
    save_model(bert, tmp_path)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([18, 19]), 0)
    before, after = (AutoModelForMaskedLM.from_pretrained(folder).eval()(
        ids, attention_mask=mask, output_hidden_states=True) for folder in (checkpoint, tmp_path))
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- Compensated pruning -------------------------------------------------------------------------------------


def inputs_of(module, bert, batches) -> torch.Tensor:
    """The inputs of a module: (T, ...)."""
    inputs = []
    hook = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, 1)))
    for batch in batches:
        bert(batch.input_ids)
    hook.remove()
    return torch.cat(inputs)


def compensated(bert, keep, batches=None, **sizes):
    """A copy of `bert` after a compensated prune. sizes: the fields of the Shape that change."""
    distiller = as_distiller(copy.deepcopy(bert))
    compensate(distiller, keep, batches or random_batches())
    prune.prune_units(distiller, keep, Shape.of(bert.config)._replace(**sizes))
    return distiller.student


@pytest.mark.parametrize("group", ["feed_forward.0", "value_output.1"])
def test_the_fit_of_inner_units_is_torch_s_own_weighted_least_squares(monkeypatch, group):
    """Each token is divided by the standard deviation that the next LayerNorm divides by; masked tokens count more."""
    monkeypatch.setattr("extensions.compensate.RIDGE", 0.0)
    bert = random_bert()
    kind, _, number = group.partition(".")
    layer = bert.bert.layers[int(number)]
    residual = layer.output if kind == "feed_forward" else layer.attention["output"]
    keep = torch.tensor([0, 3, 4, 8, 9, 11, 15, 20])
    y, u = inputs_of(residual.dense, bert, random_batches()), inputs_of(residual.LayerNorm, bert, random_batches())
    weight = TOKEN_WEIGHTS.sqrt() / u.std(1, keepdim=True)
    fit = torch.linalg.lstsq(weight * extended(y[:, keep]), weight * y).solution  # (k+1,n)
    distiller = as_distiller(copy.deepcopy(bert))
    compensate(distiller, {group: keep}, random_batches())
    dense = distiller.get_submodule(next(f"student.{n}" for n, m in bert.named_modules() if m is residual.dense))
    torch.testing.assert_close(dense.weight[:, keep], residual.dense.weight @ fit[:-1].T)
    torch.testing.assert_close(dense.bias, residual.dense.bias + residual.dense.weight @ fit[-1])


def test_the_fit_of_hidden_units_is_torch_s_own_weighted_least_squares(monkeypatch):
    """The query of layer 0 computes, from the kept units, the best linear prediction of what it computed before."""
    monkeypatch.setattr("extensions.compensate.RIDGE", 0.0)
    bert = random_bert()
    keep = torch.tensor([1, 2, 3, 5, 8, 11, 13, 17, 20, 21, 22])
    norm, query = bert.bert.embeddings.LayerNorm, bert.bert.layers[0].attention["self"].query
    u = inputs_of(norm, bert, random_batches())
    narrow = extended(F.layer_norm(u[:, keep], (11,), norm.weight[keep], norm.bias[keep], norm.eps))
    predicted = narrow @ torch.linalg.lstsq(TOKEN_WEIGHTS.sqrt() * narrow, TOKEN_WEIGHTS.sqrt() * norm(u)).solution
    after = compensated(bert, {"hidden": keep}, hidden_size=11)
    states = after.bert.embeddings.LayerNorm(u[:, keep])
    torch.testing.assert_close(after.bert.layers[0].attention["self"].query(states), query(predicted))
    # The kept units keep their means, and one factor for all of them restores their size.
    old = norm(u)[:, keep]
    mean = (TOKEN_WEIGHTS * old).sum(0) / TOKEN_WEIGHTS.sum()
    torch.testing.assert_close((TOKEN_WEIGHTS * states).sum(0) / TOKEN_WEIGHTS.sum(), mean)
    torch.testing.assert_close((TOKEN_WEIGHTS * (states - mean) * (old - mean)).sum(),
                               (TOKEN_WEIGHTS * (states - mean) ** 2).sum())


def test_every_reader_of_pruned_units_is_compensated():
    bert = random_bert()
    distiller = as_distiller(copy.deepcopy(bert))
    keep = {"hidden": torch.arange(0, 24, 2)} | {f"{kind}.{i}": torch.arange(1, size, 2) for i in range(2)
                                                 for kind, size in (("feed_forward", 40), ("value_output", 24))}
    compensate(distiller, keep, random_batches())
    projections = [*distiller.hidden_projections, distiller.embedding_projection]
    for projection in projections:
        assert not torch.equal(projection.weight[:, keep["hidden"]], torch.eye(24).double()[:, keep["hidden"]])
    changed = set()
    for (name, old), new in zip(bert.named_parameters(), distiller.student.parameters(), strict=True):
        if name.endswith("weight") and old.dim() == 2 and not torch.equal(old, new):
            changed.add(name.removesuffix(".weight"))
    layers = [f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense")]
    assert changed == {*layers, "bert.pooler.dense", "cls.predictions.transform.dense"}


def test_the_ridge_of_a_fit_is_a_thousandth_of_the_mean_square_and_draws_to_the_plain_prune():
    """Against least squares with one more equation per kept unit, which says that the unit stays as it is."""
    torch.manual_seed(0)
    x, keep = torch.randn(50, 6).double(), torch.tensor([1, 4, 5])
    x_k = extended(x[:, keep])
    place = Place(None, keep)
    place.gram, place.cross = x_k.T @ x_k, x_k.T @ x
    weight = (1e-3 * (x[:, keep] ** 2).sum(0).mean()).sqrt()
    plain = torch.zeros(4, 6).double()
    plain[range(3), keep] = 1
    equations = torch.cat([x_k, weight * torch.eye(4).double()])
    expected = torch.linalg.lstsq(equations, torch.cat([x, weight * plain])).solution
    torch.testing.assert_close(place.fit(), expected)


def test_the_fit_of_the_projections_is_torch_s_own_weighted_least_squares(monkeypatch):
    """Without a constant, because they have no bias, and each to the outputs of its own layer."""
    monkeypatch.setattr("extensions.compensate.RIDGE", 0.0)
    bert = random_bert()
    distiller = as_distiller(copy.deepcopy(bert))
    keep = torch.tensor([1, 2, 3, 5, 8, 11, 13, 17, 20, 21, 22])
    norms = ["bert.embeddings.LayerNorm", *(f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2))]
    projections = dict(zip([distiller.embedding_projection, *distiller.hidden_projections], norms, strict=True))
    for projection in projections:
        torch.nn.init.normal_(projection.weight)
    before = {projection: projection.weight.clone() for projection in projections}
    compensate(distiller, {"hidden": keep}, random_batches())
    for projection, name in projections.items():
        norm, new = bert.get_submodule(name), distiller.student.get_submodule(name)
        u = inputs_of(norm, bert, random_batches())
        narrow = F.layer_norm(u[:, keep], (11,), new.weight[keep], new.bias[keep], new.eps)
        fit = torch.linalg.lstsq(TOKEN_WEIGHTS.sqrt() * narrow, TOKEN_WEIGHTS.sqrt() * norm(u)).solution  # (k,D)
        torch.testing.assert_close(projection.weight[:, keep], before[projection] @ fit.T)


def test_units_that_are_linear_functions_of_others_are_pruned_without_any_change(monkeypatch):
    monkeypatch.setattr("extensions.compensate.RIDGE", 1e-13)
    bert = random_bert()
    for layer in bert.bert.layers:
        ffn, value = layer.intermediate["dense"], layer.attention["self"].value
        for tensor in (ffn.weight.data, ffn.bias.data):
            tensor[[5, 30]] = tensor[[1, 2]]  # twins
        ffn.weight.data[7] = 0  # a constant
        for tensor in (value.weight.data, value.bias.data):
            tensor[2] = 2 * tensor[0] - tensor[5]
            tensor[[6 + 1, 12 + 1, 18 + 1]] = 3 * tensor[[6, 12, 18]]
    pruned = {"feed_forward": [5, 30, 7], "value_output": [2, 7, 13, 19]}
    width = {"feed_forward": 40, "value_output": 24}
    keep = {f"{kind}.{i}": torch.tensor([u for u in range(width[kind]) if u not in units])
            for kind, units in pruned.items() for i in range(2)}
    after = compensated(bert, keep, intermediate_size=37)
    for a, b in zip(outputs(after), outputs(bert), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    plain = copy.deepcopy(bert)
    prune_to(plain, keep, intermediate_size=37)
    assert (outputs(plain)[0] - outputs(bert)[0]).abs().max() > 0.1


def test_the_refitted_decoder_keeps_the_mean_of_the_logits_and_reduces_their_error():
    bert = random_bert()
    distiller, head = as_distiller(copy.deepcopy(bert)), bert.cls["predictions"]
    keep = torch.arange(0, 24, 2)
    compensate(distiller, {"hidden": keep}, random_batches())
    u = [head.activation(head.transform["dense"](bert(b.input_ids).hidden[-1].flatten(0, 1)[:12]))
         for b in random_batches()]
    u, words = torch.cat(u), bert.bert.embeddings.word_embeddings.weight
    norm, new = head.transform["LayerNorm"], distiller.student.cls["predictions"]
    old_logits = norm(u) @ words.T + head.bias

    def narrow(norm):
        return F.layer_norm(u[:, keep], (12,), norm.weight[keep], norm.bias[keep], norm.eps) @ words[:, keep].T

    logits = narrow(new.transform["LayerNorm"]) + new.bias
    torch.testing.assert_close(logits.mean(0), old_logits.mean(0))
    error, plain = ((a - old_logits).var(0).mean() for a in (logits, narrow(norm)))
    assert error < 0.9 * plain


def test_both_extensions_ignore_dropout_and_leave_modes_and_hooks_as_they_were():
    bert = random_bert().train()
    bert.set_dropout(0.5)
    keep = {"hidden": torch.arange(12), "feed_forward.0": torch.arange(20)}
    twice = [as_distiller(copy.deepcopy(bert)).train() for _ in range(2)]
    for distiller in twice:
        align_heads(distiller.student, random_batches(2))
        compensate(distiller, keep, random_batches(2))
        assert all(module.training and not module._forward_hooks for module in distiller.modules())
    for a, b in zip(twice[0].parameters(), twice[1].parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad


def test_fits_use_the_upcoming_training_rows(tokenizer):
    rows = MaskedRows(np.arange(14 * 50) % 100, 16, tokenizer)
    session = SimpleNamespace(args=SimpleNamespace(seed=3, batch_size=8, seq_length=16, micro_batch_size=3), rows=rows,
                              device="cpu", teacher=random_bert())
    batches = list(fit_batches(session, units=26, step=2))
    assert [len(b.input_ids) for b in batches] == [3, 3, 2, 3, 2]  # 13 rows of 16 tokens: 8 tokens for each unit
    upcoming = [rows.training_batch(3, step, 8).input_ids for step in (2, 3)]
    assert torch.equal(torch.cat([b.input_ids for b in batches]), torch.cat(upcoming)[:13])


def test_fits_use_unmasked_rows_of_all_lengths(tokenizer):
    """Those of a step have one length, so that a fit on the rows of a single step would know this length only."""
    teacher = random_bert()
    teacher.cls = None
    session = SimpleNamespace(args=SimpleNamespace(seed=0, batch_size=500, seq_length=128, micro_batch_size=64),
                              rows=UnmaskedRows(np.arange(126 * 600) % 100, 128, tokenizer), device="cpu",
                              teacher=teacher)
    ids = [batch.input_ids for batch in fit_batches(session, units=768, step=0)]
    assert {rows.shape[1] for rows in ids} == {16, 32, 64, 128} and sum(map(torch.numel, ids)) >= 8 * 768


def test_kept_units_that_are_all_zero_are_no_obstacle_to_a_fit():
    bert = random_bert()
    layer = bert.bert.layers[0]
    for linear in (layer.attention["self"].value, layer.intermediate["dense"]):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    expected = outputs(bert)
    keep = {group: torch.arange(3) for group in ("value_output.0", "feed_forward.0")}
    compensate(as_distiller(bert), keep, random_batches())
    assert_same(outputs(bert), expected)


def test_a_single_hidden_dimension_can_be_kept():
    """A LayerNorm over it returns its bias for every token, and so no variance that a fit could use."""
    bert = random_bert()
    for module in bert.modules():
        if isinstance(module, LayerNorm):
            module.bias.data.zero_()
    compensate(as_distiller(bert), {"hidden": torch.tensor([3])}, random_batches())
    assert all(p.isfinite().all() for p in bert.parameters())


# ---- On the bundled teacher ----------------------------------------------------------------------------------


def sensitivity(bert, batches) -> dict[str, torch.Tensor]:
    statistics: dict = {}
    for batch in batches:
        F.cross_entropy(bert(batch.input_ids, batch.positions).logits, batch.labels).backward()
        prune.accumulate_importance("sensitivity", statistics, bert, 0.5)
        bert.zero_grad()
    return statistics["sensitivity"]


@pytest.fixture(scope="module")
def bundled():
    """The bundled teacher, its sensitivities, batches of text that comes with Python, and the KL divergence from it."""
    from pydoc_data.topics import topics

    folder = ROOT / "teachers" / "small"
    teacher = load_model(folder).eval()
    tokenizer = load_tokenizer(folder, teacher.config.vocab_size)
    ids = [i for topic in sorted(topics) for i in tokenizer.encode(topics[topic][:1000], add_special_tokens=False).ids]
    rows = MaskedRows(np.array(ids), 64, tokenizer)
    heldout, *training = (rows.training_batch(0, step, 16) for step in range(3))
    with torch.no_grad():
        logits = teacher(heldout.input_ids, heldout.positions).logits

    @torch.no_grad()
    def kl(bert) -> float:
        student = bert(heldout.input_ids, heldout.positions).logits
        return distill.vocabulary_losses(student, logits, heldout.labels, 1.0)[1].item()

    return teacher, sensitivity(teacher, training[:2]), training, kl


def test_aligned_heads_lose_far_less_when_half_of_their_dimensions_are_pruned(bundled):
    teacher, importance, batches, kl = bundled
    new_shape = Shape.of(teacher.config)._replace(head_size=16)
    aligned = copy.deepcopy(teacher)
    align_heads(aligned, batches)
    assert kl(aligned) < 1e-6
    after = []
    for bert, scores in ((copy.deepcopy(teacher), importance), (aligned, sensitivity(aligned, batches[:2]))):
        prune.prune_units(bert, prune.choose_units(scores, Shape.of(bert.config), new_shape), new_shape)
        after.append(kl(bert))
    assert after[1] < after[0] / 3


@pytest.mark.parametrize("sizes, gain", [({"hidden_size": 224}, 2), ({"hidden_size": 128}, 2),
                                         ({"intermediate_size": 96}, 1.1), ({"head_size": 16}, 1.1)], ids=str)
def test_a_compensated_prune_does_less_harm(bundled, sizes, gain):
    teacher, importance, batches, kl = bundled
    new_shape = Shape.of(teacher.config)._replace(**sizes)
    keep = prune.choose_units(importance, Shape.of(teacher.config), new_shape)
    plain = copy.deepcopy(teacher)
    prune.prune_units(plain, keep, new_shape)
    better = compensated(teacher, keep, batches, **sizes)
    assert kl(better) < kl(plain) / gain
    assert better.config == plain.config
    assert {n: p.shape for n, p in better.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


# ---- Through the command line --------------------------------------------------------------------------------


def run(teacher, corpus, folder, *flags) -> list[dict]:
    """The evaluations of a run of 6 steps from width 32 to 16, in float32 on every CPU."""
    code = distill.main(["--teacher", str(teacher), "--corpus", str(corpus), "--output", str(folder / "run"),
                         "--cache-dir", str(folder / "cache"), "--target-width", "16", "--steps", "6",
                         "--batch-size", "8", "--seq-length", "16", "--learning-rate", "1e-3", "--device", "cpu",
                         "--precision", "fp32", "--overwrite", *flags])
    assert code == 0
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "eval"]


def test_both_extensions_in_a_run_bring_the_student_closer_with_any_micro_batch_size(checkpoint, corpus, tmp_path):
    from transformers import AutoModelForMaskedLM

    plain = run(checkpoint, corpus, tmp_path)
    extended_runs = [run(checkpoint, corpus, tmp_path, "--align-heads", "--compensate", *more)
                     for more in ((), ("--micro-batch-size", "3"))]
    assert abs(extended_runs[0][0]["kl"]) < 1e-5  # alignment changes nothing that is computed
    kl, kl_of_micro_batches = (evaluations[-1]["kl"] for evaluations in extended_runs)
    assert kl < plain[-1]["kl"] and kl_of_micro_batches == pytest.approx(kl, rel=1e-3)
    student = load_model(tmp_path / "run" / "student").eval()
    assert Shape.of(student.config) == Shape(16, 32, 4, 4)
    ids = torch.arange(5, 37).reshape(2, 16)
    standard = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student").eval()(ids)
    torch.testing.assert_close(standard.logits.flatten(0, 1), student(ids, torch.arange(32)).logits)


def test_heads_are_aligned_before_a_student_is_truncated(checkpoint, corpus, tmp_path):
    """Only then are the first dimensions of a head its strongest, and W_o W_v of the truncated heads is closer to the
    teacher's. Alignment afterwards would not change that product."""
    def products(folder, width):
        attention = [layer.attention for layer in load_model(folder).bert.layers]
        return [a["output"].dense.weight[:width] @ a["self"].value.weight[:, :width] for a in attention]

    errors = []
    for i, flags in enumerate(([], ["--align-heads"])):
        run(checkpoint, corpus, tmp_path / str(i), "--init", "truncated", "--learning-rate", "0", *flags)
        pairs = zip(products(tmp_path / str(i) / "run" / "student", 16), products(checkpoint, 16), strict=True)
        errors.append(sum((student - teacher).norm().item() for student, teacher in pairs))
    assert errors[1] < 0.9 * errors[0]


def test_both_extensions_work_for_a_teacher_without_head_and_pooler(checkpoint, corpus, tmp_path):
    bert = load_model(checkpoint)
    bert.cls, bert.bert.pooler = None, None
    folder = tmp_path / "headless"
    folder.mkdir()
    save_model(bert, folder)
    save_tokenizer(load_tokenizer(checkpoint, bert.config.vocab_size), folder, 64)
    plain = run(folder, corpus, tmp_path)
    better = run(folder, corpus, tmp_path, "--align-heads", "--compensate")
    assert better[-1]["hidden_mse"] < plain[-1]["hidden_mse"]
