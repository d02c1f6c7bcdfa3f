"""Text files to token ids: file formats, the demo text, and resumable tokenisation into a memory-mapped cache."""

import ast
import functools
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from support.errors import InputError, one_line
from support.files import atomic_rename, file_hash, locked, read_json, write_atomically
from support.hub import HubFile, hub_files

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
TEXT = ("text",)  # the columns of a record that hold its text, unless others are given
PIECE = 1 << 14  # characters given to the tokenizer as one text; longer documents are split, so that memory is bounded
RECORD = 1 << 26  # characters; a longer line of .jsonl is refused
TOKENISE_AT_ONCE = 1 << 21  # characters given to the tokenizer's threads at a time
HELDOUT_SHARE = 0.05  # of the tokens, in whole documents, are held out for evaluation ...
HELDOUT_TOKENS = 1 << 20  # ... until there are this many tokens
HEADING = re.compile(r" = [^=\s](.*[^=\s])? = \n*")  # " = Title = " of a WikiText article, not " = = Section = = "
Files = list[Path | HubFile]
NO_DEMO = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data"}  # folders of the standard library
TRAINING_FILE = re.compile(r"(?<![a-z])train(?![a-z])[^/]*$")
OTHER_SPLIT = re.compile(r"(?<![a-z])(validation|valid|val|dev|test)(?![a-z])[^/]*$")

# ---- Documents -----------------------------------------------------------------------------------------------


def corpus_files(corpora: list[str]) -> Files:
    """The files of all corpora: files, folders (recursively, in order of name) and hub data sets,
    `hub:OWNER/NAME:CONFIG`, which are not downloaded yet. `demo` has no files. Raises InputError."""
    files = []
    for corpus in corpora:
        if corpus.startswith("hub:"):
            name, _, config = corpus[4:].partition(":")
            folder, names = hub_files(name, "dataset", functools.partial(hub_texts, corpus, config), download=False)
            files += [HubFile(name, folder.name, file) for file in names]
        elif corpus != "demo":
            paths = sorted(Path(corpus).rglob("*")) if os.path.isdir(corpus) else [Path(corpus)]
            found = [path for path in paths if path.name.endswith(SUFFIXES) and os.path.isfile(path)]
            if not found:
                raise InputError(f"corpus {corpus}: no such file or folder with a name in {', '.join(SUFFIXES)}")
            files += found
    return list({os.path.realpath(str(file)): file for file in files}.values())  # what is named twice is read once


def hub_texts(corpus: str, config: str, names: list[str]) -> list[str]:
    """The training files among the `names` of a hub data set: those in folder `config`, in which "/" may be written "-"
    as in fineweb's sample-10BT, or in the only folder. Files called train are preferred."""
    texts = sorted(name for name in names if name.endswith(SUFFIXES) and not OTHER_SPLIT.search(name))
    train = list(filter(TRAINING_FILE.search, texts))
    if not config and len(folders := {os.path.dirname(name) for name in train or texts}) == 1:
        config = folders.pop()
    for folder in (config, config.replace("-", "/")):
        files = [name for name in texts if os.path.dirname(name) == folder]
        if files:
            return list(filter(TRAINING_FILE.search, files)) or files
    folders = sorted({os.path.dirname(name) for name in texts})
    raise InputError(f"corpus {corpus}: no training text in folder {config!r}; folders with text: "
                     f"{', '.join(folders[:8]) or 'none'}")


def read_pieces(path: Path | HubFile, progress: tqdm, columns: Sequence[str]) -> Iterator[str]:
    """The text of one file in pieces of at most PIECE characters, in bounded memory. An empty piece ends a document: it
    stands for a blank line of .txt, and follows every record of other formats. Raises InputError."""
    position = 0
    if isinstance(path, HubFile):
        path = path.download()
        progress.total += path.stat().st_size
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                batches = pyarrow.parquet.ParquetFile(raw).iter_batches(1024, columns=list(columns))
                records = (record for batch in batches for record in batch.to_pylist())
                pieces = record_pieces(path, records, columns)
            else:
                plain = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
                if b"\0" in plain.peek(4096)[:4096]:
                    raise InputError(f"corpus {path}: binary data, not text")
                text = io.TextIOWrapper(plain, encoding="utf-8-sig", errors="replace")
                if path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
                    pieces = record_pieces(path, json_records(text, columns), columns)
                else:
                    pieces = txt_pieces(text)
            for piece in pieces:
                progress.update(raw.tell() - position)
                position = raw.tell()
                yield piece
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:  # zlib's and pyarrow's, too
        raise InputError(f"corpus {path} cannot be read: {one_line(error)}") from None


