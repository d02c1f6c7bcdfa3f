"""Open text to training rows: read documents, tokenise them once into a memory-mapped cache, pack rows, mask tokens.

A row is exactly S tokens, [CLS] ... [SEP], cut from the running text with no padding. Masking (Devlin et al., 2019,
section 3.1) is drawn afresh for every step from (seed, step, row) alone, so any step can be made again by itself.
Every row gets the same number of masked positions, so M is known before the batch is, and tensors keep their shapes.
"""

import ast
import codecs
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
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tqdm import tqdm

from model import InputError, hub_files, one_line, read_json
from run import flush, locked, publish

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
PIECE = 1 << 14  # characters: a longer document counts as several: bounded memory, and the split reaches inside it
RECORD = 1 << 26  # characters: a longer line of .jsonl is refused
TOKENISE_AT_ONCE = 1 << 21  # characters handed to the tokenizer's threads together
HELDOUT_EVERY = 50  # of this many documents one is held out for evaluation ...
HELDOUT_TOKENS = 1 << 20  # ... until so many tokens are
MASKED_SHARE = 0.15  # of the tokens of a row; of these 80 % become [MASK], 10 % a random token, 10 % stay
LIBRARY = Path(sysconfig.get_paths()["stdlib"])  # its docstrings are part of the demo corpus
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# ---- Tokenizer: the files beside a checkpoint ----------------------------------------------------------------


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The WordPiece tokenizer in `folder`, from tokenizer.json or from vocab.txt. Raises InputError."""
    path, vocab, config = (Path(folder) / name for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"))
    if not path.is_file():
        path = vocab
    if not path.is_file():
        raise InputError(f"{folder} holds neither tokenizer.json nor vocab.txt")
    settings = read_json(config) if config.is_file() else {}
    try:
        if path != vocab:
            tokenizer = Tokenizer.from_file(str(path))
        else:
            words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not splitlines: U+2028 is a word
            tokenizer = wordpiece_tokenizer(
                {word: i for i, word in enumerate(words)}, settings.get("do_lower_case", True),
                settings.get("strip_accents"), settings.get("tokenize_chinese_chars", True))
    except Exception as error:  # the library raises a bare Exception for a damaged file
        raise InputError(f"{path} is damaged or not a tokenizer: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} not in the vocabulary; a BERT tokenizer has them")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(f"{path}: token id {largest} is outside the model's vocabulary of {vocab_size}; "
                         "tokenizer and weights do not belong together")
    return tokenizer


def wordpiece_tokenizer(vocab: dict[str, int], lowercase=True, strip_accents=None, split_chinese=True) -> Tokenizer:
    """BERT's own tokenizer around a vocabulary: clean text, split at spaces and punctuation, longest pieces first."""
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(True, split_chinese, strip_accents, lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocab])
    if "[CLS]" in vocab and "[SEP]" in vocab:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int):
    """Write tokenizer.json, tokenizer_config.json and vocab.txt, as transformers' AutoTokenizer expects them."""
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in vocab), encoding="utf-8")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    settings |= dict(zip(names, SPECIAL, strict=True))
    rules = tokenizer.normalizer
    if isinstance(rules, normalizers.BertNormalizer):  # transformers builds it anew from these, not from tokenizer.json
        settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": rules.lowercase,
                     "strip_accents": rules.strip_accents, "tokenize_chinese_chars": rules.handle_chinese_chars}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ---- Documents -----------------------------------------------------------------------------------------------


class Replacements:
    """Counts bytes that are not UTF-8 while a file is decoded; each stretch becomes U+FFFD."""

    def __init__(self):
        self.count = 0
        codecs.register_error("replace-and-count", self.handle)

    def handle(self, error):
        self.count += error.end - error.start
        return "\ufffd", error.end


def corpus_files(corpora: list[str]) -> list[Path]:
    """All files of the corpora that are named: files, folders (read recursively, in order of name) and hub data sets,
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
            raise InputError(f"corpus {corpus}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        else:
            files.append(Path(corpus))
    return files


def hub_parquet(names: list[str], config: str, corpus: str) -> list[str]:
    """The parquet files of the training part of a hub data set, which may hold several sets, each in a folder."""
    folders = {}
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        if file.startswith("train") and file.endswith(".parquet"):
            folders.setdefault(folder, []).append(name)
    if not config and len(folders) == 1:
        return folders.popitem()[1]
    if config not in folders:
        raise InputError(f"corpus {corpus}: no parquet file train* in folder {config!r}; folders with some: "
                         f"{', '.join(list(folders)[:8]) or 'none'}")
    return folders[config]


def read_documents(path: Path, progress=None, line_documents: bool = False) -> Iterator[str]:
    """The documents of one file, none longer than PIECE characters, in bounded memory. Raises InputError.

    In .txt a blank line ends a document (`line_documents`: every line does), elsewhere a record does.
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
            text = io.TextIOWrapper(plain, encoding="utf-8", errors="replace-and-count")
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
                if not line.strip() or size + len(line) > PIECE or line_documents and document:
                    yield "".join(document)
                    document, size = [], 0
                document.append(line)
                size += len(line)
            yield "".join(document)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise InputError(f"corpus {path} cannot be read: {one_line(error)}") from None


