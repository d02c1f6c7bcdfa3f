"""From text files to masked rows: file formats, damaged input, held-out documents, the cache, and the masks."""

import gzip
import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import VOCAB
from tokenizers import Tokenizer, normalizers

from data import MaskedRows, UnmaskedRows, load_rows
from support import corpus as corpora
from support.checkpoint import load_tokenizer, wordpiece_tokenizer
from support.corpus import tokenise
from support.errors import InputError

# ---- File formats --------------------------------------------------------------------------------------------


def write_corpus(path, documents, separator="\n\n"):
    """The documents in the format that the file's name asks for. separator: between documents of .txt."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"id": range(len(documents)), "text": documents}), path, row_group_size=7)
        return path
    if ".json" in path.name:
        content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    else:
        content = separator.join(documents)
    content = content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*paths) -> list[str]:
    """The documents of files, each put together from its pieces."""
    documents: dict[int, str] = {}
    for block in corpora.blocks(corpora.corpus_files([str(path) for path in paths]), demo=False):
        for number, piece in block:
            assert len(piece) <= corpora.PIECE
            documents[number] = documents.get(number, "") + piece
    return [text.strip() for text in documents.values()]


@pytest.mark.parametrize("suffix", corpora.SUFFIXES)
def test_all_file_formats_give_the_same_documents_and_tokens(tmp_path, documents, corpus, tokenizer, suffix):
    path = write_corpus(tmp_path / f"x{suffix}", documents)
    assert read(path) == documents
    expected, got = (tokenise([str(p)], tokenizer, tmp_path / "cache") for p in (corpus, path))
    assert np.array_equal(got.train, expected.train) and np.array_equal(got.heldout, expected.heldout)
    assert len(got.train) and got.key != expected.key


def test_folders_are_read_recursively_and_corpora_in_the_given_order(tmp_path, documents):
    folder = tmp_path / "many" / "deeper"
    folder.mkdir(parents=True)
    parts = [documents[i * 20 : (i + 1) * 20] for i in range(7)]
    parts[6] = ["the king"]
    for i, suffix in enumerate(corpora.SUFFIXES):
        write_corpus(folder / f"{i}{suffix}", parts[i])
    (folder / "README.md").write_text("not a corpus")
    assert read(tmp_path / "many") == [*documents, "the king"]
    assert read(folder / "3.jsonl.gz", folder / "0.txt") == parts[3] + parts[0]


def test_blank_lines_end_documents_in_txt_and_records_do_in_jsonl(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffa one\na two\n \t \nb one\r\n\r\nc one\n\n\n\n\nd one".encode())
    assert [re.findall(r"\w+", text) for text in read(path)] == [
        ["a", "one", "a", "two"], ["b", "one"], ["c", "one"], ["d", "one"]]
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\n\\nstill a"}\n\n{"text": ""}\n{"text": "b"}')
    assert read(path) == ["a\n\nstill a", "b"]


def test_parquet_may_have_empty_rows_and_any_string_type(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        parquet.write_table(pa.table({"text": pa.array(["a", None, "b", ""]).cast(kind)}), tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet") == ["a", "b"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_columns_with_text_are_joined_to_one_document(tmp_path, tokenizer, refused, name):
    columns = {"premise": ["the king", None, "old"], "hypothesis": ["a queen", "sea", ""], "label": [0, 1, 2]}
    if name == "x.parquet":
        parquet.write_table(pa.table(columns), tmp_path / name)
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        (tmp_path / name).write_text("\n\n".join(lines))
    found = {}
    for number, text in corpora.numbered_pieces([tmp_path / name], False, ["premise", "hypothesis"]):
        found[number] = found.get(number, "") + text
    assert [text for text in found.values() if text.strip()] == ["the king\na queen\n", "sea\n", "old\n"]
    keys = [tokenise([str(tmp_path / name)], tokenizer, tmp_path / "cache", given).key
            for given in (["premise", "hypothesis"], ["hypothesis"], ["premise", "hypothesis"])]
    assert keys[0] != keys[1] and keys[0] == keys[2]
    for given, missing in ((["text"], "text"), (["premise", "label"], "label")):
        with refused(name, "record 1", f"field '{missing}'", "--text-column"):
            tokenise([str(tmp_path / name)], tokenizer, tmp_path / "cache", given)


def test_a_text_that_is_named_twice_is_read_once(tmp_path):
    (tmp_path / "folder").mkdir()
    path = write_corpus(tmp_path / "folder" / "x.txt", ["a", "b"])
    names = [str(path), str(tmp_path / "folder"), f"{tmp_path}/folder/../folder/x.txt"]
    assert len(corpora.corpus_files(names)) == 1


def test_long_documents_are_read_in_pieces_without_losing_text(tmp_path):
    for text in (" ".join(str(i) for i in range(20_000)), "\n".join(str(i) for i in range(20_000)),
                 "a" * corpora.PIECE, "a" * 3 * corpora.PIECE + "\nb", "a" + " " * 2 * corpora.PIECE + "b"):
        for name in ("x.txt", "x.jsonl", "x.parquet"):
            found = read(write_corpus(tmp_path / name, [text, "end"]))
            assert [re.sub(r"\s", "", document) for document in found] == [re.sub(r"\s", "", text), "end"]


def wikitext(*titles: str) -> list[str]:
    """Lines as in WikiText: a heading, a section with a heading, paragraphs, and a blank line after each of them."""
    return [line for title in titles for line in (
        f" = {title} = \n", " \n", f" {title} is a city . \n", " = = History = = \n", " \n",
        f" In {title} 1 + 1 = 2 = 3 - 1 . \n", " = = = Old = = = \n", " \n", f" {title} is old . \n", " \n")]


@pytest.mark.parametrize("suffix", corpora.SUFFIXES)
def test_wikitext_documents_reach_from_one_article_heading_to_the_next(tmp_path, suffix):
    """Whether the lines of the articles follow each other in .txt or are a record each."""
    path, titles = tmp_path / f"x{suffix}", ["Rome", "= in mathematics", "1 = 1", "A", "Sea"]
    lines = [" \n", " before \n", " \n", " the first heading \n", *wikitext(*titles)]
    write_corpus(path, lines, separator="")
    found = [re.sub(r"\s+", " ", text) for text in read(path, shutil.copy(path, tmp_path / f"y{suffix}"))]
    # A title that starts with "=" looks like a section, and its text belongs to the article before.
    articles = [["Rome", "= in mathematics"], ["1 = 1"], ["A"], ["Sea"]]
    expected = ["before", "the first heading"] + [" ".join("".join(wikitext(*group)).split()) for group in articles]
    assert found == expected * 2  # the second file starts without headings


def test_headings_of_other_formats_do_not_change_what_a_document_is(tmp_path):
    lines = ["= Title =", "== Title ==", " = = Title = =", "=", " = ", " =  = ", "a = b", " = Title", "x = Title = "]
    assert read(write_corpus(tmp_path / "x.txt", lines)) == [line.strip() for line in lines]
    assert read(write_corpus(tmp_path / "x.jsonl", [" = Title = \nwith text", "a", "b"])) == [
        "= Title = \nwith text", "a", "b"]


def test_too_long_line_of_json_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(corpora, "RECORD", 5000)
    path = write_corpus(tmp_path / "x.jsonl", ["short", "y " * 2000, "z " * 5000])
    with refused("x.jsonl", "record 3"):
        read(path)


def test_characters_that_are_not_utf8_are_replaced_and_counted(tmp_path, tokenizer, capsys):
    path = tmp_path / "x.txt"
    path.write_bytes(b"the king\xff\xfe\n\nold \xe2\x82 river\n\nnew sea")
    tokenise([str(path)], tokenizer, tmp_path / "cache")
    assert "not UTF-8: 3\n" in capsys.readouterr().err
    path.write_bytes("the king \ufffd\n\nold river".encode())  # was in the text already
    tokenise([str(path)], tokenizer, tmp_path / "cache")
    assert "not UTF-8: 1\n" in capsys.readouterr().err
    path.write_bytes("the kíng\n\nold river".encode())
    tokenise([str(path)], tokenizer, tmp_path / "cache")
    assert capsys.readouterr().err == ""


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "the king"}\n')
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf = Title = \n\nthe queen\n\nthe sea\n")
    assert read(tmp_path / "x.jsonl") == ["the king"]
    assert len(read(tmp_path / "x.txt")) == 1  # an article


def test_half_surrogate_pairs_in_json_are_replaced(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "the \\ud83d king"}\n{"text": "the \\ud83d\\ude42 king"}\n')
    assert read(path) == ["the ? king", "the \U0001f642 king"]
    assert len(tokenise([str(path)], tokenizer, tmp_path / "cache").train)


@pytest.mark.parametrize("text", ["!!! ... ???\n\n,,,\n\n;;;", "שלום עולם\n\n\u202eمرحبا بالعالم\n\nשלום"])
def test_punctuation_and_right_to_left_text_are_tokenised(tmp_path, tokenizer, text):
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    tokens = tokenise([str(tmp_path / "x.txt")], tokenizer, tmp_path / "cache")
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in text.split("\n\n")]
    assert tokens.heldout.tolist() == parts[0] and tokens.train.tolist() == parts[1] + parts[2]


def test_demo_corpus_is_found_in_the_cache_without_reading_it_again(tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "demo_documents", lambda: iter(["the king", "old river"]))
        first = tokenise(["demo"], tokenizer, tmp_path)
    monkeypatch.setattr(corpora, "demo_documents", lambda: pytest.fail("read again"))
    assert tokenise(["demo"], tokenizer, tmp_path).key == first.key
    monkeypatch.setattr(corpora.platform, "python_version", lambda: "3.99")
    assert corpora.corpus_key([], True, tokenizer, corpora.TEXT, math.inf) != first.key


def test_demo_corpus_can_be_combined_with_files(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "demo_documents", lambda: iter(["king " * 50] * 3))
    both, alone = (tokenise(names, tokenizer, tmp_path) for names in (["demo", str(corpus)], [str(corpus)]))
    assert len(both.train) + len(both.heldout) == len(alone.train) + len(alone.heldout) + 150 and both.key != alone.key


# ---- Bad input -----------------------------------------------------------------------------------------------


LONG_GZIP = gzip.compress("".join(f"line {i * i}\n\n" for i in range(5000)).encode())
BAD_FILES = {  # name -> (content, words of the error)
    "empty.txt": (b"", "empty"), "blank.txt": (b"\n \n\n", "empty"), "empty.jsonl": (b"", "empty"),
    "empty.txt.gz": (b"", "empty"), "control_characters.txt": (b"\x01\x02\n\n\x7f", "empty"),
    "one_document.txt": (b"the king\nold river\nnew sea", "single document"),
    "one_record.jsonl": (b'{"text": "the king"}\n', "single document"),
    "one_long_document.txt": (b"the king\n" * 10_000, "single document"),
    "one_long_record.jsonl": (b'{"text": "' + b"the king " * 10_000 + b'"}', "single document"),
    "one_article.txt": (b" = King = \n \n the king \n \n the queen \n", "single document"),
    "binary.txt": (bytes(range(256)) * 20, "binary"), "utf16.txt": ("the king\n\nthe queen".encode("utf-16"), "binary"),
    "binary_inside.txt.gz": (gzip.compress(bytes(range(256)) * 20), "binary"),
    "truncated.txt.gz": (LONG_GZIP[: len(LONG_GZIP) // 2], "cannot be read"),
    "no_gzip.txt.gz": (b"the king\n\nthe queen\n", "cannot be read"),
    "damaged.jsonl.gz": (LONG_GZIP[:20] + b"\xff" * 50 + LONG_GZIP[70:], "cannot be read"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"}\n{"text": \n', "record 4"),
    "no_text.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "record 2"), "no_object.jsonl": (b'"text"\n', "record 1"),
    "number.jsonl": (b'{"text": 3}\n', "record 1"), "null.jsonl": (b'{"text": null}', "empty"),
    "list.jsonl": (b'["text"]\n', "record 1"), "deep.jsonl": (b"[" * 100_000, "record 1"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "record 1"),
    "empty.parquet": (b"", "parquet"), "text.parquet": (b"the king", "parquet"),
    "unknown.pdf": (b"the king\n\nthe queen", ".jsonl"), "unknown": (b"the king", ".jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_in_one_line_and_leaves_nothing_in_the_cache(tmp_path, tokenizer, refused, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with refused(words, *([] if words in ("empty", "single document") else [name])):
        tokenise([str(tmp_path / name)], tokenizer, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_parquet_without_usable_text_is_refused(tmp_path, documents, refused):
    path = tmp_path / "x.parquet"
    for columns, words in (({"body": ["a"], "title": ["b"]}, ("record 1", "'text'")),
                           ({"text": [1, 2]}, ("record 1", "'text'")),
                           ({"text": pa.array([b"a\xff", b"b"]).view(pa.string())}, ())):
        parquet.write_table(pa.table(columns), path)
        with refused("x.parquet", *words):
            read(path)
    whole = write_corpus(path, documents).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:10] + b"\xff" * 200 + whole[210:]):
        path.write_bytes(damaged)
        with refused("x.parquet"):
            read(path)


@pytest.mark.parametrize("name", ["nowhere.txt", "no/such/folder", "x" * 400 + ".txt", "\0.txt", ""])
def test_missing_corpus_is_refused(name, refused):
    with refused("no such file or folder"):
        corpora.corpus_files([name])


def test_folder_without_text_files_and_empty_list_of_corpora_are_refused(tmp_path, tokenizer, refused):
    with refused(str(tmp_path), "no such file or folder"):
        corpora.corpus_files([str(tmp_path)])
    with refused("empty"):
        tokenise([], tokenizer, tmp_path / "cache")


def test_cache_that_cannot_be_written_is_reported(tmp_path, corpus, tokenizer, refused):
    (tmp_path / "file").write_text("")
    with refused(str(tmp_path / "file" / "cache")):
        tokenise([str(corpus)], tokenizer, tmp_path / "file" / "cache")


# ---- Held-out documents and the cache ------------------------------------------------------------------------


def day_numbers(tokens, tokenizer) -> set[str]:
    """The numbers of the fixture's documents in an array of tokens. A document starts with "day NUMBER:"."""
    return set(re.findall(r"day ([\d ]+) :", tokenizer.decode([int(i) for i in tokens], skip_special_tokens=False)))


