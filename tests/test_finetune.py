"""Fine-tuning (finetune.py) and its batches (support/batches.py), against transformers and plain torch."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from made_up_tasks import LABELS, ORIGINAL, random_text, write_glue, write_squad
from safetensors.torch import load_file

import finetune
from finetune import Job, TaskModel
from support.batches import Example, Row, make_batch, training_batches
from support.checkpoint import load_config, load_model, load_tokenizer, save_model, save_tokenizer
from support.glue import TASKS, encode, read_task, read_tsv
from support.metrics import squad_scores
from support.squad import make_windows, read_squad

CPU = torch.device("cpu")
CLOSE = dict(rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these are slower with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rte(tmp_path_factory) -> Path:
    return write_glue("rte", tmp_path_factory.mktemp("data") / "RTE")


@pytest.fixture
def start(checkpoint, rte, tmp_path):
    """Runs finetune.main with a small model and task, into tmp_path/out, unless the flags name something else."""

    def run(*flags, task="rte", source=rte, models=(checkpoint,)) -> int:
        argv = ["--model", *map(str, models), "--task", *task.split(), "--data", str(source), "--device", "cpu",
                "--precision", "fp32", "--output", str(tmp_path / "out")]
        return finetune.main(argv + list(map(str, flags)))

    return run


@pytest.fixture
def recorded(monkeypatch) -> list[Job]:
    """The job of every training run."""
    seen = []
    fine_tune = finetune.fine_tune

    def record(folder, examples, job, device):
        seen.append(job)
        return fine_tune(folder, examples, job, device)

    monkeypatch.setattr(finetune, "fine_tune", record)
    return seen


def stored(tmp_path) -> list[dict]:
    """All results by seed and task, each with its folder."""
    results = [json.loads(path.read_text()) | {"folder": path.parent}
               for path in (tmp_path / "out").glob("*/[!.]*/result.json")]
    return sorted(results, key=lambda result: (result["seed"], result["task"]))


def make_job(**changes) -> Job:
    defaults = {"model": "m", "task": "rte", "seed": 0, "data": "d", "weights": "w", "bf16": False,
                "learning_rate": 1e-3, "batch_size": 8, "epochs": 1, "max_steps": None, "max_length": 32,
                "warmup": 0.1, "weight_decay": 0.01, "dropout": None}
    return Job(**defaults | changes)


def rte_rows(rte, tokenizer, max_length=32) -> dict[str, list[Row]]:
    return {split: encode(examples, tokenizer, max_length) for split, examples in read_task("rte", rte).items()}


def examples_of(texts: list[tuple[str, ...]], labels=None) -> list[Example]:
    return [Example(text, label, "") for text, label in zip(texts, labels or [0] * len(texts), strict=True)]


def train(checkpoint, rte, tokenizer, **changes) -> tuple[TaskModel, dict]:
    job = make_job(**changes)
    return finetune.fine_tune(checkpoint, rte_rows(rte, tokenizer, job.max_length), job, CPU)


def all_parameters(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# ---- Rows and batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("folder", ["checkpoint", "xlmr_checkpoint"])
def test_rows_equal_those_of_transformers(pair, folder, request):
    generator, checkpoint = random.Random(1), request.getfixturevalue(folder)
    tokenizer, config = load_tokenizer(checkpoint, 1000), load_config(checkpoint)
    texts = [tuple(random_text(generator, 1, 30 if pair else 60) for _ in range(1 + pair)) for _ in range(100)]
    reference_tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rows = encode(examples_of(texts), tokenizer, 32)
    assert max(len(row.ids) for row in rows) == 32
    for values, row in zip(texts, rows, strict=True):
        reference = reference_tokenizer(*values, truncation=True, max_length=32)
        assert row.ids.tolist() == reference["input_ids"]
        # transformers gives XLM-R's texts no types, which the model takes for zeros
        types = reference.get("token_type_ids", [0] * len(row.ids))
        assert make_batch([row], config, CPU)[1][0].tolist() == types
    assert tokenizer.truncation is None


def rows_of(*lengths: int) -> list[Row]:
    return [Row(np.arange(length, dtype=np.int32), length, 0, Example((), 0, str(i)))
            for i, length in enumerate(lengths)]


def test_batches_hold_every_row_once_with_little_padding():
    lengths = np.random.default_rng(0).geometric(0.05, 3001) + 2
    batches = training_batches(rows_of(*lengths), 16, seed=1, epoch=2)
    assert sorted(int(row.example.name) for batch in batches for row in batch) == list(range(3001))
    assert max(map(len, batches)) == 16
    padded = sum(max(len(row.ids) for row in batch) * len(batch) for batch in batches)
    assert padded / lengths.sum() < 1.1
    assert sum(lengths[i : i + 16].max() * 16 for i in range(0, 3001, 16)) / lengths.sum() > 2  # in the file's order
    means = [np.mean([len(row.ids) for row in batch]) for batch in batches]
    assert abs(scipy.stats.spearmanr(means, range(len(means)))[0]) < 0.3  # short rows do not come first


def test_the_order_of_rows_depends_on_seed_and_epoch_only(checkpoint, rte, tokenizer, monkeypatch):
    rows = rows_of(*np.random.default_rng(0).geometric(0.05, 301) + 2)

    def batches(seed, epoch):
        return [{row.example.name for row in batch} for batch in training_batches(rows, 16, seed, epoch)]

    assert batches(1, 2) == batches(1, 2)
    for other in batches(1, 3), batches(2, 2):  # other batches, not only another order of the same
        assert sum(batch in batches(1, 2) for batch in other) <= 2
    seen = []
    monkeypatch.setattr(finetune, "training_batches", lambda *given: seen.append(given[1:]) or training_batches(*given))
    train(checkpoint, rte, tokenizer, seed=3, epochs=2)
    assert seen == [(8, 3, 1), (8, 3, 2)]


def test_batches_are_padded_with_masks_and_types(checkpoint):
    config = load_config(checkpoint)
    rows = [Row(np.array(ids, np.int32), 3, label, Example((), label, ""))
            for ids, label in (([2, 7, 3], 1), ([2, 7, 3, 9, 3], 0))]
    ids, types, mask, labels = make_batch(rows, config, CPU)
    assert ids.tolist() == [[2, 7, 3, 0, 0], [2, 7, 3, 9, 3]] and types.tolist() == [[0] * 5, [0, 0, 0, 1, 1]]
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5] and labels.tolist() == [1, 0]
    one_type = dataclasses.replace(config, type_vocab_size=1)
    assert make_batch(rows, one_type, CPU)[1].tolist() == [[0] * 5] * 2


# ---- The task heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["mnli", "stsb", "squad"])
def test_logits_and_loss_of_a_saved_model_equal_transformers(key, checkpoint, tokenizer, tmp_path):
    generator = random.Random(0)
    kind = TASKS[key].kind
    torch.manual_seed(3)
    net = TaskModel(load_model(checkpoint), key).eval()
    finetune.save_task_model(net, key, tokenizer, tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    if kind == "span":
        auto = transformers.AutoModelForQuestionAnswering
    reference_net, loading = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    if key == "mnli":
        assert reference_net.config.id2label == dict(enumerate(LABELS["mnli"]))
        assert reference_net.config.label2id == {name: i for i, name in enumerate(LABELS["mnli"])}
    assert (kind == "regression") == (getattr(reference_net.config, "problem_type", None) == "regression")

    texts = [(random_text(generator), random_text(generator, 3, 20)) for _ in range(6)]
    labels = {"span": [0] * 6, "regression": [0.5, 1, 2, 3, 4.75, 5]}.get(kind, [0, 1, 2, 2, 1, 0])
    rows = encode(examples_of(texts, labels), tokenizer, 48)
    if kind == "span":
        rows = [dataclasses.replace(row, label=(i, i + 2)) for i, row in enumerate(rows)]
    ids, types, mask, labels = make_batch(rows, net.config, CPU)
    batch = dict(input_ids=ids, token_type_ids=types, attention_mask=mask.long())
    if kind == "span":
        reference = reference_net(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1])
        reference_logits = torch.stack([reference.start_logits, reference.end_logits], -1)
    else:
        reference = reference_net(**batch, labels=labels)
        reference_logits = reference.logits
    logits = net(ids, types, mask)
    torch.testing.assert_close(logits, reference_logits, **CLOSE)
    torch.testing.assert_close(finetune.task_loss(kind, logits, labels), reference.loss, **CLOSE)


def test_dropout_of_the_head_is_active_only_in_training(checkpoint):
    net = TaskModel(load_model(checkpoint), "rte")
    ids = torch.tensor([[2, 7, 8, 3]])
    for dropout, same in ((0.0, True), (0.5, False)):
        net.set_dropout(0)
        net.bert.embeddings.dropout = dropout
        for layer in (net.bert.embeddings, net.bert.encoder):
            layer.eval()
        net.training = True  # of all dropout, only that of the head is active
        assert torch.equal(net(ids), net(ids)) is same
        net.eval()
        assert torch.equal(net(ids), net(ids))


def test_a_missing_pooler_is_initialised_with_a_message(start, checkpoint, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    bert = load_model(checkpoint)
    bert.bert.pooler = None
    save_model(bert, bare)
    save_tokenizer(load_tokenizer(checkpoint, bert.config.vocab_size), bare, 64)
    assert start("--max-steps", 1, models=(bare, checkpoint)) == 0
    out = capsys.readouterr().out
    assert f"{bare} has no pooler" in out and f"{checkpoint} has no pooler" not in out
    saved = load_file(stored(tmp_path)[0]["folder"] / "model.safetensors")
    assert 0.1 < saved["bert.pooler.dense.weight"].std() < 0.3  # initializer_range is 0.2


# ---- Training and evaluation ---------------------------------------------------------------------------------


def test_a_toy_task_is_learned_and_transformers_predicts_the_same(start, tmp_path, capsys):
    source = write_glue("sst2", tmp_path / "SST-2", train=160, dev=40)
    assert start("--epochs", 8, "--learning-rate", 2e-3, task="sst2", source=source) == 0
    (entry,) = stored(tmp_path)
    assert entry["metrics"]["accuracy"] >= 95 and entry["task"] == "sst2"
    assert "The dev split that is reported also chooses the best epoch." in capsys.readouterr().out
    folder = entry["folder"]
    net = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def predict(examples):
        with torch.no_grad():
            batch = tokenizer([example.texts[0] for example in examples], padding=True, return_tensors="pt")
            return net(**batch).logits.argmax(1).numpy()

    dev = read_tsv(source / "dev.tsv", "sst2", labelled=True)
    correct = predict(dev) == [example.label for example in dev]
    assert 100 * correct.mean() == pytest.approx(entry["metrics"]["accuracy"])
    test = read_tsv(source / "test.tsv", "sst2", labelled=False)
    lines = (folder / "SST-2.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(predict(test)))]


@pytest.mark.parametrize("key, version", [("squad", "v1.1"), ("squad_v2", "v2.0")])
def test_toy_questions_are_learned_and_answered(key, version, start, tmp_path):
    source = write_squad(tmp_path / "squad", version, paragraphs=40)
    assert start("--epochs", 12, "--batch-size", 8, "--learning-rate", 3e-3, task=key, source=source) == 0
    (entry,) = stored(tmp_path)
    assert entry["metrics"]["exact_match"] >= 80 and entry["metrics"]["f1"] >= entry["metrics"]["exact_match"]
    answers = json.loads((entry["folder"] / "predictions.json").read_text())
    dev = read_squad(source / f"dev-{version}.json", key)
    scores = [squad_scores(answers[question.name], [t for t, _ in question.label]) for question in dev]
    assert 100 * np.mean(scores, axis=0) == pytest.approx(list(entry["metrics"].values()))
    assert ("" in answers.values()) is (key == "squad_v2")
    config = json.loads((entry["folder"] / "config.json").read_text())
    assert config["architectures"] == ["BertForQuestionAnswering"]


@pytest.mark.parametrize("key", ORIGINAL)
def test_every_task_runs_from_files_to_predictions(key, start, tmp_path):
    source = write_glue(key, tmp_path / TASKS[key].title)
    assert start("--max-steps", 2, task=key, source=source) == 0
    (entry,) = stored(tmp_path)
    names = [name + suffix for suffix in TASKS[key].suffixes for name in TASKS[key].metrics]
    assert list(entry["metrics"]) == names and all(-100 <= value <= 100 for value in entry["metrics"].values())
    folder = entry["folder"]
    files = ["MNLI-m.tsv", "MNLI-mm.tsv"] if key == "mnli" else [f"{TASKS[key].title}.tsv"]
    for file in files:
        header, *lines = (folder / file).read_text().splitlines()
        assert header == "index\tprediction" and [line.split("\t")[0] for line in lines] == list("01234")
        for line in lines:
            value = line.split("\t")[1]
            assert 0 <= float(value) <= 5 if key == "stsb" else value in ORIGINAL[key][2]
    config = transformers.AutoConfig.from_pretrained(folder)
    if key != "stsb":
        assert [config.id2label[i] for i in range(len(LABELS[key]))] == LABELS[key]


def test_both_splits_of_mnli_are_reported_and_predicted(tmp_path, monkeypatch):
    splits = {"matched": 0, "mismatched": 2}
    rows = {f"{kind}_{split}": [Row(np.zeros(3, np.int32), 3, label, Example((), label, split))]
            for kind in ("dev", "test") for split, label in splits.items()}
    monkeypatch.setattr(finetune, "predict", lambda net, rows, job, device: [0])
    job = make_job(task="mnli")
    assert finetune.evaluate(None, rows, job, CPU) == {"accuracy_matched": 100, "accuracy_mismatched": 0}
    finetune.write_predictions(tmp_path, None, rows, job, CPU)
    lines = {path.name: path.read_text().splitlines()[1:] for path in tmp_path.iterdir()}
    assert lines == {"MNLI-m.tsv": ["matched\tentailment"], "MNLI-mm.tsv": ["mismatched\tentailment"]}


def test_updates_equal_those_of_plain_torch(checkpoint, rte, tokenizer):
    """Three steps: gradients clipped to 1, weight decay of matrices only, linear decay of the learning rate."""
    rows = rte_rows(rte, tokenizer)["train"]
    torch.manual_seed(5)
    net = TaskModel(load_model(checkpoint), "rte").eval()
    optimizer = torch.optim.AdamW([
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0}], eps=1e-6, foreach=False)
    norms = []
    for step, batch in enumerate(training_batches(rows, 8, 5, 1)):
        ids, types, mask, labels = make_batch(batch, net.config, CPU)
        torch.nn.functional.cross_entropy(net(ids, types, mask), labels).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (3 - step) / 3
        optimizer.step()
        optimizer.zero_grad()
    assert len(norms) == 3 and max(norms) > 1.2 * min(norms) > 1.2  # all are clipped, and differ
    changes = dict(seed=5, learning_rate=0.01, warmup=0.0, weight_decay=0.5, dropout=0.0)
    trained, _ = train(checkpoint, rte, tokenizer, **changes)
    torch.testing.assert_close(all_parameters(trained), all_parameters(net), rtol=0, atol=1e-4)


def test_training_is_repeatable_and_every_setting_matters(checkpoint, rte, tokenizer):
    base = all_parameters(train(checkpoint, rte, tokenizer)[0])
    assert torch.equal(base, all_parameters(train(checkpoint, rte, tokenizer)[0]))
    for change in (dict(learning_rate=2e-3), dict(batch_size=4), dict(max_steps=2), dict(max_length=16),
                   dict(epochs=2), dict(warmup=0.9), dict(weight_decay=0.5), dict(dropout=0.0), dict(bf16=True),
                   dict(seed=1)):
        assert not torch.equal(base, all_parameters(train(checkpoint, rte, tokenizer, **change)[0])), change


def test_dropout_is_that_of_the_checkpoint_by_default(checkpoint, rte, tokenizer):
    for given, expected in ((None, 0.1), (0.3, 0.3)):
        net, _ = train(checkpoint, rte, tokenizer, max_steps=1, dropout=given)
        assert {net.bert.embeddings.dropout, net.bert.layers[1].dropout} == {expected}
        assert net.config.hidden_dropout_prob == 0.1  # the saved config keeps its own


def test_max_steps_ends_training_early(checkpoint, rte, tokenizer, monkeypatch):
    trained, evaluated = [], []
    clip, evaluate = torch.nn.utils.clip_grad_norm_, finetune.evaluate
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: trained.append(1) or clip(*given))
    monkeypatch.setattr(finetune, "evaluate", lambda *given: evaluated.append(1) or evaluate(*given))
    for most, epochs in ((2, 1), (3, 1), (4, 2), (99, 3)):  # an epoch has three steps
        trained.clear()
        evaluated.clear()
        train(checkpoint, rte, tokenizer, epochs=3, max_steps=most)
        assert (len(trained), len(evaluated)) == (min(most, 9), epochs)


def test_the_weights_of_the_best_epoch_are_kept(checkpoint, rte, tokenizer, monkeypatch):
    scores, heads = iter([10.0, 30.0, 20.0]), []

    def evaluate(net, *_):
        heads.append(net.classifier.weight.detach().clone())
        return {"accuracy": next(scores)}

    monkeypatch.setattr(finetune, "evaluate", evaluate)
    net, best = train(checkpoint, rte, tokenizer, epochs=3)
    assert len(heads) == 3 and best == {"epoch": 2, "metrics": {"accuracy": 30.0}}
    assert torch.equal(net.classifier.weight, heads[1]) and not torch.equal(heads[1], heads[2])


def test_test_splits_do_not_influence_training(checkpoint, rte, tokenizer, monkeypatch):
    rows = rte_rows(rte, tokenizer)
    seen = []
    predict = finetune.predict
    monkeypatch.setattr(finetune, "predict", lambda net, given, *rest: seen.append(given) or predict(net, given, *rest))
    finetune.fine_tune(checkpoint, rows, make_job(epochs=2), CPU)
    assert len(seen) == 2 and all(given is rows["dev"] for given in seen)


def test_predictions_do_not_depend_on_the_batch_size(checkpoint, tokenizer):
    generator = random.Random(2)
    texts = [(random_text(generator, 1, 20), random_text(generator, 1, 5)) for _ in range(13)]
    questions = [Example((b, a), [], str(i)) for i, (a, b) in enumerate(texts)]
    for key, rows in (("stsb", encode(examples_of(texts), tokenizer, 32)),
                      ("squad", make_windows(questions, tokenizer, 16, training=False))):
        net = TaskModel(load_model(checkpoint), key)
        many = finetune.predict(net, rows, make_job(task=key, batch_size=5), CPU)
        if key == "stsb":
            one = np.concatenate([finetune.predict(net, [row], make_job(task=key), CPU) for row in rows])
            np.testing.assert_allclose(many, one, rtol=0, atol=1e-5)
        else:
            one = [finetune.predict(net, [row for row in rows if row.example is question], make_job(task=key), CPU)
                   for question in questions]
            assert many == {name: text for answers in one for name, text in answers.items()}
            assert len(rows) > len(many) == 13


def test_outputs_that_are_not_finite_are_an_error(start, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "task_loss", lambda kind, logits, labels: logits.sum() * float("nan"))
    assert_one_line_error(start("--max-steps", 1), capsys, ["not finite", "--learning-rate"])


def test_an_output_folder_that_cannot_be_written_is_noticed_before_training(start, tmp_path, monkeypatch, capsys):
    mkdir = Path.mkdir

    def read_only(path, *rest, **options):
        if path.parent == tmp_path / "out":
            raise OSError("read-only")
        mkdir(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(finetune, "fine_tune", lambda *_: pytest.fail("trained in vain"))
    assert_one_line_error(start(), capsys, ["read-only"])


@pytest.mark.parametrize("native, chosen", [(False, "fp32"), (True, "bf16")])
def test_auto_takes_bf16_on_a_cpu_that_multiplies_it_faster(start, recorded, monkeypatch, capsys, native, chosen):
    monkeypatch.setattr("support.distributed.platform.machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    assert start("--precision", "auto") == 0
    assert recorded[0].bf16 is native and f"{chosen} on cpu" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_in_bf16_by_default(checkpoint, rte, tmp_path):
    argv = ["--model", str(checkpoint), "--task", "rte", "--data", str(rte), "--output", str(tmp_path / "out")]
    assert finetune.main([*argv, "--epochs", "1"]) == 0
    assert stored(tmp_path)[0]["bf16"] is True


@pytest.mark.parametrize("bf16", [False, True])
def test_training_and_prediction_have_the_precision_of_the_job(checkpoint, rte, tokenizer, monkeypatch, bf16):
    seen, autocast = [], finetune.distributed.autocast

    def recorded(device, bf16):
        seen.append((torch.is_grad_enabled(), bf16))
        return autocast(device, bf16)

    monkeypatch.setattr(finetune.distributed, "autocast", recorded)
    train(checkpoint, rte, tokenizer, bf16=bf16, max_steps=1)
    assert set(seen) == {(True, bf16), (False, bf16)}


# ---- Flags ---------------------------------------------------------------------------------------------------


def test_every_training_flag_reaches_the_loop(start, recorded):
    flags = dict(epochs=2, max_steps=3, learning_rate=0.25, batch_size=5, max_length=24, warmup=0.3, weight_decay=0.2,
                 dropout=0.4)
    argv = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert start("--precision", "bf16", *argv) == 0
    assert {name: getattr(recorded[0], name) for name in flags} == flags and recorded[0].bf16 is True


def test_task_defaults_apply_to_flags_that_are_not_given(start, recorded):
    assert start("--max-steps", 1) == 0
    settings = recorded[0]
    assert (settings.epochs, settings.batch_size, settings.max_length) == (10, 16, 64)
    assert settings.learning_rate == pytest.approx(5e-5 * 768 / 32)
    assert set(finetune.TASK_DEFAULTS) <= set(TASKS)


def test_all_runs_the_tasks_with_data_and_names_the_others(start, tmp_path, capsys):
    root = tmp_path / "data"
    write_glue("cola", root / "CoLA")
    write_glue("stsb", root / "STS-B", test=False)
    write_squad(root / "SQuAD")
    assert start("--max-steps", 1, "--seeds", 0, 1, task="all", source=root) == 0
    assert [(entry["seed"], entry["task"]) for entry in stored(tmp_path)] == [
        (seed, key) for seed in (0, 1) for key in ("cola", "squad", "stsb")]
    out = capsys.readouterr().out
    for key in ("sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli", "squad_v2"):
        assert f"Skipping {key}: " in out
    header = next(line for line in out.splitlines() if line.startswith("| model"))
    columns = [name.strip() for name in header.split("|")[2:-1]]
    assert columns == ["CoLA matthews", "STS-B pearson", "STS-B spearman", "SQuAD-v1.1 exact_match", "SQuAD-v1.1 f1",
                       "GLUE average of 2"]


# ---- Errors --------------------------------------------------------------------------------------------------


def assert_one_line_error(code: int, capsys, words: list[str]):
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("finetune.py: error: ") and message.count("\n") == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize("flags, words", [
    (["--task", "imdb"], ["imdb", "choose from"]),
    (["--seeds", "-1"], ["-1"]),
    (["--epochs", "0"], ["0"]),
    (["--learning-rate", "nan"], ["nan"]),
    (["--batch-size", "many"], ["many"]),
    (["--max-length", "5"], ["16"]),
    (["--dropout", "1"], ["1"]),
    (["--precision", "fp8"], ["fp8"]),
    (["--device", "tpu"], ["tpu"]),
    (["--model", "/no/such/model"], ["/no/such/model"]),
    (["--data", "/no/such/data"], ["/no/such/data holds no"]),
    (["--colour", "red"], ["--colour"]),
])
def test_bad_flags_give_a_one_line_error(flags, words, start, capsys, tmp_path):
    assert_one_line_error(start(*flags), capsys, words)
    assert not (tmp_path / "out").exists()


def test_bad_folders_give_a_one_line_error(start, checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert_one_line_error(start("--output", tmp_path / "file"), capsys, ["NotADirectoryError", "file"])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert_one_line_error(start("--output", tmp_path / "new", models=(checkpoint, broken)), capsys,
                          ["broken", "config.json"])
    assert not (tmp_path / "new").exists()


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        finetune.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--model", "--task", "--data", "--output", "--seeds", "--epochs", "--max-steps", "--learning-rate",
                 "--batch-size", "--max-length", "--device", "--precision", "--overwrite"):
        assert out.count(f"{flag} ") + out.count(f"{flag}]") >= 2, flag  # in the usage, and explained


# ---- The output folder ---------------------------------------------------------------------------------------


def test_finished_results_are_kept_and_not_computed_again(start, recorded, tmp_path, capsys):
    assert start("--max-steps", 1, "--seeds", 0, 1) == 0
    before = stored(tmp_path)
    assert start("--max-steps", 1, "--seeds", 0, 1, 2) == 0
    assert [one.seed for one in recorded] == [0, 1, 2] and stored(tmp_path)[:2] == before
    assert "2 of 3 results are already in" in capsys.readouterr().out
    assert_one_line_error(start("--max-steps", 2), capsys, ["max_steps 1, now 2", "--overwrite"])
    assert stored(tmp_path)[:2] == before
    assert start("--max-steps", 2, "--overwrite") == 0
    assert {entry["seed"]: entry["max_steps"] for entry in stored(tmp_path)} == {0: 2, 1: 1, 2: 1}
    recorded.clear()
    shutil.rmtree(before[1]["folder"])
    assert start("--max-steps", 1, "--seeds", 1, 2) == 0  # a result whose folder was removed is computed again
    assert [one.seed for one in recorded] == [1] and len(stored(tmp_path)) == 3


def test_a_damaged_result_is_an_error_and_can_be_overwritten(start, tmp_path, capsys):
    assert start("--max-steps", 1) == 0
    path = stored(tmp_path)[0]["folder"] / "result.json"
    for content, words in (("{", ["cannot be read"]), ("[1]", ["JSON object"]), ('{"a": 1}', ["--overwrite"])):
        path.write_text(content)
        assert_one_line_error(start("--max-steps", 1), capsys, ["result.json", *words])
    assert start("--max-steps", 1, "--overwrite") == 0
    assert stored(tmp_path)[0]["task"] == "rte"


def test_an_interrupted_overwrite_continues_without_the_flag(start, recorded, tmp_path, monkeypatch):
    assert start("--max-steps", 1, "--seeds", 0, 1) == 0
    save_task_model = finetune.save_task_model

    def interrupted(*given):
        monkeypatch.setattr(finetune, "save_task_model", interrupt)
        return save_task_model(*given)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_task_model", interrupted)
    assert start("--max-steps", 2, "--seeds", 0, 1, "--overwrite") == 130
    monkeypatch.setattr(finetune, "save_task_model", save_task_model)
    recorded.clear()
    assert start("--max-steps", 2, "--seeds", 0, 1) == 0
    assert [job.seed for job in recorded] == [1] and [entry["max_steps"] for entry in stored(tmp_path)] == [2, 2]


def test_a_result_of_other_data_in_the_same_folder_is_refused(start, tmp_path, capsys):
    source = write_glue("rte", tmp_path / "RTE")
    assert start("--max-steps", 1, source=source) == 0
    with open(source / "dev.tsv", "ab") as stream:
        stream.write(b"\n")
    assert_one_line_error(start("--max-steps", 1, source=source), capsys, ["made with data", "--overwrite"])


def test_a_result_is_kept_if_its_data_moves_or_its_model_gets_a_slash(start, checkpoint, recorded, tmp_path):
    assert start("--max-steps", 1) == 0
    assert start("--max-steps", 1, source=write_glue("rte", tmp_path / "moved"), models=(f"{checkpoint}/",)) == 0
    assert len(recorded) == len(stored(tmp_path)) == 1


def test_a_name_that_is_not_utf8_is_refused_before_any_work(start, recorded, tmp_path, capsys):
    assert_one_line_error(start("--output", tmp_path / "\udcff"), capsys, ["not UTF-8"])
    assert not recorded


def test_bad_data_costs_no_finished_result(start, tmp_path, capsys):
    source = write_glue("rte", tmp_path / "RTE")
    assert start("--max-steps", 1, source=source) == 0
    before = stored(tmp_path)
    (source / "dev.tsv").unlink()
    assert_one_line_error(start("--max-steps", 1, "--overwrite", source=source), capsys, ["holds no dev.tsv"])
    assert stored(tmp_path) == before and before[0]["folder"].is_dir()


def test_results_of_other_weights_with_the_same_name_are_an_error(start, checkpoint, tmp_path, capsys):
    folder = tmp_path / "student"
    folder.mkdir()
    tokenizer = load_tokenizer(checkpoint, 10**6)
    for scale in (1.0, 1.5):
        bert = load_model(checkpoint)
        bert.bert.layers[0].output.dense.weight.data.mul_(scale)
        save_model(bert, folder)
        save_tokenizer(tokenizer, folder, 64)
        assert start("--max-steps", 1, models=(folder,)) == (0 if scale == 1 else 2)
    assert "made with weights" in capsys.readouterr().err


def test_models_with_similar_names_get_separate_folders(tmp_path):
    def folder(model):
        return make_job(model=model, seed=3).folder(tmp_path)

    assert folder("bert-base-uncased") == tmp_path / "bert-base-uncased" / "rte-seed3"
    models = ["../a/student", "a/student", "a-student", ".", "..", "/", *(f"{letter}/" + "ü" * 300 for letter in "ab")]
    assert folder("../a/student").parent.name.startswith("a-student-")
    for model in models:
        folder(model).mkdir(parents=True)  # fails for a name of more than 255 bytes
    assert len(list(tmp_path.glob("*/rte-seed3"))) == len(models)


def test_the_table_has_means_standard_deviations_and_the_glue_average():
    def entry(model, task, seed, **metrics):
        return {"model": model, "task": task, "seed": seed, "metrics": metrics}

    entries = [entry("m", "mrpc", 0, f1=80.0, accuracy=70.0), entry("m", "mrpc", 1, f1=82.0, accuracy=74.0),
               entry("m", "rte", 0, accuracy=60.0), entry("m", "rte", 1, accuracy=62.0),
               entry("m", "wnli", 0, accuracy=0.0), entry("m", "wnli", 1, accuracy=0.0)]
    header, _, *lines = finetune.results_table(entries + [e | {"model": "other"} for e in entries]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in [header, *lines]]
    assert cells[0] == ["model", "MRPC f1", "MRPC accuracy", "RTE accuracy", "WNLI accuracy", "GLUE average of 2"]
    assert cells[1] == ["m", "81.0 ± 1.4", "72.0 ± 2.8", "61.0 ± 1.4", "0.0 ± 0.0", "68.8 ± 1.8"]
    assert cells[2] == ["other", *cells[1][1:]]
    single = finetune.results_table([entry("m", "squad", 0, exact_match=80.0, f1=90.0)]).splitlines()
    assert [cell.strip() for cell in single[-1].split("|")[1:-1]] == ["m", "80.0", "90.0"]
