"""The student's README.md, read as the hub reads it, and its usage snippet, run as it stands."""

import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import metadata_load
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import distill
from support import checkpoint as folders
from support.model_card import model_card

TAGS = ["bert", "distillation", "pruning", "homodistil"]
TEACHER_CARD = "---\nlanguage:\n- en\nlicense: apache-2.0\ntags:\n- mine\n---\n\n# Teacher\n"


@pytest.fixture(params=["sentence-similarity", "fill-mask", "feature-extraction"])
def task_and_teacher(request, checkpoint, tmp_path):
    """A teacher for each task, with a model card."""
    folder = tmp_path / "teacher"
    if request.param == "sentence-similarity":
        SentenceTransformer(modules=[Transformer(str(checkpoint)), Pooling(32)]).save(str(folder))
    else:
        shutil.copytree(checkpoint, folder)
    if request.param == "feature-extraction":
        bert = folders.load_model(checkpoint)
        bert.cls = None
        folders.save_model(bert, folder)
    (folder / "README.md").write_text(TEACHER_CARD)
    return request.param, folder


def test_the_card_has_the_hub_s_metadata_the_end_table_the_command_and_a_snippet_that_runs(
        task_and_teacher, corpus, tmp_path, capsys, monkeypatch):
    task, teacher = task_and_teacher
    flags = ["--teacher", str(teacher), "--corpus", str(corpus), "--cache-dir", str(tmp_path / "a cache"), "--output",
             str(tmp_path / "run"), "--target-width", "16", "--steps", "2", "--batch-size", "4", "--seq-length", "16",
             "--device", "cpu", "--eval-rows", "4"]
    assert distill.main(flags) == 0
    printed, student = capsys.readouterr().out, tmp_path / "run" / "student"
    assert metadata_load(student / "README.md") == {  # without base_model, which is a folder here
        "language": ["en"], "license": "apache-2.0", "pipeline_tag": task, "tags": TAGS,
        "library_name": "sentence-transformers" if task == "sentence-similarity" else "transformers"}
    card = (student / "README.md").read_text()
    table, usage, command = (block.strip() for block in card.split("```")[1::2])
    assert table in printed and "hidden states, MSE" in table
    assert shlex.split(command) == ["python", "distill.py", *flags]
    assert re.search(r"Versions: torch 2\S+, .*python 3\.", card)
    monkeypatch.chdir(student)
    exec(usage.removeprefix("python\n"), {})
    assert capsys.readouterr().out.strip()


def test_teacher_and_data_sets_on_the_hub_are_named(tmp_path):
    args = SimpleNamespace(teacher="google-bert/bert-base-uncased", target_width=384, command="python distill.py",
                           corpus=["hub:wikimedia/wikipedia:20231101.en", "hub:owner/texts", "books/"])
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    text = model_card(args, "fill-mask", tmp_path, {"torch": "2.13.0", "commit": None}, "the table")
    (tmp_path / "card.md").write_text(text)
    assert metadata_load(tmp_path / "card.md") == {
        "base_model": "google-bert/bert-base-uncased", "datasets": ["wikimedia/wikipedia", "owner/texts"],
        "license": "other", "license_name": "mine", "license_link": "LICENSE", "library_name": "transformers",
        "pipeline_tag": "fill-mask", "tags": TAGS}
    assert "\nVersions: torch 2.13.0.\n" in text and "# bert-base-uncased, distilled to hidden size 384" in text


@pytest.mark.parametrize("content", [
    None, b"# no metadata", b"---\n: [\n---\n", b"---\n- a\n---\n", b"---\n\xff\n---\n"])
def test_without_a_readable_card_of_the_teacher_language_and_license_are_left_out(tmp_path, content):
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    args = SimpleNamespace(teacher="a/b", target_width=8, command="", corpus=["demo"])
    (tmp_path / "card.md").write_text(model_card(args, "fill-mask", tmp_path, {}, ""))
    assert metadata_load(tmp_path / "card.md") == {
        "base_model": "a/b", "library_name": "transformers", "pipeline_tag": "fill-mask", "tags": TAGS}