def expected_parts(documents: list[str], tokenizer, limit=1 << 20) -> tuple[list[int], list[int]]:
    """The rule, for documents without any structure: a document is held out if less than a twentieth of the tokens so
    far is, until there are `limit` tokens."""
    train, heldout = [], []
    for text in documents:
        part = heldout if 19 * len(heldout) <= len(train) and len(heldout) < limit else train
        for begin in range(0, len(text), corpora.PIECE):  # a word at the border becomes two
            part += tokenizer.encode(text[begin : begin + corpora.PIECE], add_special_tokens=False).ids
    return train, heldout


def test_a_twentieth_of_the_text_is_held_out_and_no_token_is_lost(tmp_path, corpus, documents, tokenizer):
    tokens = tokenise([str(corpus)], tokenizer, tmp_path)
    assert tokens.train.dtype == np.uint16 and isinstance(tokens.train, np.memmap)
    assert (tokens.train.tolist(), tokens.heldout.tolist()) == expected_parts(documents, tokenizer)
    train, heldout = (day_numbers(part, tokenizer) for part in (tokens.train, tokens.heldout))
    assert 5 <= len(heldout) <= 8 and len(train) + len(heldout) == 120 and not train & heldout
    assert 0 <= len(tokens.heldout) - 0.05 * (len(tokens.train) + len(tokens.heldout)) < 60  # the length of a document


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_all_pieces_of_a_long_record_are_on_the_same_side(tmp_path, documents, tokenizer, monkeypatch, name):
    monkeypatch.setattr(corpora, "PIECE", 4096)
    monkeypatch.setattr(corpora, "TOKENISE_AT_ONCE", 40_000)  # some documents are in several blocks
    long = [text * 100 if i % 5 in (0, 3) else text for i, text in enumerate(documents[:40])]
    path = write_corpus(tmp_path / name, long)
    for limit in (1 << 20, 3000):  # the second is reached in the middle of a document
        monkeypatch.setattr(corpora, "HELDOUT_TOKENS", limit)
        tokens = tokenise([str(path)], tokenizer, tmp_path / "cache")
        assert (tokens.train.tolist(), tokens.heldout.tolist()) == expected_parts(long, tokenizer, limit)


