"""The losses, the loop and the command line of distill.py."""

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import data
import distill
import model
import prune
from model import Bert, BertConfig

ROOT = Path(__file__).resolve().parent.parent
ALPHAS = dict.fromkeys(("mlm", "pred", "hidn", "emb", "attn"), 1.0)
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny teacher with every part, `headless` without a masked-LM head, and `text.txt` of 60 documents."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*data.SPECIAL, *letters, *(f"##{c}" for c in letters), ".", "the", "of", "and"]
    tokenizer = data.wordpiece_tokenizer({word: i for i, word in enumerate(words)})
    torch.manual_seed(0)
    for name, head in (("teacher", True), ("headless", False)):
        (folder / name).mkdir()
        bert = Bert(BertConfig(vocab_size=len(words), **TINY), head=head)
        for p in bert.parameters():  # far from the initial values, so that every part matters
            p.data.add_(torch.randn_like(p) * 0.2)
        model.save_model(bert, folder / name)
        data.save_tokenizer(tokenizer, folder / name, 32)
    rng = random.Random(0)
    documents = [" ".join(rng.choice(["the", "of", "and", "abc", "deaf"]) for _ in range(80)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Call the program; returns its exit code and the run folder. Later flags win over the tiny defaults."""
    def call(*flags, teacher="teacher"):
        output = tmp_path / "run"
        code = distill.main([
            "--teacher", str(folder / teacher), "--corpus", str(folder / "text.txt"), "--output", str(output),
            "--cache-dir", str(folder / "cache"), "--target-width", "16", "--steps", "6", "--batch-size", "8",
            "--seq-length", "16", "--learning-rate", "1e-3", "--device", "cpu", *map(str, flags)])
        return code, output

    return call


def read_log(output: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "model.safetensors")


def tiny_distiller(folder, alphas=ALPHAS, temperature=1.0):
    teacher = model.load_model(folder / "teacher").eval()
    return teacher, distill.Distiller(copy.deepcopy(teacher), alphas, temperature).eval()


def tiny_batch(folder, rows=4):
    tokenizer = data.load_tokenizer(folder / "teacher", 100)
    tokens = data.tokenise([str(folder / "text.txt")], tokenizer, folder / "cache")
    return data.Rows(tokens.train, 16, tokenizer).training_batch(0, 0, rows)


# ---------------------------------------------------------------------------------------------------------- losses


def test_distillation_losses_start_at_exactly_zero(folder):
    teacher, distiller = tiny_distiller(folder)
    batch = tiny_batch(folder)
    losses = distiller(batch, teacher(batch.input_ids, batch.positions, want_scores=True))
    assert {name: losses[name].item() for name in ("pred", "hidn", "emb", "attn")} == dict.fromkeys(
        ("pred", "hidn", "emb", "attn"), 0.0)
    assert losses["loss"].item() == losses["mlm"].item() > 0


def test_losses_equal_their_equations(folder):
    """Against sums written out from the standard library's outputs at all positions, per head, with another student."""
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
    w_hidn, w_emb = distiller.hidden_projection.weight, distiller.embedding_projection.weight
    expected = {
        "mlm": F.cross_entropy(z_s, batch.labels),
        "pred": (p_t * (p_t / p_s).log()).sum(-1).mean() * 4,
        "hidn": sum(((t - s @ w_hidn.T) ** 2).mean() for t, s in zip(h_t[1:], h_s[1:], strict=True)) / 2,
        "emb": ((h_t[0] - h_s[0] @ w_emb.T) ** 2).mean(),
        "attn": sum(((t - s) ** 2).mean() for t, s in zip(a_t, a_s, strict=True)) / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(losses["loss"], sum(alphas[name] * value for name, value in expected.items()))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_written_out_gradients_are_autograd_s(temperature):
    torch.manual_seed(0)
    teacher, labels = torch.randn(6, 11), torch.randint(11, (6,))
    student = torch.randn(6, 11, requires_grad=True)
    p, log_q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    expected = F.cross_entropy(student, labels), (p * (p.log() - log_q)).sum(-1).mean() * temperature**2
    losses = distill.PredictionLosses.apply(student, teacher, labels, temperature)
    torch.testing.assert_close(losses, expected)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 3.0)):
        gradients = [torch.autograd.grad(sum(w * x for w, x in zip(weights, pair, strict=True)), student,
                                         retain_graph=True)[0] for pair in (losses, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ALPHAS)
def test_a_loss_of_weight_zero_is_left_out(run, name):
    code, output = run(f"--alpha-{name}", 0, "--log-every", 1)
    assert code == 0
    logged = {key for key in read_log(output, "train")[0] if key.startswith("loss_")}
    assert logged == {f"loss_{other}" for other in ALPHAS if other != name}


# -------------------------------------------------------------------------------------------------------- the loop


def test_a_run_ends_at_the_asked_shape_and_opens_in_transformers(run, folder):
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
    ours = model.load_model(output / "student").eval()
    batch = tiny_batch(folder)
    logits = standard.eval()(batch.input_ids).logits.flatten(0, 1)[batch.positions]
    torch.testing.assert_close(ours(batch.input_ids, batch.positions).logits, logits, rtol=0, atol=1e-4)
    text = "the deaf and of abc"
    expected = data.load_tokenizer(folder / "teacher", 100).encode(text).ids
    assert AutoTokenizer.from_pretrained(output / "student")(text)["input_ids"] == expected
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "lineage.json"}
    assert {p.name for p in (output / "student").iterdir()} == names
    assert {p.name for p in output.iterdir()} == {"run.json", "log.jsonl", "student"}


def test_the_log_tells_the_whole_run(run):
    code, output = run("--log-every", 2, "--eval-every", 3, "--prune-end", 0.5)
    assert code == 0
    train, evals, cuts = (read_log(output, event) for event in ("train", "eval", "cut"))
    assert [line["step"] for line in train] == [2, 4, 6] and [line["step"] for line in evals] == [0, 3, 6]
    assert {"tokens", "loss", "loss_mlm", "loss_pred", "loss_hidn", "loss_emb", "loss_attn", "D", "F", "H", "K",
            "parameters", "learning_rate", "tokens_per_second", "memory_mb"} <= set(train[0])
    assert train[-1]["tokens"] == 6 * 8 * 16 and (train[-1]["D"], train[-1]["F"]) == (16, 32)
    assert train[-1]["parameters"] == sum(t.numel() for t in weights(output).values())
    assert evals[0]["kl"] == 0 and evals[0]["mlm_loss"] == evals[0]["teacher_mlm_loss"]
    assert evals[0]["top1"] == evals[0]["teacher_top1"] and evals[-1]["kl"] > 0
    assert cuts[0]["before"] == {"hidden": 32, "intermediate": 64, "heads": 4, "head_size": 8}
    assert cuts[-1]["after"] == {"hidden": 16, "intermediate": 32, "heads": 4, "head_size": 4}
    assert cuts[-1]["step"] <= 3 and all(cut["milliseconds"] > 0 for cut in cuts)
    flags = json.loads((output / "run.json").read_text())
    assert flags["seed"] == 0 and flags["flags"]["steps"] == 6
    assert torch.__version__.startswith(flags["versions"]["torch"])


def test_the_student_is_the_teacher_s_surviving_units(run, folder):
    """With a learning rate of zero the student is a submatrix of the teacher, picked by lineage.json."""
    code, output = run("--learning-rate", 0, "--weight-decay", 0)
    assert code == 0
    student, teacher = weights(output), load_file(folder / "teacher" / "model.safetensors")
    lineage = {k: torch.tensor(v) for k, v in json.loads((output / "student" / "lineage.json").read_text()).items()}
    axes = prune.tensor_axes(model.load_model(folder / "teacher"))
    assert set(student) == set(teacher)
    for name, tensor in student.items():
        expected = teacher[name]
        for dimension, units in axes.get(name, {}).items():
            expected = expected.index_select(dimension, lineage[units])
        scale = (4 / 8) ** 0.5 if ".query." in name else 1.0
        torch.testing.assert_close(tensor, expected * scale, msg=name)


def test_the_sensitivity_decides_by_default_and_the_other_measures_differ(run):
    kept = {}
    for importance in ("sensitivity", "magnitude", "random"):
        code, output = run("--importance", importance, "--overwrite", "--learning-rate", 0)
        assert code == 0
        kept[importance] = json.loads((output / "student" / "lineage.json").read_text())["hidden"]
    code, output = run("--overwrite", "--learning-rate", 0)
    assert json.loads((output / "student" / "lineage.json").read_text())["hidden"] == kept["sensitivity"]
    assert len(set(map(tuple, kept.values()))) == 3


def test_the_classical_ways_to_begin(run, folder):
    """At the final widths from the first step: the teacher's first units, or random weights that know nothing of it."""
    code, output = run("--init", "truncated", "--learning-rate", 0, "--target-heads", 2)
    assert code == 0 and not read_log(output, "cut")
    lineage = json.loads((output / "student" / "lineage.json").read_text())
    assert lineage["hidden"] == list(range(16)) and lineage["query_key.0"] == list(range(16))
    teacher = load_file(folder / "teacher" / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(weights(output)[name], teacher[name][:32, :16])
    code, output = run("--init", "random", "--learning-rate", 0, "--overwrite", "--log-every", 1)
    assert code == 0 and not read_log(output, "cut") and {line["D"] for line in read_log(output, "train")} == {16}
    assert json.loads((output / "student" / "lineage.json").read_text()) == {}
    values = weights(output)[name]
    assert values.shape == (32, 16) and 0.015 < values.std() < 0.025  # the teacher's are ten times as large
    assert read_log(output, "eval")[0]["kl"] > 0.05
    torch.rand(7)
    code, output = run("--init", "random", "--learning-rate", 0, "--overwrite")
    assert code == 0 and torch.equal(weights(output)[name], values)
    code, output = run("--init", "random", "--learning-rate", 0, "--overwrite", "--seed", 1)
    assert code == 0 and not torch.equal(weights(output)[name], values)


def test_a_recipe_sets_defaults_and_flags_win(run):
    code, output = run("--recipe", "best", "--steps", 30, "--alpha-attn", 0, "--prune-end", 0.1)
    flags = json.loads((output / "run.json").read_text())["flags"]
    assert code == 0 and flags["prune_end"] == 0.1 and flags["alpha_attn"] == 0
    assert {name: flags[name] for name in ("align_heads", "compensate", "alpha_mlm")} == {
        "align_heads": True, "compensate": True, "alpha_mlm": 0}
    assert "loss_mlm" not in read_log(output, "train")[0]
    published = distill.parse_arguments(["--teacher", "x"])
    assert not published.align_heads and not published.compensate and published.alpha_mlm == 1
    best = vars(distill.parse_arguments(["--teacher", "x", "--recipe", "best"]))
    changed = {name for name, value in vars(published).items() if best[name] != value}
    assert changed == {"recipe", *distill.RECIPES["best"]}


def test_students_on_the_way(run):
    """Every snapshot is a complete student with the widths and units of its moment; an old run's are swept away."""
    code, output = run("--snapshots", "24,20", "--prune-end", 1, "--steps", 10)
    assert code == 0
    assert sorted(path.name for path in output.glob("student*")) == ["student", "student-20", "student-24"]
    known = None
    for name, shape in (("student-24", (24, 48, 4)), ("student-20", (20, 40, 4)), ("student", (16, 32, 4))):
        bert = model.load_model(output / name)
        assert (bert.config.hidden_size, bert.config.intermediate_size, bert.config.num_attention_heads) == shape
        kept = json.loads((output / name / "lineage.json").read_text())["hidden"]
        assert len(kept) == shape[0] and (known is None or set(kept) < set(known))
        known = kept
        transformers.AutoModelForMaskedLM.from_pretrained(output / name)
    code, _ = run("--overwrite")
    assert code == 0 and not list(output.glob("student-*"))


def test_a_snapshot_has_learned_since_its_cut(run, monkeypatch):
    """It is written right before the next cut: all steps since the last one are in it."""
    written = {}
    real = distill.export
    monkeypatch.setattr(distill, "export", lambda student, tokenizer, lineage, folder: (
        written.update({folder.name: (len(read_log(folder.parent, "train")), len(read_log(folder.parent, "cut")))}),
        real(student, tokenizer, lineage, folder)))
    code, output = run("--snapshots", "24", "--prune-start", 0.25, "--prune-end", 0.25, "--log-every", 1, "--steps", 8)
    assert code == 0 and [cut["after"]["hidden"] for cut in read_log(output, "cut")] == [24, 16]
    assert [cut["step"] for cut in read_log(output, "cut")] == [2, 3]
    assert written == {"student-24": (2, 1), "student": (8, 2)}


def test_evaluations_around_the_cuts(run):
    code, output = run("--eval-cuts", "--eval-every", 1, "--learning-rate", 0, "--weight-decay", 0)
    cuts, evals = read_log(output, "cut"), {line["step"]: line["kl"] for line in read_log(output, "eval")}
    assert code == 0 and cuts
    for cut in cuts:  # nothing is learned between two steps here
        assert cut["eval_before"]["kl"] == pytest.approx(evals[cut["step"] - 1], abs=1e-7)
        assert cut["eval_after"]["kl"] == pytest.approx(evals[cut["step"]], abs=1e-7)
        assert cut["eval_after"]["kl"] > cut["eval_before"]["kl"]


def test_gradient_accumulation_equals_one_big_batch(run):
    results = []
    for micro in (8, 3, 1):
        code, output = run("--micro-batch-size", micro, "--overwrite")
        assert code == 0
        results.append((weights(output), (output / "student" / "lineage.json").read_text()))
    for other, lineage in results[1:]:
        assert lineage == results[0][1]
        for name, tensor in results[0][0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_a_step_holds_no_more_than_a_micro_batch_at_a_time(run, monkeypatch):
    sizes = []
    forward = distill.Distiller.forward

    def watched(self, batch, teacher):
        sizes.append(len(batch.input_ids))
        return forward(self, batch, teacher)

    monkeypatch.setattr(distill.Distiller, "forward", watched)
    code, _ = run("--micro-batch-size", 3, "--steps", 2)
    assert code == 0 and sizes == [3, 3, 2, 3, 3, 2]


def test_the_tokenised_text_lies_where_cache_dir_says(run, tmp_path):
    code, _ = run("--cache-dir", tmp_path / "elsewhere")
    assert code == 0 and {path.name for path in (tmp_path / "elsewhere").glob("*/*")} >= {"train.bin", "heldout.bin"}


def test_same_seed_same_weights_bit_for_bit_another_seed_others(run):
    states = []
    for seed in (5, 5, 6):
        code, output = run("--seed", seed, "--overwrite", "--dropout", 0.1)
        assert code == 0
        states.append(weights(output))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_one_update_equals_torch_s_own(run, folder):
    """One step without a cut, done again with torch.optim.AdamW on the teacher and its losses."""
    flags = dict(learning_rate=0.01, clip=0.5, weight_decay=0.1)
    code, output = run("--steps", 1, "--prune-start", 1, "--prune-end", 1, "--warmup", 1, "--learning-rate", 0.01,
                       "--clip", 0.5, "--weight-decay", 0.1, "--target-width", 28)
    assert code == 0
    teacher, distiller = tiny_distiller(folder)
    distiller.student.bert.pooler.requires_grad_(False)
    named = [(n, p) for n, p in distiller.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": flags["weight_decay"] if p.dim() == 2 and "projection" not in n else 0.0}
         for n, p in named], lr=flags["learning_rate"], betas=(0.9, 0.999), eps=1e-6)
    batch = tiny_batch(folder, rows=8)
    distiller(batch, teacher(batch.input_ids, batch.positions, want_scores=True))["loss"].backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in named], flags["clip"])
    optimizer.step()
    lineage = {k: torch.tensor(v) for k, v in json.loads((output / "student" / "lineage.json").read_text()).items()}
    axes = prune.tensor_axes(distiller.student)
    for name, tensor in weights(output).items():
        expected = distiller.student.get_parameter(name).detach()
        for dimension, units in axes.get(name, {}).items():
            expected = expected.index_select(dimension, lineage[units])
        scale = (7 / 8) ** 0.5 if ".query." in name else 1.0
        torch.testing.assert_close(tensor, expected * scale, rtol=1e-5, atol=1e-6, msg=name)


