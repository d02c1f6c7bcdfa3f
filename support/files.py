"""Files that are written atomically, locks, and hashes."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

from support.errors import InputError, one_line

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists is used
MODEL_FILES = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
               "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises InputError if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}") from None


def fsync(path: Path):
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_rename(work: Path, target: Path):
    """Rename a finished file or folder atomically, after everything in it has been written to the disk."""
    for path in (*work.rglob("*"), work):
        fsync(path)
    work.replace(target)
    fsync(target.parent)


def remove(path: Path):
    """Remove a file, a symbolic link or a whole folder, if there is one. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes):
    """Replace a file: readers, and a run after a power failure, see the old content or the new."""
    work = path.with_name(f"{path.name}.unfinished")
    work.write_bytes(content.encode() if isinstance(content, str) else content)
    atomic_rename(work, path)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True):
    """`with locked(folder)`: one process at a time. The lock ends with its owner, however that ends. If another process
    has it, this one waits or raises BlockingIOError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_file(folder: Path) -> Path | None:
    """The first of WEIGHT_FILES that exists."""
    return next((path for name in WEIGHT_FILES if (path := folder / name).is_file()), None)


def model_fingerprint(folder: Path) -> str:
    """A hash of everything that makes up a model: weights, shape, tokenizer, and the modules of a sentence encoder."""
    paths = sorted([*folder.iterdir(), *folder.glob("[0-9]*_*/*")])
    parts = [f"{path.relative_to(folder)} {file_hash(path)}" for path in paths
             if path == weight_file(path.parent) or path.name in MODEL_FILES]
    return content_hash("".join(parts).encode())