def json_text(line: str, path: Path, number: int) -> str:
    """Field `text` of a JSON line; a blank line holds none."""
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
    text = text.encode(errors="replace").decode()  # half a surrogate pair, which JSON can spell, is no text
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
                    raise InputError(f"corpus {path}: column 'text' does not hold text")
                yield from pieces(text or "")
            if progress is not None:
                progress.update(path.stat().st_size * len(batch) // file.metadata.num_rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"corpus {path} cannot be read as parquet: {one_line(error)}") from None


def demo_files() -> Iterator[Path]:
    """The source files of the standard library, in order, without tests and installed packages."""
    for folder, folders, names in os.walk(LIBRARY):
        folders[:] = sorted(set(folders) - {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data"})
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def demo_documents() -> Iterator[str]:
    """English text that every Python carries: the language reference and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield from pieces(topics[topic])
    for path in demo_files():
        tree = ast.parse(path.read_bytes())
        owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        yield from pieces("\n".join(filter(None, map(ast.get_docstring, owners))))


# ---- Tokens: a corpus becomes two flat arrays of token ids in a cache, made once -----------------------------


@dataclass
class Tokens:
    """A tokenised corpus: flat arrays of token ids (memory-mapped) and the record of how they were made."""

    train: np.ndarray
    heldout: np.ndarray
    key: str
    replaced_bytes: int


def corpus_key(files: list[Path], demo: bool, tokenizer: Tokenizer) -> str:
    """A hash over everything that the cached tokens depend on: contents, tokenizer, and the constants above."""
    version = importlib.metadata.version("tokenizers")
    digest = hashlib.sha256(repr((3, demo, PIECE, TOKENISE_AT_ONCE, HELDOUT_EVERY, HELDOUT_TOKENS, version)).encode())
    digest.update(tokenizer.to_str().encode())
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest() + file.name.encode(errors="replace"))
    if demo:  # names and sizes instead of contents: this runs every time, and parsing the library takes seconds
        digest.update(platform.python_version().encode())
        for path in demo_files():
            digest.update(f"{path.relative_to(LIBRARY)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:32]


def tokenise(corpora: list[str], tokenizer: Tokenizer, cache: Path) -> Tokens:
    """Tokenise corpora into `cache`, or find them there. The tokenizer's own threads use all cores; memory is bounded.

    One document in HELDOUT_EVERY is held out for evaluation; no row of the training part shares a document with it.
    Raises InputError for a corpus that is missing, empty, damaged or not text.
    """
    files = corpus_files(corpora)
    demo = "demo" in corpora
    try:
        key = corpus_key(files, demo, tokenizer)
        folder = Path(cache) / key
        if not (folder / "meta.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.parent):  # of two runs at once the second waits
                if not (folder / "meta.json").is_file():
                    work = folder.with_name(f"{key}.unfinished")
                    try:
                        write_tokens(files, demo, tokenizer, work)
                    except InputError:  # nothing to go on with
                        shutil.rmtree(work)
                        raise
                    publish(work, folder)
    except OSError as error:
        raise InputError(f"tokenising into {cache} failed: {one_line(error)}") from None
    meta = read_json(folder / "meta.json")
    if meta["replaced_bytes"]:
        print(f"corpus: {meta['replaced_bytes']} bytes were not UTF-8 and were replaced", file=sys.stderr)
    if meta["line_documents"]:
        print("corpus: a single document; every line counts as one, so that some can be held out", file=sys.stderr)
    arrays = [np.memmap(folder / f"{part}.bin", dtype=meta["dtype"], mode="r") for part in ("train", "heldout")]
    return Tokens(*arrays, key, meta["replaced_bytes"])


def write_tokens(files: list[Path], demo: bool, tokenizer: Tokenizer, folder: Path):
    """Write train.bin, heldout.bin and meta.json into `folder`, or go on there after the last recorded block."""
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)
    folder.mkdir(exist_ok=True)
    record = folder / "progress.json"
    for line_documents in (False, True):
        replaced = Replacements()
        nothing = dict.fromkeys(("train", "heldout", "documents", "blocks"), 0)
        counts = read_json(record) if record.is_file() else nothing | {"line_documents": line_documents}
        if counts["line_documents"] != line_documents:
            continue  # it was ended in the second pass
        total = sum(file.stat().st_size for file in files)
        with (
            open(folder / "train.bin", "ab") as train,
            open(folder / "heldout.bin", "ab") as heldout,
            tqdm(total=total, unit="B", unit_scale=True, desc="tokenise", disable=None, leave=False) as progress,
        ):
            train.truncate(counts["train"] * dtype.itemsize)  # what came after the record is written again
            heldout.truncate(counts["heldout"] * dtype.itemsize)
            for texts in itertools.islice(blocks(files, demo, progress, line_documents), counts["blocks"], None):
                for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                    ids = encoding.ids
                    if ids:
                        held = counts["documents"] % HELDOUT_EVERY == 0 and counts["heldout"] < HELDOUT_TOKENS
                        (heldout if held else train).write(np.array(ids, dtype=dtype).tobytes())
                        counts["heldout" if held else "train"] += len(ids)
                        counts["documents"] += 1
                counts["blocks"] += 1
                for part in (train, heldout):
                    part.flush()
                    os.fsync(part.fileno())
                record.with_suffix(".new").write_text(json.dumps(counts))
                flush(record.with_suffix(".new"))
                record.with_suffix(".new").replace(record)
        if counts["documents"] > 1:
            break
        record.unlink(missing_ok=True)  # one document alone cannot be split by document: then every line counts as one
    if not counts["train"]:
        raise InputError("the corpus is empty or has a single line; give more text, a blank line between documents")
    meta = counts | {"dtype": dtype.name, "replaced_bytes": replaced.count}
    (folder / "meta.json").write_text(json.dumps(meta))
    record.unlink()


def blocks(files: list[Path], demo: bool, progress, line_documents: bool) -> Iterator[list[str]]:
    """All documents, gathered into lists of about TOKENISE_AT_ONCE characters."""
    block, size = [], 0
    sources = [read_documents(file, progress, line_documents) for file in files] + [demo_documents()] * demo
    for document in itertools.chain(*sources):
        if not document.strip():
            continue  # a file can be a million blank lines
        block.append(document)
        size += max(len(document), 64)  # an encoding takes memory, however short its text
        if size > TOKENISE_AT_ONCE:
            yield block
            block, size = [], 0
    if block:
        yield block


# ---- Rows and masks ------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Masked rows. M = rows * masked positions of a row; `positions` index the flattened (B*S) batch."""

    input_ids: torch.Tensor  # (B,S) int64
    positions: torch.Tensor  # (M,) int64
    labels: torch.Tensor  # (M,) int64, the tokens that were there

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


class Rows:
    """Rows of exactly S tokens, [CLS] ... [SEP], over a flat array of token ids, masked on demand."""

    def __init__(self, tokens: np.ndarray, seq_length: int, tokenizer: Tokenizer):
        self.count = len(tokens) // (seq_length - 2)
        self.text = tokens[: self.count * (seq_length - 2)].reshape(self.count, seq_length - 2)  # a view
        self.seq_length = seq_length
        self.masked = max(1, round(MASKED_SHARE * (seq_length - 2)))  # positions in a row
        self.cls, self.sep, self.mask = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[MASK]"))
        self.vocab_size = tokenizer.get_vocab_size()
        self.shuffle, self.order = None, None

    def __len__(self):
        return self.count

    def training_batch(self, seed: int, step: int, batch_size: int, first: int = 0, last: int | None = None) -> Batch:
        """Rows first..last of the global batch of `step`, in an order shuffled anew for every pass over the text."""
        numbers = np.arange(first, batch_size if last is None else last) + step * batch_size
        indices = np.empty_like(numbers)
        for epoch in np.unique(numbers // self.count):
            if self.shuffle != (seed, epoch):
                self.shuffle, self.order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(self.count)
            here = numbers // self.count == epoch
            indices[here] = self.order[numbers[here] % self.count]
        return self.batch(indices, seed, step, first)

    def batch(self, indices: np.ndarray, seed: int, step: int, first: int = 0) -> Batch:
        """The rows `indices`, masked with the random numbers of (seed, step, row), row counting on from `first`."""
        b, s, m = len(indices), self.seq_length, self.masked
        ids = np.empty((b, s), np.int64)
        ids[:, 0], ids[:, 1:-1], ids[:, -1] = self.cls, self.text[indices], self.sep
        blocks_per_row = -(-(s + 2 * m) // 4)  # the Philox counter moves in blocks of four numbers
        generator = np.random.Philox(key=[seed, step]).advance(first * blocks_per_row)
        uniform = np.random.Generator(generator).random((b, 4 * blocks_per_row))
        chosen, action, word = np.split(uniform[:, 1 : s - 1 + 2 * m], [s - 2, s - 2 + m], axis=1)
        columns = 1 + np.sort(np.argpartition(chosen, m - 1, axis=1)[:, :m], axis=1)  # (B,m), never [CLS] or [SEP]
        positions = (columns + np.arange(b)[:, None] * s).ravel()  # (M,)
        labels = ids.ravel()[positions]
        word = (word.ravel() * self.vocab_size).astype(np.int64)
        action = action.ravel()
        ids.ravel()[positions] = np.where(action < 0.8, self.mask, np.where(action < 0.9, word, labels))
        return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels))