def test_deterministic_asks_torch_for_it(run, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen, rate = [], distill.learning_rate
    monkeypatch.setattr(distill, "learning_rate", lambda *a: seen.append(torch.are_deterministic_algorithms_enabled())
                        or rate(*a))
    for flags, expected in ((["--deterministic"], True), (["--overwrite"], False)):
        seen.clear()
        assert run(*flags)[0] == 0 and seen == [expected] * 6
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def test_learning_rate_rises_then_falls_linearly():
    rates = [distill.learning_rate(t, 100, 2.0, 0.1) for t in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (t + 1) for t in range(10)])
    assert rates[10:] == pytest.approx([2.0 * (100 - t) / 90 for t in range(10, 100)])
    assert distill.learning_rate(0, 10, 1.0, 0.0) == 1.0 and distill.learning_rate(4, 10, 1.0, 1.0) == 0.5


def test_equal_start_and_end_cut_everything_at_once(run):
    code, output = run("--prune-start", 0.5, "--prune-end", 0.5)
    assert code == 0
    cuts = read_log(output, "cut")
    assert [cut["step"] for cut in cuts] == [3] and cuts[0]["after"]["hidden"] == 16


def test_granularity_and_start_shape_the_path(run):
    for granularity, widths in ((4, {32, 28, 24, 20, 16}), (16, {32, 16})):
        code, output = run("--granularity", granularity, "--prune-start", 0.2, "--prune-end", 1, "--steps", 20,
                           "--overwrite", "--log-every", 1)
        assert code == 0
        train = read_log(output, "train")
        assert {line["D"] for line in train} == widths
        assert [line["D"] for line in train[:3]] == [32] * 3