@pytest.mark.parametrize("suffix", corpora.SUFFIXES)
def test_no_article_of_wikitext_is_on_both_sides(tmp_path, tokenizer, suffix):
    articles = [wikitext(f"day {i} :") * (1 + 200 * (i % 7 == 3)) for i in range(41)]  # some are longer than PIECE
    for i in range(3, 41, 7):  # one heading each
        articles[i][1:] = [line for line in articles[i][1:] if line != articles[i][0]]
    lines = [line for article in articles for line in article]
    path = write_corpus(tmp_path / f"x{suffix}", lines, separator="")
    tokens = tokenise([str(path)], tokenizer, tmp_path / "cache")
    train, heldout = (day_numbers(part, tokenizer) for part in (tokens.train, tokens.heldout))
    assert len(train) + len(heldout) == 41 and len(heldout) >= 2 and not train & heldout
    whole = tokenizer.encode("".join(lines), add_special_tokens=False).ids
    assert len(tokens.train) + len(tokens.heldout) == len(whole)


def test_heldout_part_is_limited(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "HELDOUT_TOKENS", 10)
    tokens = tokenise([str(corpus)], tokenizer, tmp_path)
    assert len(day_numbers(tokens.heldout, tokenizer)) == 1 and len(day_numbers(tokens.train, tokenizer)) == 119


