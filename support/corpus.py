"""Text files to token ids: file formats, the demo text, and resumable tokenisation into a memory-mapped cache."""

import ast
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from support.errors import InputError, one_line
from support.files import atomic_rename, locked, read_json, write_atomically
from support.hub import hub_files

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
PIECE = 1 << 14  # characters; longer documents are split, so that memory is bounded and parts can be held out
RECORD = 1 << 26  # characters; a longer line of .jsonl is refused
TOKENISE_AT_ONCE = 1 << 21  # characters given to the tokenizer's threads at a time
HELDOUT_EVERY = 50  # one of this many documents is held out for evaluation ...
HELDOUT_TOKENS = 1 << 20  # ... until there are this many tokens
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])  # its docstrings are part of the demo text

# ---- Documents -----------------------------------------------------------------------------------------------


def corpus_files(corpora: list[str]) -> list[Path]:
    """The files of all corpora: files, folders (recursively, in order of name) and hub data sets,
    `hub:OWNER/NAME:CONFIG`. `demo` has no files. Raises InputError."""
    files = []
    for corpus in corpora:
        if corpus == "demo":
            continue
        if corpus.startswith("hub:"):
            name, _, config = corpus[4:].partition(":")
            folder, found = hub_files(name, "dataset", lambda names, c=config, n=corpus: hub_parquet(names, c, n))
            files += [Path(folder) / file for file in found]
        elif os.path.isdir(corpus):
            found = sorted(p for p in Path(corpus).rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not found:
                raise InputError(f"corpus {corpus}: no {', '.join(SUFFIXES)} file in this folder")
            files += found
        elif not os.path.isfile(corpus):
            raise InputError(f"corpus {corpus}: no such file or folder")
        elif not corpus.endswith(SUFFIXES):
            raise InputError(f"corpus {corpus}: unknown file type; use {', '.join(SUFFIXES)}")
        else:
            files.append(Path(corpus))
    return files


def hub_parquet(names: list[str], config: str, corpus: str) -> list[str]:
    """The training parquet files of a hub data set, which may contain several configurations, each in a folder."""
    folders = {}
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        if file.startswith("train") and file.endswith(".parquet"):
            folders.setdefault(folder, []).append(name)
    if not config and len(folders) == 1:
        return folders.popitem()[1]
    if config not in folders:
        raise InputError(f"corpus {corpus}: no parquet file train* in folder {config!r}; folders with such files: "
                         f"{', '.join(list(folders)[:8]) or 'none'}")
    return folders[config]


def read_documents(path: Path, progress=None) -> Iterator[str]:
    """The documents of one file, none longer than PIECE characters, in bounded memory. Raises InputError.

    A blank line ends a document in .txt; elsewhere every record is one.
    """
    try:
        with open(path, "rb") as raw:
            if path.name.endswith(".parquet"):
                yield from read_parquet(path, progress)
                return
            plain = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            if b"\0" in plain.read(4096):
                raise InputError(f"corpus {path}: binary data, not text")
            plain.seek(0)
            text = io.TextIOWrapper(plain, encoding="utf-8", errors="replace")
            records = path.name.endswith((".jsonl", ".jsonl.gz"))
            lines = iter(lambda: text.readline(RECORD if records else PIECE), "")
            document, size, position = [], 0, 0
            for number, line in enumerate(lines, 1):
                if progress is not None:
                    progress.update(raw.tell() - position)
                    position = raw.tell()
                if records:
                    yield from pieces(json_text(line, path, number))
                    continue
                if not line.strip() or size + len(line) > PIECE:
                    yield "".join(document)
                    document, size = [], 0
                document.append(line)
                size += len(line)
            yield "".join(document)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise InputError(f"corpus {path} cannot be read: {one_line(error)}") from None


def json_text(line: str, path: Path, number: int) -> str:
    """Field `text` of a JSON line, or nothing for a blank line."""
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise InputError(f"corpus {path}, line {number}: not a JSON object with a string in field 'text'")
    return text


def pieces(text: str) -> Iterator[str]:
    text = text.encode(errors="replace").decode()  # JSON can contain half a surrogate pair, which is not text
    return (text[i : i + PIECE] for i in range(0, len(text), PIECE))


def read_parquet(path: Path, progress) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise InputError(f"corpus {path}: no column 'text'; columns are {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise InputError(f"corpus {path}: column 'text' does not contain text")
                yield from pieces(text or "")
            if progress is not None:
                progress.update(path.stat().st_size * len(batch) // file.metadata.num_rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"corpus {path} cannot be read as parquet: {one_line(error)}") from None


def demo_files() -> Iterator[Path]:
    """The source files of Python's standard library, in order, without tests and installed packages."""
    for folder, folders, names in os.walk(STANDARD_LIBRARY):
        folders[:] = sorted(set(folders) - {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data"})
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def demo_documents() -> Iterator[str]:
    """English text that comes with Python: the language reference and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield from pieces(topics[topic])
    for path in demo_files():
        tree = ast.parse(path.read_bytes())
        owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        yield from pieces("\n".join(filter(None, map(ast.get_docstring, owners))))


# ---- Tokens: two flat arrays of token ids in a cache, made once ----------------------------------------------


@dataclass
class Tokens:
    """A tokenised corpus: flat, memory-mapped arrays of token ids, and the hash of everything they depend on."""

    train: np.ndarray
    heldout: np.ndarray
    key: str


def corpus_key(files: list[Path], demo: bool, tokenizer: Tokenizer) -> str:
    """A hash of everything that the cached tokens depend on: contents, tokenizer and the constants above."""
    version = importlib.metadata.version("tokenizers")
    digest = hashlib.sha256(repr((5, demo, PIECE, TOKENISE_AT_ONCE, HELDOUT_EVERY, HELDOUT_TOKENS, version)).encode())
    digest.update(tokenizer.to_str().encode())
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest() + file.name.encode(errors="replace"))
    if demo:  # names and sizes instead of contents, because this runs every time
        digest.update(platform.python_version().encode())
        for path in demo_files():
            digest.update(f"{path.relative_to(STANDARD_LIBRARY)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:32]


def tokenise(corpora: list[str], tokenizer: Tokenizer, cache: Path) -> Tokens:
    """Tokenise corpora into `cache`, or find them there. The tokenizer's threads use all cores; memory is bounded.

    One document in HELDOUT_EVERY is held out for evaluation. Raises InputError for a corpus that is missing, damaged,
    not text, or has fewer than two documents.
    """
    files = corpus_files(corpora)
    demo = "demo" in corpora
    try:
        key = corpus_key(files, demo, tokenizer)
        folder = Path(cache) / key
        if not (folder / "meta.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.parent):  # if two runs start at once, the second waits
                if not (folder / "meta.json").is_file():
                    work = folder.with_name(f"{key}.unfinished")
                    try:
                        write_tokens(files, demo, tokenizer, work)
                    except InputError:  # there is nothing to resume
                        shutil.rmtree(work)
                        raise
                    atomic_rename(work, folder)
    except OSError as error:
        raise InputError(f"tokenising into {cache} failed: {one_line(error)}") from None
    meta = read_json(folder / "meta.json")
    if meta["replaced"]:
        print(f"corpus: {meta['replaced']} characters were not UTF-8 and have been replaced", file=sys.stderr)
    arrays = [np.memmap(folder / f"{part}.bin", dtype=meta["dtype"], mode="r") for part in ("train", "heldout")]
    return Tokens(*arrays, key)


def write_tokens(files: list[Path], demo: bool, tokenizer: Tokenizer, folder: Path):
    """Write train.bin, heldout.bin and meta.json into `folder`, or resume there after the last recorded block."""
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)
    folder.mkdir(exist_ok=True)
    record = folder / "progress.json"
    counts = dict.fromkeys(("train", "heldout", "documents", "blocks", "replaced"), 0)
    if record.is_file():
        counts = read_json(record)
    with (
        open(folder / "train.bin", "ab") as train,
        open(folder / "heldout.bin", "ab") as heldout,
        tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, desc="tokenise",
             disable=None, leave=False) as progress,
    ):
        train.truncate(counts["train"] * dtype.itemsize)  # whatever follows the record is written again
        heldout.truncate(counts["heldout"] * dtype.itemsize)
        for texts in itertools.islice(blocks(files, demo, progress), counts["blocks"], None):
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = encoding.ids
                if ids:
                    held = counts["documents"] % HELDOUT_EVERY == 0 and counts["heldout"] < HELDOUT_TOKENS
                    (heldout if held else train).write(np.array(ids, dtype=dtype).tobytes())
                    counts["heldout" if held else "train"] += len(ids)
                    counts["documents"] += 1
            counts["blocks"] += 1
            counts["replaced"] += sum(text.count("\ufffd") for text in texts)
            for part in (train, heldout):
                part.flush()
                os.fsync(part.fileno())
            write_atomically(record, json.dumps(counts))
    if counts["documents"] == 0:
        raise InputError("the corpus is empty; use more text")
    if counts["documents"] == 1:
        raise InputError("the corpus holds a single document; put a blank line between documents, so that some can be "
                         "held out for evaluation")
    (folder / "meta.json").write_text(json.dumps(counts | {"dtype": dtype.name}))
    record.unlink()


def blocks(files: list[Path], demo: bool, progress) -> Iterator[list[str]]:
    """All documents, in lists of about TOKENISE_AT_ONCE characters."""
    block, size = [], 0
    sources = [read_documents(file, progress) for file in files] + [demo_documents()] * demo
    for document in itertools.chain(*sources):
        if not document.strip():
            continue  # a file can be a million blank lines
        block.append(document)
        size += max(len(document), 64)  # even a short text takes memory when it is encoded
        if size > TOKENISE_AT_ONCE:
            yield block
            block, size = [], 0
    if block:
        yield block