def test_headless_teacher(run, capsys):
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
    assert set(evals[0]) == {"event", "step", "hidden_mse"} and evals[0]["hidden_mse"] == 0 < evals[-1]["hidden_mse"]


@pytest.mark.parametrize("flags", [
    ("--warmup", 1), ("--dropout", 0.3), ("--clip", 1e-3), ("--temperature", 3), ("--sensitivity-decay", 0),
    ("--weight-decay", 10), ("--precision", "bf16"), ("--seq-length", 12), ("--alpha-mlm", 3),
    ("--learning-rate", 0.01), ("--batch-size", 9), ("--steps", 7), ("--seed", 1)])
def test_every_flag_of_the_training_changes_the_result(run, flags):
    code, output = run()
    before = weights(output)
    lineage = (output / "student" / "lineage.json").read_text()
    code_with, output = run(*flags, "--overwrite")
    assert code == code_with == 0
    after = weights(output)
    assert (output / "student" / "lineage.json").read_text() != lineage or any(
        not torch.equal(before[name], after[name]) for name in before)


def test_eval_rows_and_a_run_on_two_corpora(run, folder, tmp_path):
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": "abc deaf " * 40}) + "\n" for _ in range(60)))
    code, output = run("--corpus", folder / "text.txt", tmp_path / "more.jsonl", "--eval-rows", 1)
    first = read_log(output, "eval")[-1]
    assert code == 0
    code, output = run("--corpus", folder / "text.txt", tmp_path / "more.jsonl", "--eval-rows", 4, "--overwrite")
    assert code == 0 and read_log(output, "eval")[-1]["teacher_mlm_loss"] != first["teacher_mlm_loss"]


