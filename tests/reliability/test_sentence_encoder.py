"""Students of sentence encoders, opened by and compared with sentence-transformers itself."""

import functools
import json
import re
import shutil

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import data
import distill
from data import MaskedRows
from support import session
from support.checkpoint import load_model, load_tokenizer
from support.evaluation import sentence_agreement
from support.sentence_encoder import SentenceEncoder, sentences_of

TEXTS = ["The river is long.", "a small bridge of stone and the old city", "fire", "the queen of the sea " * 9]
PROMPTS = {"query": "the night: ", "document": ""}
MAX_LENGTH = 20  # tokens; the last text is longer
VARIANTS = [("mean", False, True), ("cls", False, True), ("mean", False, False), ("cls", True, False),
            ("mean", True, True)]  # pooling, whether there is a Dense, whether there is a Normalize


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory):
    """A function that builds a SentenceTransformer on the small BERT, once for the same arguments."""

    @functools.cache
    def build(pooling, dense, normalize):
        torch.manual_seed(1)
        modules = [Transformer(str(checkpoint), max_seq_length=MAX_LENGTH), Pooling(32, pooling_mode=pooling)]
        modules += [Dense(32, 24, activation_function=torch.nn.Tanh())] * dense + [Normalize()] * normalize
        folder = tmp_path_factory.mktemp("teacher")
        SentenceTransformer(modules=modules, prompts=PROMPTS, default_prompt_name="query",
                            similarity_fn_name="dot").save(str(folder))
        return folder

    return build


@pytest.fixture
def teacher(built, tmp_path):
    """A function that returns a copy of such a folder, which the test may change."""
    return lambda pooling="mean", dense=False, normalize=True: shutil.copytree(
        built(pooling, dense, normalize), tmp_path / "teacher")


@pytest.fixture
def distilled(teacher, corpus, tmp_path):
    """A function that distils a sentence encoder to half its width and returns the exit code and the student's
    folder."""

    def run(folder, *flags):
        output = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        code = distill.main([
            "--teacher", str(folder), "--corpus", str(corpus), "--cache-dir", str(tmp_path / "cache"), "--output",
            str(output), "--target-width", "16", "--steps", "4", "--batch-size", "4", "--seq-length", "32", "--device",
            "cpu", "--precision", "fp32", "--eval-rows", "4", "--learning-rate", "1e-3", *map(str, flags)])
        return code, output / "student"

    return run


def encode(folder, texts=TEXTS, **options):
    return SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True, **options)


def token_ids(folder, texts=TEXTS):
    tokenizer = load_tokenizer(folder, 10**6)
    tokenizer.enable_truncation(MAX_LENGTH)
    return [np.array(tokenizer.encode(text).ids) for text in texts]


def read(folder) -> SentenceEncoder:
    return SentenceEncoder.read(folder, load_model(folder).config)


@pytest.mark.parametrize("pooling, dense, normalize", VARIANTS)
def test_a_student_opens_as_its_teacher_does_and_our_vectors_are_those_of_the_library(
        teacher, distilled, pooling, dense, normalize):
    folder = teacher(pooling, dense, normalize)
    code, student = distilled(folder)
    assert code == 0
    opened = SentenceTransformer(str(student), device="cpu")
    kinds = ["Transformer", "Pooling"] + ["Dense"] * dense + ["Normalize"] * normalize
    assert [type(module).__name__ for module in opened] == kinds
    assert opened.max_seq_length == MAX_LENGTH and opened.similarity_fn_name == "dot"
    assert opened.prompts == PROMPTS and opened.default_prompt_name == "query"
    assert opened[1].pooling_mode == pooling and opened[1].embedding_dimension == 16
    for name in (folder, student):
        vectors = read(name).vectors(load_model(name), token_ids(name))
        assert vectors.shape == (4, 24 if dense else 16 if name == student else 32)
        torch.testing.assert_close(vectors, encode(name, prompt=""), rtol=0, atol=1e-5)
    assert not torch.allclose(encode(student), encode(student, prompt=""), atol=1e-3)  # the default prompt is used
    assert encode(student, prompt="").norm(dim=1).allclose(torch.ones(4)) == normalize