def test_corpus_is_read_to_the_end_of_the_block_with_the_limit(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "TOKENISE_AT_ONCE", 2000)
    whole, part = (tokenise([str(corpus)], tokenizer, tmp_path, limit=limit) for limit in (10**9, 1000))
    assert 1000 <= len(part.train) < 2000 < len(whole.train) and part.key != whole.key
    assert np.array_equal(part.train, whole.train[: len(part.train)])
    enough = tokenise([str(corpus)], tokenizer, tmp_path / "other", limit=len(part.train))
    assert len(enough.train) == len(part.train)  # no further block than the one that reaches it
    record = json.loads((tmp_path / part.key / "meta.json").read_text())
    shutil.copytree(tmp_path / part.key, tmp_path / f"third/{part.key}.unfinished")  # interrupted at its very end
    assert len(tokenise([str(corpus)], tokenizer, tmp_path / "third", limit=1000).train) == record["train"]


def test_token_ids_beyond_16_bits_are_stored_in_32(tmp_path):
    words = {**VOCAB, **{f"word{i}": len(VOCAB) + i for i in range(70_000)}}
    path = tmp_path / "x.txt"
    path.write_text("word69999\n\nword69998")
    tokens = tokenise([str(path)], wordpiece_tokenizer(words), tmp_path / "cache")
    assert tokens.train.dtype == np.uint32 and tokens.train.tolist() == [len(VOCAB) + 69_998]