def test_training_keeps_the_student_close(tmp_path):
    """End to end with the bundled teacher: a KL well below that of the same widths cut without any training."""
    kl = []
    for rate in ("1e-3", "0"):
        output = tmp_path / rate
        assert distill.main(["--output", str(output), "--steps", "60", "--batch-size", "8", "--seq-length", "64",
                             "--target-width", "192", "--learning-rate", rate, "--weight-decay", "0", "--eval-rows",
                             "64", "--device", "cpu", "--cache-dir", str(tmp_path / "cache")]) == 0
        kl.append(read_log(output, "eval")[-1]["kl"])
    assert json.loads((tmp_path / "1e-3" / "student" / "config.json").read_text())["hidden_size"] == 192
    assert kl[0] < 0.6 * kl[1]


# -------------------------------------------------------------------------------------------------------- bad input


BAD_FLAGS = {
    ("--teacher", "no/such/folder/anywhere"): "no such folder",
    ("--teacher", "setup.cfg/../x y"): "not the name of a model",
    ("--target-width", "32"): "below the teacher's 32",
    ("--target-width", "0"): "from 1 to 31",
    ("--target-width", "-4"): "from 1 to 31",
    ("--target-width", "13"): "take width 12 or 14",
    ("--target-width", "wide"): "invalid int value",
    ("--target-heads", "3"): "do not divide",
    ("--target-heads", "5"): "from 1 to the teacher's 4",
    ("--target-intermediate", "65"): "teacher's 64",
    ("--target-intermediate", "0"): "from 1 to the teacher's 64",
    ("--corpus", "nowhere.txt"): "no such file or folder",
    ("--batch-size", "100000"): "fewer than one batch",
    ("--batch-size", "0"): "is not a whole number from 1",
    ("--steps", "1.5"): "is not a whole number from 1",
    ("--seq-length", "33"): "beyond the teacher's 32 positions",
    ("--seq-length", "2"): "from 8",
    ("--prune-start", "0.9"): "is after --prune-end",
    ("--prune-end", "1.1"): "from 0 to 1",
    ("--learning-rate", "nan"): "is not a number from 0",
    ("--learning-rate", "inf"): "is not a number from 0",
    ("--temperature", "0"): "from 0.001",
    ("--seed", "-1"): "from 0 to",
    ("--device", "tpu"): "give auto, cpu, cuda",
    ("--device", "cuda:99"): "CUDA devices",
    ("--precision", "fp8"): "invalid choice",
    ("--importance", "beauty"): "invalid choice",
    ("--snapshots", "24,wide"): "not a list of widths",
    ("--snapshots", "32"): "not between the target width 16 and the teacher's 32",
    ("--snapshots", "8"): "not between the target width 16",
    ("--snapshots", "23"): "no head count from 4 to 4 divides it",
    ("--prune-power", "0"): "from 0.1",
    ("--recipe", "worst"): "invalid choice",
    ("--preset", "homobert-huge"): "invalid choice",
    ("--no-such-flag",): "unrecognized arguments",
}


