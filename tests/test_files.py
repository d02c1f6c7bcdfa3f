"""Atomic writes, locks, fingerprints of model folders, the files that list the requirements, and the mutants."""

import os
import shutil
import threading
import time
import tomllib

import pytest
from conftest import ROOT
from mutants import MUTANTS
from packaging.requirements import Requirement

from support import files


def test_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    files.write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            files.write_atomically(path, "new")
    assert path.read_text() == "old"
    files.write_atomically(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_everything_is_on_the_disk_before_a_file_or_folder_gets_its_name(tmp_path, monkeypatch):
    """After a power failure a name stands for complete content, and the name itself is on the disk, too."""
    events, fsync = [], files.fsync

    def recorded(path):
        events.append((path.name, (tmp_path / "text").exists(), (tmp_path / "done").exists()))
        fsync(path)

    monkeypatch.setattr(files, "fsync", recorded)
    files.write_atomically(tmp_path / "text", "text")
    assert events == [("text.unfinished", False, False), (tmp_path.name, True, False)]
    events.clear()
    work = tmp_path / "work"
    work.mkdir()
    (work / "content").write_text("content")
    (work / "1_Pooling").mkdir()
    (work / "1_Pooling" / "config.json").write_text("{}")
    files.atomic_rename(work, tmp_path / "done")
    assert sorted(events[:-2]) == [(name, True, False) for name in ("1_Pooling", "config.json", "content")]
    assert events[-2:] == [("work", True, False), (tmp_path.name, True, True)]


def test_lock_lets_one_in_at_a_time_and_ends_with_an_error(tmp_path):
    order = []

    def second():
        with files.locked(tmp_path):
            order.append("second")

    with pytest.raises(KeyError), files.locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
        raise KeyError
    thread.join(timeout=10)
    assert order == ["first", "second"]
    with files.locked(tmp_path), pytest.raises(BlockingIOError), files.locked(tmp_path, wait=False):
        order.append("both")
    assert order == ["first", "second"]


def test_fingerprint_changes_with_weights_shape_tokenizer_and_modules_only(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    original = files.model_fingerprint(folder)
    assert original == files.model_fingerprint(checkpoint)
    (folder / "README.md").write_text("not a part of the model")
    (folder / "pytorch_model.bin").write_bytes(b"not used, as there is model.safetensors")
    assert files.model_fingerprint(folder) == original
    fingerprints = {original}
    names = ["model.safetensors", "config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "modules.json", "config_sentence_transformers.json",
             "sentence_bert_config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
             "3_Dense/model.safetensors"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        with open(folder / name, "ab") as stream:
            stream.write(b" ")
        fingerprints.add(files.model_fingerprint(folder))
    assert len(fingerprints) == 1 + len(names)


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read as JSON"), (b"{", "cannot be read as JSON"), (b"\xff", "cannot be read as JSON"),
    (b"[" * 100_000, "cannot be read as JSON"), (b"[1]", "not a JSON object")])
def test_file_without_a_json_object_is_refused(tmp_path, refused, content, words):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with refused("x.json", words):
        files.read_json(tmp_path / "x.json")


def test_pyproject_toml_admits_the_versions_of_requirements_txt():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {entry.name: entry.specifier for entry in map(Requirement, project["dependencies"])}
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    assert ranges.keys() == pins.keys()
    assert all(ranges[name].contains(version) for name, version in pins.items())


def test_the_line_of_every_mutant_stands_in_its_file_once():
    assert [(file, line) for file, line, *_ in MUTANTS if (ROOT / file).read_text().count(line) != 1] == []