def test_second_call_finds_the_tokens_in_the_cache(tmp_path, corpus, tokenizer, monkeypatch):
    first = tokenise([str(corpus)], tokenizer, tmp_path)
    monkeypatch.setattr(corpora, "write_tokens", lambda *_: pytest.fail("tokenised again"))
    again = tokenise([str(corpus)], tokenizer, tmp_path)
    assert again.key == first.key and np.array_equal(again.train, first.train)
    assert [path.name for path in tmp_path.iterdir()] == [first.key]


def test_a_cache_that_is_cut_short_is_refused(tmp_path, corpus, tokenizer, refused):
    folder = tmp_path / tokenise([str(corpus)], tokenizer, tmp_path).key
    content = (folder / "train.bin").read_bytes()
    for short in (content[:400], b""):
        (folder / "train.bin").write_bytes(short)
        with refused(str(folder), "is damaged: delete it"):
            tokenise([str(corpus)], tokenizer, tmp_path)
    (folder / "meta.json").write_text("{}")
    with refused(str(folder), "is damaged: delete it"):
        tokenise([str(corpus)], tokenizer, tmp_path)


def test_changed_text_and_changed_tokenizer_are_tokenised_again(tmp_path, documents, tokenizer):
    def key(documents, tokenizer):
        return tokenise([str(write_corpus(tmp_path / "x.txt", documents))], tokenizer, tmp_path / "cache").key

    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.BertNormalizer(lowercase=False)
    keys = [key(documents, tokenizer), key(documents[:-1] + ["Day 119: the king"], tokenizer), key(documents, other)]
    assert len(set(keys)) == 3 and key(documents, tokenizer) == keys[0]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_interrupted_tokenisation_is_never_taken_for_a_finished_one(tmp_path, corpus, tokenizer, monkeypatch, error):
    blocks = corpora.blocks

    def interrupted(*args):
        yield next(blocks(*args))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "blocks", interrupted)
        with pytest.raises(InputError if isinstance(error, OSError) else error):
            tokenise([str(corpus)], tokenizer, tmp_path / "cache")
    assert all(path.suffix == ".unfinished" for path in (tmp_path / "cache").iterdir())
    for name in ("cache", "another"):  # continued, and from the beginning
        tokens = tokenise([str(corpus)], tokenizer, tmp_path / name)
        assert len(day_numbers(tokens.train, tokenizer) | day_numbers(tokens.heldout, tokenizer)) == 120