def assert_refused(code: int, output: Path, capsys, words: str):
    """Exit code 2, one line that says why, and no folder left."""
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("distill.py: error: ")
    assert words in error
    assert not output.exists()


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_flags(run, capsys, flags):
    assert_refused(*run(*flags), capsys, BAD_FLAGS[flags])


def test_all_weights_zero(run, capsys):
    code, output = run(*(x for name in ALPHAS for x in (f"--alpha-{name}", 0)))
    assert_refused(code, output, capsys, "nothing to learn from")


def test_token_ids_outside_the_vocabulary(run, folder, tmp_path, capsys):
    shutil.copytree(folder / "teacher", tmp_path / "bad")
    words = (tmp_path / "bad" / "vocab.txt").read_text() + "one\nmore\n"
    (tmp_path / "bad" / "vocab.txt").write_text(words)
    (tmp_path / "bad" / "tokenizer.json").unlink()
    code, output = run("--teacher", tmp_path / "bad")
    assert_refused(code, output, capsys, "outside the model's vocabulary")


def test_damaged_teacher(run, folder, tmp_path, capsys):
    shutil.copytree(folder / "teacher", tmp_path / "bad")
    content = (tmp_path / "bad" / "model.safetensors").read_bytes()
    (tmp_path / "bad" / "model.safetensors").write_bytes(content[: len(content) // 2])
    code, output = run("--teacher", tmp_path / "bad")
    assert_refused(code, output, capsys, "model.safetensors is damaged")


def test_corpus_without_text(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_refused(*run("--corpus", tmp_path / "empty.txt"), capsys, "empty")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    assert_refused(*run("--corpus", tmp_path / "binary.txt"), capsys, "binary")


def test_output_folder_is_not_overwritten_by_accident(run, tmp_path, capsys):
    code, output = run()
    assert code == 0
    before = (output / "log.jsonl").read_text()
    code, output = run()
    assert code == 2 and "--overwrite" in capsys.readouterr().err and (output / "log.jsonl").read_text() == before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("do not delete")
    code, _ = run("--output", precious, "--overwrite")
    assert code == 2 and "not a run" in capsys.readouterr().err and len(list(precious.iterdir())) == 1
    code, _ = run("--output", precious / "thesis.txt")
    assert code == 2 and "not a folder" in capsys.readouterr().err
    code, _ = run("--output", precious / "thesis.txt" / "run")
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_output_that_may_not_be_written(run, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    assert_refused(*run(), capsys, "is not writable")


def test_loss_that_is_not_finite_stops_the_run_and_leaves_older_work(run, capsys):
    code, output = run("--learning-rate", 1e9, "--clip", 0)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "not finite" in error and "step " in error and "mlm " in error
    assert (output / "log.jsonl").exists() and not (output / "student").exists()


def test_teacher_with_nan_weights(run, folder, tmp_path, capsys):
    teacher = model.load_model(folder / "teacher")
    teacher.bert.layers[0].output.dense.weight.data[0, 0] = float("nan")
    (tmp_path / "nan").mkdir()
    model.save_model(teacher, tmp_path / "nan")
    data.save_tokenizer(data.load_tokenizer(folder / "teacher", 100), tmp_path / "nan", 32)
    code, output = run("--teacher", tmp_path / "nan")
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "not finite" in error


# ---------------------------------------------------------------------------------------------------- command line


def test_defaults_are_the_paper_s_recipe():
    args = distill.parse_arguments(["--teacher", "bert-base-uncased", "--target-width", "384"])
    assert (args.steps, args.batch_size, args.seq_length, args.learning_rate) == (28000, 4096, 128, 3e-4)
    assert (args.warmup, args.prune_start, args.prune_end) == (0.1, 0.0, 0.7)
    assert args.corpus == [distill.HUB_CORPUS] and args.output == Path("runs/bert-base-uncased-384")


@pytest.mark.parametrize("preset, width, intermediate, rate, millions", [
    ("homobert-base", 576, 2304, 3e-4, 65), ("homobert-small", 256, 1024, 6e-4, 17.3),
    ("homobert-xsmall", 240, 960, 6e-4, 15.6), ("homobert-tiny", 224, 896, 6e-4, 14.1)])
def test_presets_are_the_paper_s_students(preset, width, intermediate, rate, millions):
    args = distill.parse_arguments(["--preset", preset])
    assert (args.teacher, args.target_width, args.target_intermediate) == ("bert-base-uncased", width, intermediate)
    assert args.learning_rate == rate
    base = BertConfig(30522, 768, 12, 12, 3072)
    widths = prune.target_widths(base, width, intermediate)
    with torch.device("meta"):
        student = Bert(BertConfig(30522, width, 12, widths.heads, intermediate))
    # The paper's count has no pooler, no MLM transform and no position embeddings (30522 D + 144 D^2).
    matrices = sum(p.numel() for n, p in student.named_parameters() if "layer" in n and p.dim() == 2)
    assert (matrices + 30522 * width) / 1e6 == pytest.approx(millions, abs=0.5)


def test_a_flag_wins_over_preset_and_demo():
    args = distill.parse_arguments(["--preset", "homobert-tiny", "--learning-rate", "0.1", "--target-width", "192"])
    assert args.learning_rate == 0.1 and args.target_width == 192
    args = distill.parse_arguments([])
    assert args.steps == distill.DEMO["steps"] and args.corpus == ["demo"] and args.output == Path("runs/demo")


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        distill.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert len(flags) >= 35 and len(set(flags)) == len(flags)
    for flag in flags:
        explanation = re.search(rf"^  {flag}\b(.*?)(?=^  -|^[A-Z]|\Z)", text, re.MULTILINE | re.DOTALL)[1]
        assert "." in explanation, flag  # a sentence


def test_the_readme_lists_every_flag_with_its_default_and_meaning():
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (.*?) \| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == [flag for flag, *_ in distill.FLAGS]
    for (flag, stated, text), (_, default, _, meaning) in zip(rows, distill.FLAGS, strict=True):
        assert text.startswith(meaning), flag
        if isinstance(default, (int, float, str)) and not isinstance(default, bool):
            assert stated.split(";")[0] == str(default), flag


def test_as_a_program_in_a_pipe_it_is_quiet_and_exits_with_2(folder, tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "distill.py"), "--teacher", str(folder / "teacher"), "--corpus",
               str(folder / "text.txt"), "--cache-dir", str(folder / "cache"), "--target-width", "16", "--steps", "3",
               "--batch-size", "8", "--seq-length", "16", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout
    assert "teacher" in done.stdout and "milliseconds a sequence" in done.stdout
    done = subprocess.run([*command, "--device", "cuda"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_ctrl_c_is_answered_in_one_line_and_leaves_no_student(folder, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, str(ROOT / "distill.py"), "--teacher", str(folder / "teacher"), "--corpus",
               str(folder / "text.txt"), "--cache-dir", str(folder / "cache"), "--target-width", "16", "--steps",
               "100000", "--batch-size", "8", "--seq-length", "16", "--log-every", "1", "--output", str(output)]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (output / "log.jsonl").is_file() or not read_log(output, "train"):
        assert time.time() < deadline and program.poll() is None
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    _, error = program.communicate(timeout=30)
    assert program.returncode == 130 and error.count("\n") == 1 and "interrupted" in error
    assert not (output / "student").exists() and read_log(output, "train")
