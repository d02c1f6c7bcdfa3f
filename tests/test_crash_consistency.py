"""What a power failure at any moment leaves of a checkpoint, an exported student and a tokenised text.

The file operations of the program are recorded (write, fsync, rename, unlink) and every prefix is replayed. What was
not flushed by then may be lost: data that was written but not fsynced is empty, torn, or complete, and names that were
changed since their folder was last fsynced are the old or the new ones. Every such state must be usable.
"""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from support import corpus, files, run_folder


class Recorder:
    """Records the file operations below `root` while `with` is active: ("write", path, content), ("fsync", path),
    ("rename", old, new), ("unlink", path), ("mkdir", path)."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.operations, self.patch = root, [], monkeypatch

    def __enter__(self):
        real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")}
        self.context = self.patch.context()
        patch = self.context.__enter__()

        def snapshot():
            """Whatever was written since the last operation, as writes."""
            for path in sorted(p for p in self.root.rglob("*") if p.is_file()):
                content = path.read_bytes()
                if self.known.get(path) != content:
                    self.known[path] = content
                    self.operations.append(("write", path, content))

        def recorded(name):
            def call(*args, **kwargs):
                snapshot()
                paths = [self.path_of(args[0]) if name == "fsync" else Path(os.fspath(p))
                         for p in args[: 2 if name in ("rename", "replace") else 1]]
                result = real[name](*args, **kwargs)
                if paths[0].is_relative_to(self.root):
                    kind = {"replace": "rename", "rmdir": "unlink"}.get(name, name)
                    self.operations.append((kind, *paths))
                    if kind == "rename":
                        self.known = {new_path(p, *paths): c for p, c in self.known.items()}
                return result

            return call

        for name in real:
            patch.setattr(os, name, recorded(name))
        self.known: dict[Path, bytes] = {p: p.read_bytes() for p in self.root.rglob("*") if p.is_file()}
        self.before = dict(self.known)
        self.finish = snapshot
        return self

    def path_of(self, descriptor: int) -> Path:
        inode = os.fstat(descriptor)
        inside = (p for p in (self.root, *self.root.rglob("*")) if os.path.samestat(p.stat(), inode))
        return next(inside, Path("outside"))

    def __exit__(self, *_):
        self.finish()
        self.context.__exit__(None, None, None)


def new_path(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def states_after(before: dict[Path, bytes], operations: list[tuple]) -> list[dict[Path, bytes]]:
    """All contents of the disk that a power failure after these operations may leave: path -> content."""
    names, synced_names = {p: p for p in before}, {p: p for p in before}  # path -> the inode, known by its first path
    data, synced_data = dict(before), dict(before)
    for kind, path, *rest in operations:
        if kind == "write":
            inode = names.setdefault(path, (path, len(data)))
            data[inode] = rest[0]
            synced_data.setdefault(inode, b"")
        elif kind == "fsync" and path in names:
            synced_data[names[path]] = data[names[path]]
        elif kind == "fsync":  # a folder: its names are on the disk
            synced_names = {p: i for p, i in synced_names.items() if path not in p.parents}
            synced_names |= {p: i for p, i in names.items() if path in p.parents}
        elif kind == "rename":
            names = {p: i for p, i in names.items() if not p.is_relative_to(rest[0])}  | {
                new_path(p, path, rest[0]): i for p, i in names.items() if p.is_relative_to(path)}
            names = {p: i for p, i in names.items() if not p.is_relative_to(path)}
        elif kind == "unlink":
            names.pop(path, None)
    states = []
    for tree, loss in itertools.product((names, synced_names), ("lost", "torn", "kept")):
        state = {}
        for path, inode in tree.items():
            old, new = synced_data[inode], data[inode]
            state[path] = {"lost": old, "torn": new[: (len(old) + len(new)) // 2], "kept": new}[loss]
        states.append(state)
    return states


def every_state(recorder: Recorder, root: Path):
    """Build every state in turn at `root`, which is what the program looks at."""
    seen = set()
    for count in range(len(recorder.operations) + 1):
        for state in states_after(recorder.before, recorder.operations[:count]):
            key = count == len(recorder.operations), *sorted((str(path), content) for path, content in state.items())
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            for path, content in state.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield count
    assert len(seen) >= 4  # otherwise nothing was recorded


def test_a_checkpoint_is_the_new_one_or_an_old_one_after_every_power_failure(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        run_folder.save_checkpoint(folder, {"step": step, "weight": torch.full((300,), float(step))})
    with Recorder(folder, monkeypatch) as recorder:
        run_folder.save_checkpoint(folder, {"step": 3, "weight": torch.full((300,), 3.0)})
    found = set()
    for count in every_state(recorder, folder):
        loaded = run_folder.load_newest(folder)
        assert torch.equal(loaded["weight"], torch.full((300,), float(loaded["step"])))
        assert loaded["step"] == 3 or count < len(recorder.operations)  # at the end the new one is there
        found.add(loaded["step"])
    assert found == {2, 3}


def test_an_exported_folder_is_complete_or_absent_after_every_power_failure(tmp_path, monkeypatch):
    root = tmp_path / "run"
    root.mkdir()
    (root / "run.json").write_text("{}")
    with Recorder(root, monkeypatch) as recorder:
        work = root / "student.unfinished"
        work.mkdir()
        (work / "config.json").write_text(json.dumps({"hidden_size": 16}))
        (work / "model.safetensors").write_bytes(safetensors.torch.save({"weight": torch.ones(100)}))
        (work / "1_Pooling").mkdir()
        (work / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
        files.atomic_rename(work, root / "student")
    found = set()
    for _ in every_state(recorder, root):
        there = (root / "student").is_dir()
        if there:
            assert json.loads((root / "student" / "config.json").read_text()) == {"hidden_size": 16}
            assert safetensors.torch.load_file(root / "student" / "model.safetensors")["weight"].sum() == 100
            assert json.loads((root / "student" / "1_Pooling" / "config.json").read_text()) == {"pooling_mode": "cls"}
        found.add(there)
    assert found == {True, False}


def test_a_replaced_file_is_the_old_or_the_new_one_after_every_power_failure(tmp_path, monkeypatch):
    root = tmp_path / "run"
    root.mkdir()
    (root / "run.json").write_text("old " * 50)
    with Recorder(root, monkeypatch) as recorder:
        files.write_atomically(root / "run.json", "new " * 60)
    found = set()
    for _ in every_state(recorder, root):
        found.add((root / "run.json").read_text())
    assert found == {"old " * 50, "new " * 60}


def test_tokenising_continues_to_the_same_tokens_after_every_power_failure(tmp_path, monkeypatch, tokenizer, documents):
    monkeypatch.setattr(corpus, "TOKENISE_AT_ONCE", 4000)
    monkeypatch.setattr(corpus, "PIECE", 200)  # blocks end inside documents
    (tmp_path / "text.txt").write_text("\n\n".join(documents[:40]))
    paths, cache = [str(tmp_path / "text.txt")], tmp_path / "cache"
    cache.mkdir()
    with Recorder(cache, monkeypatch) as recorder:
        expected = corpus.tokenise(paths, tokenizer, cache)
    train, heldout = np.array(expected.train), np.array(expected.heldout)
    for _ in every_state(recorder, cache):
        tokens = corpus.tokenise(paths, tokenizer, cache)
        assert np.array_equal(tokens.train, train) and np.array_equal(tokens.heldout, heldout)


def test_the_replay_finds_a_missing_fsync(tmp_path, monkeypatch):
    """Proof that these tests can fail: without its fsync a replaced file can be torn."""
    monkeypatch.setattr(files, "fsync", lambda path: None)
    with pytest.raises(AssertionError):
        test_a_replaced_file_is_the_old_or_the_new_one_after_every_power_failure(tmp_path, monkeypatch)