def txt_pieces(text: io.TextIOBase) -> Iterator[str]:
    complete = True  # the last piece ended with a line, so that this one starts another
    while line := text.readline(PIECE):
        starts, complete = complete, line.endswith("\n")
        yield "" if starts and complete and line.isspace() else line


def json_records(text: io.TextIOBase, columns: Sequence[str]) -> Iterator[object]:
    while line := text.readline(RECORD):
        try:
            yield json.loads(line) if line.strip() else dict.fromkeys(columns)
        except (ValueError, RecursionError):
            yield None  # refused below


def record_pieces(source: object, records: Iterable[object], columns: Sequence[str] = TEXT) -> Iterator[str]:
    """The columns of every record that are not null, a line each, in pieces, and then an empty piece. Raises
    InputError."""
    for number, record in enumerate(records, 1):
        for column in columns:
            if not isinstance(record, dict) or not isinstance(record.get(column, 0), str | None):
                raise InputError(f"corpus {source}, record {number}: not an object with a string in field {column!r}; "
                                 "--text-column names the columns that hold the text")
        # JSON can contain half a surrogate pair, which is not text
        text = "\n".join(filter(None, map(record.get, columns))).encode(errors="replace").decode() + "\n"
        yield from (text[i : i + PIECE] for i in range(0, len(text), PIECE))
        yield ""


