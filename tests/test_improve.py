"""Aligned heads and compensated cuts, against svd, lstsq and the unchanged model, and on the bundled teacher."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_prune import ALPHAS, IDS, POSITIONS, assert_same, outputs, random_bert

import data
import distill
import improve
import model
import prune
from data import Batch
from prune import Widths


def many(count: int = 20) -> list[Batch]:
    """Batches of random tokens, 30 each, of which the first 12 count as masked."""
    generator = torch.Generator().manual_seed(0)
    masked = POSITIONS[:12]
    return [Batch(torch.randint(97, (2, 15), generator=generator), masked, masked) for _ in range(count)]


# How much each of them counts in a fit
COUNTS = torch.tensor([1.0] * 12 + [improve.UNMASKED] * 18, dtype=torch.float64).repeat(20)[:, None]


def as_distiller(bert) -> distill.Distiller:
    return distill.Distiller(bert, ALPHAS).to(bert.cls["predictions"].bias.dtype)


# --------------------------------------------------------------------------------------------------- aligned heads


@pytest.mark.parametrize("batches", [many(), [Batch(IDS[:1, :5], POSITIONS[:0], POSITIONS[:0])]],
                         ids=["many tokens", "five tokens in 24 dimensions"])
def test_alignment_changes_nothing_that_is_computed(batches):
    bert = random_bert()
    aligned = copy.deepcopy(bert)
    improve.align_heads(aligned, batches)
    assert_same(outputs(aligned), outputs(bert))
    assert_same(aligned(IDS, want_scores=True).scores, bert(IDS, want_scores=True).scores)
    for name, p in bert.named_parameters():
        turned = any(part in name for part in (".query.", ".key.", ".value.", "attention.output.dense.weight"))
        assert torch.equal(p, aligned.get_parameter(name)) != turned, name


def test_alignment_of_heads_that_do_nothing():
    bert = random_bert()
    attention = bert.bert.layers[0].attention
    for linear, rows in (("query", slice(0, 6)), ("key", slice(6, 9)), ("value", slice(0, 12))):
        getattr(attention["self"], linear).weight.data[rows] = 0
        getattr(attention["self"], linear).bias.data[rows] = 0
    attention["output"].dense.weight.data[:, 12:18] = 0
    expected = outputs(bert)
    improve.align_heads(bert, many())
    assert_same(outputs(bert), expected)


def test_the_dimensions_are_the_singular_directions_of_the_weighted_products():
    bert = random_bert()
    x = torch.cat([improve.extended(bert(b.input_ids).hidden[0]) for b in many()]).detach()  # what layer 1 reads
    x = x / len(x) ** 0.5
    layer = bert.bert.layers[1]

    def factors(head: int):
        rows = slice(6 * head, 6 * head + 6)
        a = layer.attention["self"]
        q, k, v = (x @ torch.cat([m.weight[rows], m.bias[rows, None]], 1).T for m in (a.query, a.key, a.value))
        return (q, k), (v, layer.attention["output"].dense.weight[:, rows])

    expected = [[torch.linalg.svdvals(a @ b.T)[:6] for a, b in factors(head)] for head in range(4)]
    improve.align_heads(bert, many())
    for head in range(4):
        for (a, b), values in zip(factors(head), expected[head], strict=True):
            torch.testing.assert_close(a.T @ a, values.diag(), rtol=1e-6, atol=1e-6 * values[0].item())
            torch.testing.assert_close(b.T @ b, values.diag(), rtol=1e-6, atol=1e-6 * values[0].item())


def test_aligned_model_is_the_same_in_transformers(checkpoint, tmp_path):
    from transformers import AutoModelForMaskedLM

    bert = model.load_model(checkpoint).eval()
    ids = torch.arange(5, 45).reshape(2, 20)
    improve.align_heads(bert, [Batch(ids, POSITIONS[:0], POSITIONS[:0])])
    model.save_model(bert, tmp_path)
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([18, 19]), 0)
    before, after = (AutoModelForMaskedLM.from_pretrained(folder).eval()(
        ids, attention_mask=mask, output_hidden_states=True) for folder in (checkpoint, tmp_path))
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ compensated cuts


def seen_by(module, bert, batches) -> torch.Tensor:
    """What enters a module: (T, ...)."""
    inputs = []
    hook = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, 1)))
    for batch in batches:
        bert(batch.input_ids)
    hook.remove()
    return torch.cat(inputs)


def compensated(bert, keep, batches=None, **widths):
    """A copy of `bert` after a compensated cut."""
    distiller = as_distiller(copy.deepcopy(bert))
    improve.compensate(distiller, keep, batches or many())
    prune.cut(distiller, keep, Widths.of(bert.config)._replace(**widths))
    return distiller.student


@pytest.mark.parametrize("units", ["feed_forward.0", "value_output.1"])
def test_inner_fit_is_torch_s_own_least_squares(monkeypatch, units):
    """...on the stored tokens, divided by the deviation that the next LayerNorm divides by; masked ones count more."""
    monkeypatch.setattr(improve, "RIDGE", 0.0)
    bert = random_bert()
    kind, _, number = units.partition(".")
    layer = bert.bert.layers[int(number)]
    residual = layer.output if kind == "feed_forward" else layer.attention["output"]
    keep = torch.tensor([0, 3, 4, 8, 9, 11, 15, 20])
    y, u = seen_by(residual.dense, bert, many()), seen_by(residual.LayerNorm, bert, many())
    weight = COUNTS.sqrt() / u.std(1, keepdim=True)
    fit = torch.linalg.lstsq(weight * improve.extended(y[:, keep]), weight * y).solution  # (k+1,n)
    distiller = as_distiller(copy.deepcopy(bert))
    improve.compensate(distiller, {units: keep}, many())
    dense = distiller.get_submodule(next(f"student.{n}" for n, m in bert.named_modules() if m is residual.dense))
    torch.testing.assert_close(dense.weight[:, keep], residual.dense.weight @ fit[:-1].T)
    torch.testing.assert_close(dense.bias, residual.dense.bias + residual.dense.weight @ fit[-1])


def test_hidden_fit_is_torch_s_own_least_squares(monkeypatch):
    """Readers of the first LayerNorm compute, from what is left, the best linear guess of what they computed."""
    monkeypatch.setattr(improve, "RIDGE", 0.0)
    bert = random_bert()
    keep = torch.tensor([1, 2, 3, 5, 8, 11, 13, 17, 20, 21, 22])
    norm, query = bert.bert.embeddings.LayerNorm, bert.bert.layers[0].attention["self"].query
    u = seen_by(norm, bert, many())
    narrow = improve.extended(F.layer_norm(u[:, keep], (11,), norm.weight[keep], norm.bias[keep], norm.eps))
    guess = narrow @ torch.linalg.lstsq(COUNTS.sqrt() * narrow, COUNTS.sqrt() * norm(u)).solution
    after = compensated(bert, {"hidden": keep}, hidden=11)
    states = after.bert.embeddings.LayerNorm(u[:, keep])
    torch.testing.assert_close(after.bert.layers[0].attention["self"].query(states), query(guess))
    # The states that stay keep their means, and one factor for all has made them as large as they were
    old = norm(u)[:, keep]
    mean = (COUNTS * old).sum(0) / COUNTS.sum()
    torch.testing.assert_close((COUNTS * states).sum(0) / COUNTS.sum(), mean)
    torch.testing.assert_close((COUNTS * (states - mean) * (old - mean)).sum(), (COUNTS * (states - mean) ** 2).sum())


def test_units_that_others_determine_are_cut_without_harm(monkeypatch):
    monkeypatch.setattr(improve, "RIDGE", 1e-13)
    bert = random_bert()
    for layer in bert.bert.layers:
        ffn, value = layer.intermediate["dense"], layer.attention["self"].value
        for tensor in (ffn.weight.data, ffn.bias.data):
            tensor[[5, 30]] = tensor[[1, 2]]  # twins
        ffn.weight.data[7] = 0  # a constant
        for tensor in (value.weight.data, value.bias.data):
            tensor[2] = 2 * tensor[0] - tensor[5]
            tensor[[6 + 1, 12 + 1, 18 + 1]] = 3 * tensor[[6, 12, 18]]
    gone = {"feed_forward": [5, 30, 7], "value_output": [2, 7, 13, 19]}
    width = {"feed_forward": 40, "value_output": 24}
    keep = {f"{kind}.{i}": torch.tensor([u for u in range(width[kind]) if u not in units])
            for kind, units in gone.items() for i in range(2)}
    after = compensated(bert, keep, intermediate=37)
    for a, b in zip(outputs(after), outputs(bert), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    plain = copy.deepcopy(bert)
    prune.cut(plain, keep, Widths.of(bert.config)._replace(intermediate=37))
    assert (outputs(plain)[0] - outputs(bert)[0]).abs().max() > 0.1


def test_the_decoder_s_new_bias_keeps_the_mean_of_the_logits_it_was_fitted_on():
    bert = random_bert()
    distiller, head = as_distiller(copy.deepcopy(bert)), bert.cls["predictions"]
    keep = torch.arange(0, 24, 2)
    improve.compensate(distiller, {"hidden": keep}, many())
    u = [head.activation(head.transform["dense"](bert(b.input_ids).hidden[-1].flatten(0, 1)[:12])) for b in many()]
    u, words = torch.cat(u), bert.bert.embeddings.word_embeddings.weight
    norm, new = head.transform["LayerNorm"], distiller.student.cls["predictions"]
    old_logits = norm(u) @ words.T + head.bias

    def narrow(norm):
        return F.layer_norm(u[:, keep], (12,), norm.weight[keep], norm.bias[keep], norm.eps) @ words[:, keep].T

    logits = narrow(new.transform["LayerNorm"]) + new.bias
    torch.testing.assert_close(logits.mean(0), old_logits.mean(0))
    error, plain = ((a - old_logits).var(0).mean() for a in (logits, narrow(norm)))
    assert error < 0.9 * plain


def test_modes_hooks_and_dropout_are_as_before():
    bert = random_bert().train()
    bert.set_dropout(0.5, 0.5)
    keep = {"hidden": torch.arange(12), "feed_forward.0": torch.arange(20)}
    twice = [as_distiller(copy.deepcopy(bert)).train() for _ in range(2)]
    for distiller in twice:
        improve.align_heads(distiller.student, many(2))
        improve.compensate(distiller, keep, many(2))
        assert all(module.training and not module._forward_hooks for module in distiller.modules())
    for a, b in zip(twice[0].parameters(), twice[1].parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad


def test_fit_batches_are_the_rows_to_come(tokenizer):
    rows = data.Rows(np.arange(14 * 50) % 100, 16, tokenizer)
    got = list(improve.fit_batches(rows, 26, seed=3, step=2, batch_size=8, micro=3, device="cpu"))
    assert [len(b.input_ids) for b in got] == [3, 3, 2, 3, 2]  # 13 rows of 16 tokens: 8 tokens for each of 26 units
    coming = [rows.training_batch(3, step, 8).input_ids for step in (2, 3)]
    assert torch.equal(torch.cat([b.input_ids for b in got]), torch.cat(coming)[:13])


# ------------------------------------------------------------------------------------------------- on real weights


def sensitivity(bert, batches) -> dict[str, torch.Tensor]:
    average: dict[str, torch.Tensor] = {}
    for batch in batches:
        F.cross_entropy(bert(batch.input_ids, batch.positions).logits, batch.labels).backward()
        prune.accumulate_sensitivity(average, bert, 0.5)
        bert.zero_grad()
    return average


@pytest.fixture(scope="module")
def small():
    """The bundled teacher, its sensitivities, batches of text that comes with Python, and the KL divergence from it."""
    from pydoc_data.topics import topics

    folder = ROOT / "teachers" / "small"
    teacher = model.load_model(folder).eval()
    tokenizer = data.load_tokenizer(folder, teacher.config.vocab_size)
    ids = [i for topic in sorted(topics) for i in tokenizer.encode(topics[topic][:4000], add_special_tokens=False).ids]
    rows = data.Rows(np.array(ids), 64, tokenizer)
    heldout, training = rows.training_batch(0, 0, 32), [rows.training_batch(0, step, 32) for step in (1, 2, 3, 4)]
    with torch.no_grad():
        logits = teacher(heldout.input_ids, heldout.positions).logits

    @torch.no_grad()
    def kl(bert) -> float:
        return distill.PredictionLosses.apply(
            bert(heldout.input_ids, heldout.positions).logits, logits, heldout.labels, 1.0)[1].item()

    return teacher, sensitivity(teacher, training[:2]), training, kl


def test_aligned_heads_survive_the_cut_to_half_their_dimensions(small):
    teacher, importance, batches, kl = small
    new = Widths.of(teacher.config)._replace(head_size=16)
    aligned = copy.deepcopy(teacher)
    improve.align_heads(aligned, batches)
    assert kl(aligned) < 1e-6
    after = []
    for bert, scores in ((copy.deepcopy(teacher), importance), (aligned, sensitivity(aligned, batches[:2]))):
        prune.cut(bert, prune.choose_units(scores, Widths.of(bert.config), new), new)
        after.append(kl(bert))
    assert after[1] < after[0] / 3


@pytest.mark.parametrize("widths, gain", [({"hidden": 224}, 2), ({"hidden": 128}, 2), ({"intermediate": 96}, 1.1),
                                          ({"head_size": 16}, 1.1)], ids=str)
def test_a_compensated_cut_does_less_harm(small, widths, gain):
    teacher, importance, batches, kl = small
    new = Widths.of(teacher.config)._replace(**widths)
    keep = prune.choose_units(importance, Widths.of(teacher.config), new)
    plain = copy.deepcopy(teacher)
    prune.cut(plain, keep, new)
    better = compensated(teacher, keep, batches, **widths)
    assert kl(better) < kl(plain) / gain
    assert better.config == plain.config
    assert {n: p.shape for n, p in better.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


def test_the_projections_are_compensated_as_well(small):
    teacher, _, batches, _ = small
    keep, losses = {"hidden": torch.arange(0, 256, 2)}, []
    with torch.no_grad():
        target = teacher(batches[0].input_ids, batches[0].positions, want_scores=True)
        for compensate in (False, True):
            distiller = distill.Distiller(copy.deepcopy(teacher), ALPHAS)
            if compensate:
                improve.compensate(distiller, keep, batches)
            prune.cut(distiller, keep, Widths.of(teacher.config)._replace(hidden=128))
            losses.append(distiller(batches[0], target))
    for name in ("emb", "hidn", "pred", "attn"):
        assert losses[1][name] < losses[0][name], name


# ------------------------------------------------------------------------------------------------ the command line


def run(checkpoint, corpus, folder, *flags) -> list[dict]:
    code = distill.main(["--teacher", str(checkpoint), "--corpus", str(corpus), "--output", str(folder / "run"),
                         "--cache-dir", str(folder / "cache"), "--target-width", "16", "--steps", "6",
                         "--batch-size", "8", "--seq-length", "16", "--learning-rate", "1e-3", "--device", "cpu",
                         *flags])
    assert code == 0
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def test_both_flags_through_the_command_line(checkpoint, corpus, tmp_path):
    from transformers import AutoModelForMaskedLM

    plain = run(checkpoint, corpus, tmp_path)
    log = run(checkpoint, corpus, tmp_path, "--align-heads", "--compensate", "--overwrite")
    again = run(checkpoint, corpus, tmp_path, "--align-heads", "--compensate", "--overwrite", "--micro-batch-size", "3")
    evaluations = [[line for line in lines if line["event"] == "eval"] for lines in (plain, log, again)]
    assert abs(evaluations[1][0]["kl"]) < 1e-5
    kls = [lines[-1]["kl"] for lines in evaluations]
    assert kls[1] < kls[0] and kls[2] == pytest.approx(kls[1], rel=1e-3)
    student = model.load_model(tmp_path / "run" / "student").eval()
    assert Widths.of(student.config) == Widths(16, 32, 4, 4)
    ids = torch.arange(5, 37).reshape(2, 16)
    standard = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "student").eval()(ids)
    torch.testing.assert_close(standard.logits.flatten(0, 1), student(ids, torch.arange(32)).logits)
    flags = json.loads((tmp_path / "run" / "run.json").read_text())["flags"]
    assert flags["align_heads"] is True and flags["compensate"] is True


def test_both_flags_on_a_teacher_without_head_and_pooler(checkpoint, corpus, tmp_path):
    bert = model.load_model(checkpoint)
    bert.cls, bert.bert.pooler = None, None
    folder = tmp_path / "headless"
    folder.mkdir()
    model.save_model(bert, folder)
    data.save_tokenizer(data.load_tokenizer(checkpoint, bert.config.vocab_size), folder, 64)
    log = run(folder, corpus, tmp_path, "--align-heads", "--compensate")
    plain = run(folder, corpus, tmp_path, "--overwrite")
    ends = [[line for line in lines if line["event"] == "eval"][-1]["hidden_mse"] for lines in (log, plain)]
    assert ends[0] < ends[1]