def test_exported_files_compute_the_library_s_vectors_in_onnxruntime(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    export_onnx = pytest.importorskip("export_onnx")
    folder, path, small = teacher(dense=True), tmp_path / "student.onnx", tmp_path / "student.int8.onnx"
    words = [str(folder), str(path)]
    assert export_onnx.main([*words, "--int8"]) == 0
    assert capsys.readouterr().out.count(" MB, ") == 2 and small.stat().st_size < path.stat().st_size
    rows = list(map(torch.from_numpy, token_ids(folder)))
    ids, mask = (torch.nn.utils.rnn.pad_sequence(r, batch_first=True) for r in (rows, list(map(torch.ones_like, rows))))
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": np.zeros_like(ids)}
    vectors, quantized = (
        torch.from_numpy(export_onnx.onnxruntime.InferenceSession(file).run(["sentence_embedding"], feeds)[0])
        for file in (path, small))
    expected = encode(folder, prompt="")
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
    assert 0.99 < F.cosine_similarity(quantized, expected).min() < 1 - 1e-6

    for name in ("export", "quantize"):
        monkeypatch.setattr(export_onnx, name, lambda *_: None)  # what is checked now are the files of another student
    edit_dense(**{"linear.bias": torch.full((24,), 2.0)})(folder)
    assert export_onnx.main(words) == 1
    monkeypatch.setattr(export_onnx, "LARGEST_DIFFERENCE", 9)
    assert export_onnx.main(words) == 0 and export_onnx.main([*words, "--int8"]) == 1


def test_settings_in_the_files_of_earlier_versions_of_the_library_are_kept(teacher, distilled):
    """Flags instead of a pooling mode, and the maximum length in sentence_bert_config.json."""
    folder = teacher("cls")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    code, student = distilled(folder)
    opened = SentenceTransformer(str(student), device="cpu")
    assert code == 0 and opened[1].pooling_mode == "cls" and opened.max_seq_length == 12
    assert json.loads((student / "tokenizer_config.json").read_text())["model_max_length"] == 12
    assert json.loads((student / "1_Pooling" / "config.json").read_text()) == {
        "word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def test_the_maximum_length_never_exceeds_the_positions(teacher):
    folder = teacher()
    for raw, expected in ((1e30, 64), (0, 64), (63, 63)):
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": raw}))
        assert read(folder).max_length == expected
    (folder / "tokenizer_config.json").unlink()
    assert read(folder).max_length == 64


def test_the_dense_of_a_student_that_has_not_learned_is_sliced_with_the_hidden_group(teacher, distilled):
    folder = teacher(dense=True)
    code, student = distilled(folder, "--learning-rate", 0)
    kept = json.loads((student / "lineage.json").read_text())["hidden"]
    before, after = (load_file(path / "2_Dense" / "model.safetensors") for path in (folder, student))
    assert code == 0 and torch.equal(after["linear.weight"], before["linear.weight"][:, kept])
    assert torch.equal(after["linear.bias"], before["linear.bias"])


def test_the_dense_of_a_trained_student_is_closer_to_the_teacher_than_a_sliced_one(teacher, distilled):
    folder = teacher(dense=True)
    code, student = distilled(folder, "--steps", 60, "--learning-rate", 1e-2, "--compensate")
    kept = json.loads((student / "lineage.json").read_text())["hidden"]
    expected = encode(folder, prompt="")
    composed = F.cosine_similarity(encode(student, prompt=""), expected).mean()
    path = student / "2_Dense" / "model.safetensors"
    tensors = load_file(folder / "2_Dense" / "model.safetensors")
    save_file(load_file(path) | {"linear.weight": tensors["linear.weight"][:, kept].contiguous()}, path)
    assert code == 0 and composed > F.cosine_similarity(encode(student, prompt=""), expected).mean() + 0.01


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_loss_of_sentence_vectors_equals_its_equation_on_those_of_the_library(teacher, distilled, pooling):
    folder = teacher(pooling)
    _, student = distilled(folder)
    ids, none = torch.from_numpy(token_ids(folder, TEXTS[1:2])[0])[None], torch.zeros(0, dtype=torch.int64)
    output, projection = load_model(folder).eval()(ids), torch.randn(32, 16)
    distiller = distill.Distiller(load_model(student).eval(), {"pool": 1.0}, encoder=read(folder)).eval()
    distiller.hidden_projections[-1].weight = torch.nn.Parameter(projection)
    assert read(folder).distance(output.hidden[-1], output.hidden[-1]) == 0
    opened = [SentenceTransformer(str(name), device="cpu") for name in (student, folder)]
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vectors = [library[1](library[0](features.copy()))["sentence_embedding"] for library in opened]
    expected = 2 - 2 * F.cosine_similarity(vectors[0] @ projection.T, vectors[1])
    torch.testing.assert_close(distiller(data.Batch(ids, none, none), output)["loss"], expected.mean())


def test_sentence_encoders_learn_from_their_vectors_on_unmasked_rows(teacher, distilled, monkeypatch):
    folder, alone = teacher("cls"), ("--alpha-hidn", 0, "--alpha-emb", 0, "--alpha-attn", 0)
    flags = "--log-every", 1, "--steps", 40, "--learning-rate", 1e-2, "--prune-end", 0.1, "--prune-start", 0.1
    seen, batch_to = [], data.Batch.to
    monkeypatch.setattr(data.Batch, "to", lambda batch, device: seen.append(batch) or batch_to(batch, device))
    code, student = distilled(folder, *alone, *flags)
    log = [json.loads(line) for line in (student.parent / "log.jsonl").open()]
    losses = [line["loss_pool"] for line in log if line["event"] == "train"]
    assert code == 0 and losses[0] == 0 and np.mean(losses[-5:]) < 0.5 * max(losses) and max(losses) < 4
    assert {len(batch.labels) for batch in seen} == {0} and {batch.input_ids.shape[1] for batch in seen} == {16, 32}
    code, student = distilled(folder, "--alpha-pool", 0, "--log-every", 1)
    lines = (student.parent / "log.jsonl").read_text()
    assert code == 0 and "loss_hidn" in lines and "loss_pool" not in lines


@pytest.mark.parametrize("pooling, dense, normalize", VARIANTS)
def test_keep_space_ends_the_student_with_the_least_squares_map_to_the_teacher_s_vectors(
        teacher, distilled, pooling, dense, normalize, monkeypatch):
    """Fitted on training text before the teacher's own Dense, which keeps its activation."""
    fitted_on, sentences_of = [], session.sentences_of
    monkeypatch.setattr(session, "sentences_of", lambda rows, count, tokenizer: (
        fitted_on.append((rows, sentences_of(rows, count, tokenizer))), fitted_on[-1][1])[1])
    folder = teacher(pooling, dense, normalize)
    code, student = distilled(folder, "--keep-space")
    assert code == 0 and [module["path"] for module in json.loads((student / "modules.json").read_text())] == [
        "", "1_Pooling", "2_Dense", *["3_Normalize"] * normalize]
    rows, sentences = fitted_on[-1]
    assert len(rows) > len(fitted_on[0][0])  # the first call is for the held-out rows
    x = read(student).pooled(load_model(student), sentences).double().numpy()
    y = read(folder).pooled(load_model(folder), sentences).double().numpy()
    inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    ridge = 1e-4 * (x**2).mean(0).mean() * len(x)
    penalty = np.diag([ridge] * 16 + [0.0]) ** 0.5  # rows that make numpy's least squares a ridge regression
    solution = np.linalg.lstsq(np.concatenate([inputs, penalty]), np.concatenate([y, np.zeros((17, 32))]))[0]
    weight, bias = solution[:-1].T, solution[-1]
    if dense:
        first = load_file(folder / "2_Dense" / "model.safetensors")
        weight, bias = first["linear.weight"].numpy() @ weight, first["linear.weight"].numpy() @ bias + first[
            "linear.bias"].numpy()
    written = load_file(student / "2_Dense" / "model.safetensors")
    np.testing.assert_allclose(written["linear.weight"], weight, atol=2e-4)
    np.testing.assert_allclose(written["linear.bias"], bias, atol=2e-4)
    vectors = read(student).vectors(load_model(student), token_ids(student))
    torch.testing.assert_close(vectors, encode(student, prompt=""), rtol=0, atol=1e-5)
    assert vectors.shape == encode(folder).shape


def test_keep_space_needs_a_sentence_encoder(checkpoint, distilled, capsys):
    code, student = distilled(checkpoint, "--keep-space")
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "--keep-space needs a sentence encoder" in error
    assert not student.parent.exists()


def test_keep_space_needs_sentences_to_fit_on(teacher, distilled, capsys, monkeypatch):
    sentences_of = session.sentences_of
    monkeypatch.setattr(session, "sentences_of", lambda rows, count, tokenizer: (
        [] if count == session.FIT_SENTENCES else sentences_of(rows, count, tokenizer)))
    code, student = distilled(teacher(*VARIANTS[0]), "--keep-space")
    assert code == 2 and "--keep-space finds no sentence to fit on" in capsys.readouterr().err
    assert not student.parent.exists()


def test_the_end_table_compares_sentence_vectors(teacher, distilled, capsys):
    folder = teacher()
    for flags, named in (((), ["Spearman"]), (("--keep-space",), ["Spearman", "cosine to the", "own sentence first"])):
        assert distilled(folder, *flags)[0] == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if re.match("Spearman|cosine|own", line)]
        assert len(lines) == len(named) and all(map(str.startswith, lines, named))
        assert all(0 < float(line.split()[-1].rstrip("%")) <= 100 for line in lines)


def test_the_agreement_of_sentence_vectors_equals_scipy_s_and_a_search_one_by_one():
    rng = np.random.default_rng(0)
    t = rng.normal(size=(30, 6))
    s = t + rng.normal(size=t.shape)
    values = sentence_agreement(torch.tensor(s), torch.tensor(t))

    def cosines(a, b):
        return 1 - scipy.spatial.distance.cdist(a, b, "cosine")

    upper = np.triu_indices(30, 1)
    assert values["sentence_spearman"] == pytest.approx(
        scipy.stats.spearmanr(cosines(s, s)[upper], cosines(t, t)[upper]).statistic)
    assert values["sentence_cosine"] == pytest.approx(np.diag(cosines(s, t)).mean())
    first = sum(max(range(30), key=lambda j: cosines(s[[i]], t[[j]])[0, 0]) == i for i in range(30)) / 30
    assert values["own_sentence_first"] == pytest.approx(first) and 0 < first < 1
    assert "sentence_cosine" not in sentence_agreement(torch.tensor(s[:, :3]), torch.tensor(t))


def test_sentences_are_different_whole_and_from_all_over_the_text(tokenizer):
    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    text = "end of it. the river is by day. the old city. water and fire! sea? light on the stone road. a tree by"
    rows = [ids(text)[:30]] * 2 + [ids("the night and the day " * 6)[:30]] * 2
    assert {len(row) for row in rows} == {30}
    masked = MaskedRows(np.array(rows, np.uint16).ravel(), 32, tokenizer)
    expected = ["the river is by day.", "light on the stone road.", "the night and the day " * 6]
    assert [list(ids) for ids in sentences_of(masked, 10, tokenizer)] == [tokenizer.encode(t).ids for t in expected]
    assert len(sentences_of(masked, 2, tokenizer)) == 2 and len(sentences_of(masked, 1, tokenizer)) == 1


def test_a_plain_bert_has_no_modules(checkpoint):
    assert read(checkpoint) is None


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_module(number, **values):
    def edit(folder):
        table = json.loads((folder / "modules.json").read_text())
        table[number] |= values
        (folder / "modules.json").write_text(json.dumps(table))
    return edit


def edit_dense(**tensors):
    return lambda folder: save_file(load_file(folder / "2_Dense" / "model.safetensors") | tensors,
                                    folder / "2_Dense" / "model.safetensors")


@pytest.mark.parametrize("break_it, words", [
    (lambda f: (f / "modules.json").write_text("{"), "modules.json is not a list"),
    (lambda f: (f / "modules.json").write_text('{"path": 1}'), "modules.json is not a list"),
    (lambda f: (f / "modules.json").write_text("[]"), "modules.json"),
    (edit_module(1, type="sentence_transformers.models.LSTM"), "LSTM:1_Pooling"),
    (edit_module(1, type="sentence_transformers.models.Normalize"), "Normalize:1_Pooling"),
    (edit_module(1, path="../1_Pooling"), "Pooling:../1_Pooling"),
    (edit_module(2, path="/"), "Dense:/"),
    (edit_module(2, path=".."), "Dense:.."),
    (edit_module(0, path="0_Transformer"), "Transformer:0_Transformer"),
    (lambda f: shutil.rmtree(f / "1_Pooling"), "1_Pooling/config.json"),
    (lambda f: edit_json(f / "1_Pooling" / "config.json", pooling_mode="max"), "this pooling is not supported"),
    (lambda f: edit_json(f / "1_Pooling" / "config.json", pooling_mode=["cls", "mean"]), "this pooling is not"),
    (lambda f: edit_json(f / "1_Pooling" / "config.json", pooling_mode={}), "this pooling is not"),
    (edit_dense(**{"linear.weight": torch.zeros(24, 31)}), "32 columns"),
    (edit_dense(**{"linear.weight": torch.zeros(())}), "32 columns"),
    (edit_dense(**{"linear.bias": torch.zeros(23)}), "linear.bias"),
    (edit_dense(**{"linear.bias": torch.zeros(())}), "linear.bias"),
    (edit_dense(**{"linear.bias": torch.full((24,), torch.nan)}), "finite"),
    (edit_dense(**{"residual.weight": torch.zeros(24, 32)}), "no more"),
    (lambda f: edit_json(f / "2_Dense" / "config.json", activation_function="os.system"), "one of Identity, Tanh"),
    (lambda f: edit_json(f / "2_Dense" / "config.json", module_input_name=["token_embeddings"]), "sentence_embedding"),
    (lambda f: edit_json(f / "2_Dense" / "config.json", use_residual=True), "residual"),
    (lambda f: (f / "2_Dense" / "model.safetensors").unlink(), "2_Dense contains no model.safetensors"),
    (lambda f: (f / "config_sentence_transformers.json").write_text("["), "config_sentence_transformers.json"),
])
def test_modules_that_we_cannot_compute_are_refused_in_one_line_before_anything_is_written(
        teacher, distilled, capsys, break_it, words):
    folder = teacher(dense=True)
    break_it(folder)
    capsys.readouterr()
    code, student = distilled(folder)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and words in error
    assert not student.parent.exists()