def demo_documents() -> Iterator[str]:
    """English text that comes with Python: the language reference and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    yield from (topics[topic] for topic in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if NO_DEMO.isdisjoint(path.relative_to(library).parts):
            owners = [node for node in ast.walk(ast.parse(path.read_bytes()))
                      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
            yield "\n".join(filter(None, map(ast.get_docstring, owners)))


def numbered_pieces(files: Files, demo: bool, columns: Sequence[str] = TEXT) -> Iterator[tuple[int, str]]:
    """The text of a corpus in pieces of at most PIECE characters, each with the number of its document. Shows progress.

    Whole documents are held out, so that none is in both parts. A record of .jsonl or .parquet is a document, and a
    blank line ends one in .txt. WikiText has many blank lines and records in one article: once a file has shown an
    article's heading, only another such heading starts a document.
    """
    number = 0
    size = sum(file.stat().st_size for file in files if isinstance(file, Path))
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenise", disable=None, leave=False) as progress:
        demo_records = [record_pieces("demo", ({"text": text} for text in demo_documents()))] if demo else []
        for pieces in [*(read_pieces(file, progress, columns) for file in files), *demo_records]:
            headings, text = False, ""
            for piece in pieces:
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


class Tokens(NamedTuple):
    train: np.ndarray  # memory-mapped token ids
    heldout: np.ndarray
    key: str  # the hash of everything that they depend on


def corpus_key(files: Files, demo: bool, tokenizer: Tokenizer, columns: Sequence[str], limit: float) -> str:
    """A hash of everything that the cached tokens depend on: contents (of hub files the revision), columns, limit,
    tokenizer and the constants above."""
    parts = [6, PIECE, TOKENISE_AT_ONCE, HELDOUT_SHARE, HELDOUT_TOKENS, importlib.metadata.version("tokenizers"),
             tokenizer.to_str(), list(columns), limit, demo and platform.python_version(),
             *(file if isinstance(file, HubFile) else (file.name, file_hash(file)) for file in files)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def tokenise(corpora: list[str], tokenizer: Tokenizer, cache: Path, columns: Sequence[str] = TEXT,
             limit: float = math.inf) -> Tokens:
    """Tokenise corpora into `cache`, or find them there. The tokenizer's threads use all cores; memory is bounded.

    The corpora are read up to the end of the block in which `limit` training tokens are reached. A document is held
    out for evaluation whenever less than HELDOUT_SHARE of the tokens before it are. Raises InputError for a corpus
    that is missing, damaged, not text, or has fewer than two documents.
    """
    files, demo = corpus_files(corpora), "demo" in corpora
    try:
        key = corpus_key(files, demo, tokenizer, columns, limit)
        folder = Path(cache) / key
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.parent):  # if two runs start at once, the second waits
                if not folder.is_dir():
                    work = folder.with_name(f"{key}.unfinished")
                    try:
                        write_tokens(files, demo, tokenizer, work, columns, limit)
                    except InputError:  # there is nothing to resume
                        shutil.rmtree(work)
                        raise
                    atomic_rename(work, folder)
    except OSError as error:
        raise InputError(f"tokenising into {cache} failed: {one_line(error)}") from None
    try:
        meta = read_json(folder / "meta.json")
        sides = [np.memmap(folder / f"{side}.bin", meta["dtype"], "r", shape=meta[side])
                 for side in ("train", "heldout")]  # an error if a file is too short
    except (InputError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is damaged: delete it ({one_line(error)})") from None
    if meta["replaced"]:
        print(f"corpus: characters read as U+FFFD because the text is not UTF-8: {meta['replaced']}", file=sys.stderr)
    return Tokens(*sides, key)


def write_tokens(files: Files, demo: bool, tokenizer: Tokenizer, folder: Path, columns: Sequence[str], limit: float):
    """Write train.bin, heldout.bin and meta.json into `folder`, or resume there after the last recorded block."""
    folder.mkdir(exist_ok=True)
    record = folder / "meta.json"
    meta = dict.fromkeys(("train", "heldout", "blocks", "replaced"), 0)  # tokens of each side, and counts
    meta |= {"document": -1, "side": "train"}  # number and side of the last document
    meta["dtype"] = "uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "uint32"
    if record.is_file():
        meta = read_json(record)
    with open(folder / "train.bin", "ab") as train, open(folder / "heldout.bin", "ab") as heldout:
        streams = {"train": train, "heldout": heldout}
        for side, stream in streams.items():  # whatever follows the record is written again
            stream.truncate(meta[side] * np.dtype(meta["dtype"]).itemsize)
        unwritten = itertools.islice(blocks(files, demo, columns), meta["blocks"], None)
        while meta["train"] < limit and (block := next(unwritten, None)):
            encodings = tokenizer.encode_batch_fast([text for _, text in block], add_special_tokens=False)
            for (document, text), encoding in zip(block, encodings, strict=True):
                meta["replaced"] += text.count("\ufffd")
                if not encoding.ids:
                    continue
                if document != meta["document"]:  # all its pieces go to the same side
                    share = HELDOUT_SHARE * (meta["train"] + meta["heldout"])
                    held = meta["heldout"] <= min(share, HELDOUT_TOKENS - 1)
                    meta |= {"document": document, "side": "heldout" if held else "train"}
                streams[meta["side"]].write(np.array(encoding.ids, meta["dtype"]).tobytes())
                meta[meta["side"]] += len(encoding.ids)
            meta["blocks"] += 1
            for stream in streams.values():
                stream.flush()
                os.fsync(stream.fileno())
            write_atomically(record, json.dumps(meta))
    if not meta["train"]:  # the first document is held out, the second is not
        raise InputError("the corpus is empty or a single document; put a blank line between documents, so that one "
                         "can be held out for evaluation")


def blocks(files: Files, demo: bool, columns: Sequence[str] = TEXT) -> Iterator[list[tuple[int, str]]]:
    """All numbered pieces that are not blank, in lists of about TOKENISE_AT_ONCE characters."""
    block, size = [], 0
    for number, text in numbered_pieces(files, demo, columns):
        if not text.strip():
            continue  # a file can be a million blank lines
        block.append((number, text))
        size += max(len(text), 64)  # even a short text takes memory when it is encoded
        if size > TOKENISE_AT_ONCE:
            yield block
            block, size = [], 0
    if block:
        yield block