def test_a_document_in_which_tokenisation_is_resumed_stays_on_its_side(tmp_path, documents, tokenizer, monkeypatch):
    monkeypatch.setattr(corpora, "TOKENISE_AT_ONCE", 20_000)
    long = [documents[0] * 300, *documents[1:40]]  # the first is held out, and in several blocks
    path = write_corpus(tmp_path / "x.jsonl", long)
    blocks = corpora.blocks

    def interrupted(*args):
        yield next(blocks(*args))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpora, "blocks", interrupted)
        tokenise([str(path)], tokenizer, tmp_path / "cache")
    tokens = tokenise([str(path)], tokenizer, tmp_path / "cache")
    assert (tokens.train.tolist(), tokens.heldout.tolist()) == expected_parts(long, tokenizer)


# ---- Rows and masks ------------------------------------------------------------------------------------------

S = 32


@pytest.fixture
def rows(tokenizer):
    """41 rows of 30 tokens each, no two rows alike; token ids start after the special ones."""
    text = 5 + np.random.default_rng(0).integers(0, len(VOCAB) - 5, 41 * (S - 2) + 17).astype(np.uint16)
    return MaskedRows(text, S, tokenizer)


def unmasked(batch) -> torch.Tensor:
    """The batch's input_ids (B,S) with the original tokens put back."""
    ids = batch.input_ids.clone()
    ids.view(-1)[batch.positions] = batch.labels
    return ids


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_rows_are_the_running_text_between_cls_and_sep(rows):
    assert len(rows) == 41  # the last 17 tokens do not fill a row
    batch = rows.batch(np.array([0, 7, 40]), seed=1, step=2)
    ids = unmasked(batch)
    assert ids.shape == (3, S) and ids.dtype == torch.int64
    assert (ids[:, 0] == VOCAB["[CLS]"]).all() and (ids[:, -1] == VOCAB["[SEP]"]).all()
    assert ids[1, 1:-1].tolist() == rows.text[7].tolist()
    others = torch.ones(3 * S, dtype=torch.bool)
    others[batch.positions] = False
    assert torch.equal(batch.input_ids.view(-1)[others], ids.view(-1)[others])


