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
import re
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from support.errors import InputError, one_line
from support.files import atomic_rename, locked, read_json, write_atomically
from support.hub import hub_files

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
PIECE = 1 << 14  # characters given to the tokenizer as one text; longer documents are split, so that memory is bounded
RECORD = 1 << 26  # characters; a longer line of .jsonl is refused
TOKENISE_AT_ONCE = 1 << 21  # characters given to the tokenizer's threads at a time
HELDOUT_EVERY = 20  # one of this many documents is held out for evaluation ...
HELDOUT_TOKENS = 1 << 20  # ... until there are this many tokens
HEADING = re.compile(r" = [^=\s](.*[^=\s])? = \n*")  # " = Title = " of a WikiText article, not " = = Section = = "
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


def read_pieces(path: Path, progress: tqdm) -> Iterator[str]:
    """The text of one file in pieces of at most PIECE characters, in bounded memory. An empty piece ends a document: it
    stands for a blank line of .txt, and follows every record of .jsonl and .parquet. Raises InputError."""
    position = 0
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".parquet":
                pieces = split(record_texts(parquet_records(raw), path))
            else:
                plain = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
                if b"\0" in plain.peek(4096)[:4096]:
                    raise InputError(f"corpus {path}: binary data, not text")
                text = io.TextIOWrapper(plain, encoding="utf-8", errors="replace")
                records = ".jsonl" in path.suffixes[-2:]
                pieces = split(record_texts(json_records(text), path)) if records else txt_pieces(text)
            for piece in pieces:
                progress.update(raw.tell() - position)
                position = raw.tell()
                yield piece
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zlib.error) as error:  # zlib's, or pyarrow's
        raise InputError(f"corpus {path} cannot be read: {one_line(error)}") from None


def txt_pieces(text: io.TextIOBase) -> Iterator[str]:
    complete = True  # the last piece ended with a line, so that this one starts another
    while line := text.readline(PIECE):
        starts, complete = complete, line.endswith("\n")
        yield "" if starts and complete and line.isspace() else line


def json_records(text: io.TextIOBase) -> Iterator[object]:
    while line := text.readline(RECORD):
        try:
            record = json.loads(line) if line.strip() else {"text": ""}
        except (ValueError, RecursionError):
            record = None
        yield record


def parquet_records(raw: io.BufferedIOBase) -> Iterator[object]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(1024, columns=["text"]):
        yield from batch.to_pylist()


def record_texts(records: Iterable[object], path: Path) -> Iterator[str]:
    """Field `text` of every record; null is an empty text. Raises InputError."""
    for number, record in enumerate(records, 1):
        match record:
            case {"text": str() | None as text}:
                yield text or ""
            case _:
                raise InputError(f"corpus {path}, record {number}: not an object with a string in field 'text'")


def split(texts: Iterable[str]) -> Iterator[str]:
    """Every text in pieces of at most PIECE characters, and then an empty piece."""
    for text in texts:
        text = text.encode(errors="replace").decode() + "\n"  # JSON can contain half a surrogate pair, which is no text
        yield from (text[i : i + PIECE] for i in range(0, len(text), PIECE))
        yield ""


def demo_files() -> Iterator[Path]:
    """The source files of Python's standard library, in order, without tests and installed packages."""
    for folder, folders, names in os.walk(STANDARD_LIBRARY):
        folders[:] = sorted(set(folders) - {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data"})
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def demo_documents() -> Iterator[str]:
    """English text that comes with Python: the language reference and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield topics[topic]
    for path in demo_files():
        tree = ast.parse(path.read_bytes())
        owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        yield "\n".join(filter(None, map(ast.get_docstring, owners)))


def numbered_pieces(files: list[Path], demo: bool) -> Iterator[tuple[int, str]]:
    """The text of a corpus in pieces of at most PIECE characters, each with the number of its document. Shows progress.

    What counts as a document decides what can be held out without having its other half in the training text. A record
    of .jsonl and .parquet is a document, and a blank line ends one in .txt. WikiText has many blank lines and records
    in one article: once a file has shown an article's heading, only another such heading starts a document.
    """
    number = 0
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, desc="tokenise",
              disable=None, leave=False) as progress:
        sources = [read_pieces(file, progress) for file in files] + [split(demo_documents())] * demo
        for source in sources:
            headings, text = False, ""
            for piece in source:
                heading = HEADING.fullmatch(piece) is not None
                headings = headings or heading
                ends = heading or not (piece or headings)
                if ends or len(text) + len(piece) > PIECE:
                    yield number, text
                    text = ""
                number += ends
                text += piece
            yield number, text
            number += 1


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
    digest = hashlib.sha256(repr((6, demo, PIECE, TOKENISE_AT_ONCE, HELDOUT_EVERY, HELDOUT_TOKENS, version)).encode())
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
    counts = dict.fromkeys(("train", "heldout", "documents", "blocks", "replaced"), 0) | {"number": -1, "side": ""}
    if record.is_file():
        counts = read_json(record)
    with (
        open(folder / "train.bin", "ab") as train,
        open(folder / "heldout.bin", "ab") as heldout,
    ):
        train.truncate(counts["train"] * dtype.itemsize)  # whatever follows the record is written again
        heldout.truncate(counts["heldout"] * dtype.itemsize)
        for block in itertools.islice(blocks(files, demo), counts["blocks"], None):
            texts = [text for _, text in block]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (number, _), encoding in zip(block, encodings, strict=True):
                ids = encoding.ids
                if ids and number != counts["number"]:  # a new document, which goes to one side with all its pieces
                    held = counts["documents"] % HELDOUT_EVERY == 0 and counts["heldout"] < HELDOUT_TOKENS
                    counts |= {"number": number, "side": "heldout" if held else "train"}
                    counts["documents"] += 1
                if ids:
                    (heldout if counts["side"] == "heldout" else train).write(np.array(ids, dtype=dtype).tobytes())
                    counts[counts["side"]] += len(ids)
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


def blocks(files: list[Path], demo: bool) -> Iterator[list[tuple[int, str]]]:
    """All numbered pieces that are not blank, in lists of about TOKENISE_AT_ONCE characters."""
    block, size = [], 0
    for number, text in numbered_pieces(files, demo):
        if not text.strip():
            continue  # a file can be a million blank lines
        block.append((number, text))
        size += max(len(text), 64)  # even a short text takes memory when it is encoded
        if size > TOKENISE_AT_ONCE:
            yield block
            block, size = [], 0
    if block:
        yield block