def test_rows_of_an_xlmr_tokenizer_have_its_special_tokens(xlmr_checkpoint):
    tokenizer = load_tokenizer(xlmr_checkpoint, 1000)
    batch = MaskedRows(np.full(30, 9), 32, tokenizer, 1.0).batch(np.array([0]), seed=0, step=0)
    ids = batch.input_ids[0].tolist()
    mask = tokenizer.token_to_id("<mask>")
    assert (ids[0], ids[-1]) == (0, 2) and ids.count(mask) > 15 and max(ids) == mask  # the model has 7 ids more


@pytest.mark.parametrize("length, fraction, count", [
    (3, 0.15, 1), (4, 0.15, 1), (8, 0.15, 1), (16, 0.15, 2), (32, 0.15, 4), (128, 0.15, 19), (512, 0.15, 76),
    (128, 0.3, 38), (32, 1.0, 30)])
def test_every_row_has_the_same_number_of_masked_positions_none_of_them_special(tokenizer, length, fraction, count):
    rows = MaskedRows(np.arange(5, 5 + 20 * (length - 2)) % 100 + 5, length, tokenizer, fraction)
    batch = rows.training_batch(seed=0, step=3, batch_size=6)
    assert batch.positions.shape == batch.labels.shape == (6 * count,)
    row, column = batch.positions // length, batch.positions % length
    assert torch.equal(row, torch.arange(6).repeat_interleave(count))
    assert column.min() >= 1 and column.max() <= length - 2
    assert len(set(batch.positions.tolist())) == 6 * count


def test_masked_positions_become_mask_random_and_original_tokens_80_10_10(tokenizer):
    length, count = 128, 400
    text = 5 + np.random.default_rng(0).integers(0, len(VOCAB) - 5, count * (length - 2))
    batch = MaskedRows(text, length, tokenizer).training_batch(seed=0, step=0, batch_size=count)
    tokens, labels = batch.input_ids.view(-1)[batch.positions], batch.labels
    total = len(labels)
    assert total == 19 * count
    masked = tokens == VOCAB["[MASK]"]
    unchanged = tokens == labels
    random = ~masked & ~unchanged
    v = len(VOCAB)  # one random token in v happens to be [MASK], and one the original
    for found, fraction in ((masked, 0.8 + 0.1 / v), (unchanged, 0.1 + 0.1 / v), (random, 0.1 - 0.2 / v)):
        assert abs(found.sum().item() - fraction * total) < 4 * (fraction * (1 - fraction) * total) ** 0.5
    words = torch.bincount(tokens[random], minlength=v)  # uniform over the vocabulary
    assert (words[:-1] > 0).float().mean() > 0.95 and words.max() < 6 * words.float().mean()
    columns = torch.bincount(batch.positions % length, minlength=length)[1:-1]  # and over the row
    fraction = 19 / 126
    assert (columns - fraction * count).abs().max() < 5 * (fraction * (1 - fraction) * count) ** 0.5


def test_batch_depends_only_on_seed_and_step(rows, tokenizer):
    expected = rows.training_batch(seed=5, step=7, batch_size=6)
    for seed, step in ((5, 0), (5, 90), (6, 0), (6, 7)):  # requests in between, of other epochs and seeds
        assert not equal(rows.training_batch(seed, step, 6), expected)
    assert equal(rows.training_batch(5, 7, 6), expected)
    assert equal(MaskedRows(rows.text.ravel(), S, tokenizer).training_batch(5, 7, 6), expected)
    np.random.seed(0)
    torch.manual_seed(0)
    assert equal(rows.training_batch(5, 7, 6), expected)


@pytest.mark.parametrize("length", [16, 17, 18, 19, 32])
def test_part_of_a_batch_equals_that_part_of_the_whole_batch(tokenizer, length):
    rows = MaskedRows(5 + np.arange(203 * (length - 2)) % 120, length, tokenizer)
    for step in (0, 20):  # the batch of step 20 crosses the end of the first epoch of 203 rows
        whole = rows.training_batch(3, step, 10)
        m = len(whole.positions) // 10
        for first, last in ((0, 4), (4, 10), (3, 5), (9, 10)):
            part = rows.training_batch(3, step, 10, first, last)
            assert torch.equal(part.input_ids, whole.input_ids[first:last])
            assert torch.equal(part.labels, whole.labels[first * m : last * m])
            assert torch.equal(part.positions, whole.positions[first * m : last * m] - first * length)


def test_every_epoch_has_every_row_once_in_a_new_order(rows):
    seen = torch.cat([unmasked(rows.training_batch(0, step, 7))[:, 1:-1] for step in range(2 * 41)])  # 14 epochs
    number = {tuple(row): i for i, row in enumerate(rows.text.tolist())}
    order = [number[tuple(row)] for row in seen.tolist()]
    epochs = [tuple(order[i : i + 41]) for i in range(0, len(order), 41)]
    assert len(epochs) == len(set(epochs)) == 14 and all(sorted(epoch) == list(range(41)) for epoch in epochs)
    other_seed = [number[tuple(row)] for row in unmasked(rows.training_batch(1, 0, 41))[:, 1:-1].tolist()]
    assert sorted(other_seed) == list(range(41)) and tuple(other_seed) != epochs[0]


def test_row_is_masked_differently_in_every_step(rows):
    row = np.array([3])
    positions = {tuple(rows.batch(row, seed=0, step=step).positions.tolist()) for step in range(50)}
    assert len(positions) > 45


def test_unmasked_rows_are_the_same_text_without_masks_in_training_cut_into_equal_parts(tokenizer):
    masked, rows = (kind(5 + np.arange(203 * 62) % 120, 64, tokenizer) for kind in (MaskedRows, UnmaskedRows))
    lengths = set()
    for step in range(40):
        batch = rows.training_batch(3, step, 10)
        count, length = batch.input_ids.shape
        parts = count // 10
        lengths.add(length)
        assert length == 64 // parts and batch.positions.shape == batch.labels.shape == (0,)
        assert (batch.input_ids[:, 0] == VOCAB["[CLS]"]).all() and (batch.input_ids[:, -1] == VOCAB["[SEP]"]).all()
        whole = unmasked(masked.training_batch(3, step, 10))[:, 1:-1]  # (10,62)
        assert torch.equal(batch.input_ids[:, 1:-1].reshape(10, -1), whole[:, : parts * (length - 2)])
        part = rows.training_batch(3, step, 10, 4, 7)
        assert torch.equal(part.input_ids, batch.input_ids[4 * parts : 7 * parts])
    assert lengths == {64, 32, 16}
    assert torch.equal(rows.batch(np.array([5]), 0, 0).input_ids[:, 1:-1], torch.from_numpy(rows.text[[5]]))
    for length in (8, 16, 31):  # too short to be cut
        rows = UnmaskedRows(np.arange(203 * 62), length, tokenizer)
        assert {rows.training_batch(0, step, 4).input_ids.shape for step in range(9)} == {(4, length)}


def test_load_rows_returns_the_rows_of_both_parts_and_the_hash_of_the_tokens(tmp_path, corpus, tokenizer):
    train, heldout, key = load_rows([str(corpus)], tokenizer, tmp_path, 16)
    tokens = tokenise([str(corpus)], tokenizer, tmp_path)
    assert key == tokens.key
    for rows, part in ((train, tokens.train), (heldout, tokens.heldout)):
        assert len(rows) == len(part) // 14 and np.array_equal(rows.text.ravel(), part[: 14 * len(rows)])
    assert [len(rows.batch(np.array([0]), 0, 0).labels) for rows in (train, heldout)] == [2, 2]
    for rows in load_rows([str(corpus)], tokenizer, tmp_path, 16, masked=False)[:2]:
        assert len(rows.batch(np.array([0]), 0, 0).labels) == 0


def test_heldout_part_shorter_than_two_rows_is_refused(tmp_path, tokenizer, refused):
    (tmp_path / "x.txt").write_text("the king " * 13 + "\n\n" + "the queen " * 100)
    with refused("held-out part", "16 tokens", "--seq-length"):
        load_rows([str(tmp_path / "x.txt")], tokenizer, tmp_path / "cache", 16)
