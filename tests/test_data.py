"""From text files to masked rows: every format, the split, the cache, damaged input, the statistics of the masks."""

import gzip
import json
import re
import tracemalloc
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
import transformers
from conftest import VOCAB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import data
import model

# ----------------------------------------------------------------------------------------------------- tokenizer

TEXTS = ["The King's bridge, in 1984: [MASK]", "Élan, naïve, Ärger, ÇA, ﬁn, ǅ, İstanbul", "中文 and 日本語です 한국어",
         "tab\there\u00a0non-breaking\u2028line\u200bzero", "שלום עולם مرحبا", "x" * 150 + " unaffable!!! ...", "",
         "don't [SEP] stop", "e\u0301 combined", "emoji 🙂🙃 price €5 ½"]


def with_vocabulary(folder, words, **settings):
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_vocab_txt_splits_as_the_original_tokenizer_does(tmp_path, lowercase, strip_accents, chinese):
    words = [*VOCAB, *"éäêaec中日文本İTKBÉ", *(f"##{c}" for c in "éäêlanrge中文日本語k"), "\u2028", "İ", "\x85"]
    rules = dict(do_lower_case=lowercase, strip_accents=strip_accents, tokenize_chinese_chars=chinese)
    folder = with_vocabulary(tmp_path, words, **rules)
    ours = data.load_tokenizer(folder, len(words))
    original = BertTokenizerLegacy(str(folder / "vocab.txt"), **rules)  # in plain Python, as first published
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS):  # it composes letters first
        assert ours.encode(text, add_special_tokens=False).tokens == original.tokenize(text), text
    data.save_tokenizer(ours, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).ids


def test_the_real_vocabulary(shared, tmp_path):
    words = (shared / "data" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    ours = data.load_tokenizer(with_vocabulary(tmp_path, words), 30522)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert ours.encode("unaffable").tokens == ["[CLS]", "una", "##ffa", "##ble", "[SEP]"]


def test_a_vocabulary_with_a_line_separator_as_a_word_keeps_its_numbers(tmp_path):
    folder = with_vocabulary(tmp_path, [*data.SPECIAL, "\u2028", "\x85", "\x1c", "after"])
    assert data.load_tokenizer(folder, 9).token_to_id("after") == 8


def test_rules_that_are_not_berts_reach_transformers_as_they_are(tokenizer, tmp_path):
    mine = Tokenizer.from_str(tokenizer.to_str())
    mine.normalizer = normalizers.Sequence([normalizers.Replace("k", "q"), normalizers.Lowercase()])
    data.save_tokenizer(mine, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the king")["input_ids"] == mine.encode("the king").ids != tokenizer.encode("the king").ids


def test_token_ids_outside_the_vocabulary(checkpoint, refused):
    assert data.load_tokenizer(checkpoint, len(VOCAB)).get_vocab_size() == len(VOCAB)
    with refused(f"token id {len(VOCAB) - 1} is outside", f"vocabulary of {len(VOCAB) - 1}"):
        data.load_tokenizer(checkpoint, len(VOCAB) - 1)


def test_a_vocabulary_without_special_tokens(tmp_path, refused):
    with refused("vocab.txt", "[CLS], [MASK] not in the vocabulary"):
        data.load_tokenizer(with_vocabulary(tmp_path, ["[PAD]", "[UNK]", "[SEP]", "a"]), 10)


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", b""), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff"), ("vocab.txt", b"\xff\xfe"),
    ("vocab.txt", b"")])
def test_damaged_tokenizers(tmp_path, refused, name, content):
    (tmp_path / name).write_bytes(content)
    with refused(name):
        data.load_tokenizer(tmp_path, 100)


def test_a_folder_without_tokenizer(tmp_path, refused):
    with refused("neither tokenizer.json nor vocab.txt"):
        data.load_tokenizer(tmp_path, 100)


def test_truncation_and_padding_of_a_tokenizer_file_are_off(checkpoint, tmp_path):
    cut = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    cut.enable_truncation(4)
    cut.enable_padding(length=9)
    cut.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.load_tokenizer(tmp_path, 1000)
    assert len(tokenizer.encode("the king the king the king the king", add_special_tokens=False)) == 8
    assert len(tokenizer.encode("king", add_special_tokens=False)) == 1


# ----------------------------------------------------------------------------------------------- files of each kind


def write_corpus(path, documents):
    """The documents in the format that the name asks for."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"id": range(len(documents)), "text": documents}), path, row_group_size=7)
        return path
    if ".jsonl" in path.name:
        content = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    else:
        content = "\n\n".join(documents)
    content = content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*paths) -> list[str]:
    files = data.corpus_files([str(path) for path in paths])
    return [text.strip() for block in data.blocks(files, False, None, False) for text in block if text.strip()]


@pytest.mark.parametrize("suffix", data.SUFFIXES)
def test_every_format_gives_the_same_documents_and_tokens(tmp_path, documents, corpus, tokenizer, suffix):
    path = write_corpus(tmp_path / f"x{suffix}", documents)
    assert read(path) == documents
    expected, got = (data.tokenise([str(p)], tokenizer, tmp_path / "cache") for p in (corpus, path))
    assert np.array_equal(got.train, expected.train) and np.array_equal(got.heldout, expected.heldout)
    assert len(got.train) and got.key != expected.key


def test_a_folder_and_several_corpora_at_once(tmp_path, documents):
    folder = tmp_path / "many" / "deeper"
    folder.mkdir(parents=True)
    parts = [documents[i * 24 : (i + 1) * 24] for i in range(5)]
    for i, suffix in enumerate(data.SUFFIXES):
        write_corpus(folder / f"{i}{suffix}", parts[i])
    (folder / "README.md").write_text("not a corpus")
    assert read(tmp_path / "many") == documents
    assert read(folder / "3.jsonl.gz", folder / "0.txt") == parts[3] + parts[0]


def test_where_documents_end(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffa one\na two\n \t \nb one\r\n\r\nc one\n\n\n\n\nd one".encode())
    assert [re.findall(r"\w+", text) for text in read(path)] == [
        ["a", "one", "a", "two"], ["b", "one"], ["c", "one"], ["d", "one"]]
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\n\\nstill a"}\n\n{"text": ""}\n{"text": "b"}')
    assert read(path) == ["a\n\nstill a", "b"]


def test_parquet_with_nothing_in_some_rows_and_other_kinds_of_strings(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        parquet.write_table(pa.table({"text": pa.array(["a", None, "b", ""]).cast(kind)}), tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet") == ["a", "b"]


def test_a_long_document_comes_in_pieces_with_nothing_lost(tmp_path):
    text = " ".join(str(i) for i in range(20_000))
    for name in ("x.txt", "x.jsonl", "x.parquet"):
        found = read(write_corpus(tmp_path / name, [text, "end"]))
        assert len(found) > 2 and max(map(len, found)) <= data.PIECE
        assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text) + "end"


def test_one_endless_line_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"x " * (10 << 20)))
    tracemalloc.start()
    sizes = [len(text) for text in data.read_documents(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 20 << 20 and max(sizes) <= data.PIECE and peak < 2 << 20


def test_an_endless_line_of_json_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(data, "RECORD", 5000)
    path = write_corpus(tmp_path / "x.jsonl", ["short", "y " * 2000, "z " * 5000])
    with refused("x.jsonl", "line 3"):
        read(path)


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path, tokenizer, capsys):
    path = tmp_path / "x.txt"
    path.write_bytes(b"the king\xff\xfe\n\nold \xe2\x82 river\n\nnew sea")
    tokens = data.tokenise([str(path)], tokenizer, tmp_path / "cache")
    assert tokens.replaced_bytes == 4
    assert "4 bytes were not UTF-8" in capsys.readouterr().err
    path.write_bytes(b"the king\nold river\xff\nnew sea")  # a single document: read twice, counted once
    assert data.tokenise([str(path)], tokenizer, tmp_path / "cache").replaced_bytes == 1
    path.write_bytes("the kíng\n\nold river".encode())
    assert data.tokenise([str(path)], tokenizer, tmp_path / "cache").replaced_bytes == 0
    assert "UTF-8" in capsys.readouterr().err  # of the second; the third has nothing to say
    data.tokenise([str(path)], tokenizer, tmp_path / "cache")
    assert capsys.readouterr().err == ""


def test_half_a_surrogate_pair_in_json_is_text_like_any_other(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "the \\ud83d king"}\n{"text": "the \\ud83d\\ude42 king"}\n')
    assert read(path) == ["the ? king", "the \U0001f642 king"]
    assert len(data.tokenise([str(path)], tokenizer, tmp_path / "cache").train)


# ---------------------------------------------------------------------------------------------------- hub data sets

FILES = """
import data, model
for corpus in CORPORA:
    try:
        print(*data.corpus_files([corpus]))
    except model.InputError as error:
        print("refused", error)
"""


def test_a_data_set_in_the_hubs_cache_needs_no_hub(python, hub_snapshot, documents):
    snapshot = hub_snapshot("dataset", "owner/texts")
    for part, count in (("small", 1), ("small-raw", 2), ("half", 2)):
        (snapshot / part).mkdir()
        for i in range(count):
            write_corpus(snapshot / part / f"train-0000{i}-of-0000{count}.parquet", documents[i::count])
        write_corpus(snapshot / part / "test-00000-of-00001.parquet", ["never"])
    (snapshot / "half" / "train-00001-of-00002.parquet").unlink()  # was not downloaded
    corpora = [f"hub:owner/texts:{part}" for part in ("small", "small-raw", "half")]
    result = python(f"CORPORA = {[*corpora, 'hub:owner/texts', 'hub:owner/others', 'hub:']}\n{FILES}")
    assert result.returncode == 0 and result.stderr == ""
    small, raw, *others = result.stdout.splitlines()
    assert small == str(snapshot / "small" / "train-00000-of-00001.parquet")
    assert raw.split() == [str(snapshot / "small-raw" / f"train-0000{i}-of-00002.parquet") for i in range(2)]
    assert len(others) == 4 and all(line.startswith("refused") for line in others)


def test_several_splits_in_the_hubs_cache_are_each_complete_or_not(python, hub_snapshot):
    """Shards are counted for every split by itself: three splits of one shard each are complete."""
    snapshot = hub_snapshot("dataset", "owner/task")
    for name in ("a/train-00000-of-00001", "a/validation-00000-of-00001", "b/test-00000-of-00002"):
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / f"{name}.parquet").write_bytes(b"rows")
    result = python("""
import model
for part in ("a/", "b/"):
    try:
        print(len(model.hub_files("owner/task", "dataset", lambda names: [n for n in names if n.startswith(part)])[1]))
    except model.InputError as error:
        print("refused")
""")
    assert result.stdout.split() == ["2", "refused"]


def test_the_parts_of_a_data_set_are_told_apart(refused):
    names = ["README.md", "en/train-0.parquet", "en/test-0.parquet", "en-old/train-0.parquet", "en/train.csv"]
    assert data.hub_parquet(names, "en", "hub:x") == ["en/train-0.parquet"]
    with refused("hub:x", "'fr'", "en", "en-old"):
        data.hub_parquet(names, "fr", "hub:x")
    with refused("hub:x", "en", "en-old"):
        data.hub_parquet(names, "", "hub:x")
    assert data.hub_parquet(["data/train-1.parquet", "data/train-0.parquet"], "", "hub:x") == [
        "data/train-0.parquet", "data/train-1.parquet"]
    assert data.hub_parquet(["train.parquet"], "", "hub:x") == ["train.parquet"]
    with refused("hub:x", "none"):
        data.hub_parquet(["x.csv"], "", "hub:x")


# -------------------------------------------------------------------------------------------------------- bad input


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


LONG_GZIP = gzip.compress("".join(f"line {i * i}\n\n" for i in range(5000)).encode())
BAD_FILES = {
    "empty.txt": (b"", "empty"), "blank.txt": (b"\n \n\n", "empty"), "one_line.txt": (b"the king", "single line"),
    "one_record.jsonl": (b'{"text": "the king"}\n', "single line"), "empty.jsonl": (b"", "empty"),
    "empty.txt.gz": (b"", "empty"), "binary.txt": (bytes(range(256)) * 20, "binary"),
    "utf16.txt": ("the king\n\nthe queen".encode("utf-16"), "binary"),
    "binary_inside.txt.gz": (gzip.compress(bytes(range(256)) * 20), "binary"),
    "truncated.txt.gz": (truncated(LONG_GZIP), "cannot be read"),
    "no_gzip.txt.gz": (b"the king\n\nthe queen\n", "cannot be read"),
    "damaged.jsonl.gz": (LONG_GZIP[:20] + b"\xff" * 50 + LONG_GZIP[70:], "cannot be read"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"}\n{"text": \n', "line 4"),
    "no_text.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "line 2"), "no_object.jsonl": (b'"text"\n', "line 1"),
    "number.jsonl": (b'{"text": 3}\n', "line 1"), "null.jsonl": (b'{"text": null}', "line 1"),
    "list.jsonl": (b'["text"]\n', "line 1"), "deep.jsonl": (b"[" * 100_000, "line 1"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "line 1"),
    "empty.parquet": (b"", "parquet"), "text.parquet": (b"the king", "parquet"),
    "unknown.pdf": (b"the king\n\nthe queen", "unknown kind of file"), "unknown": (b"the king", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_line_and_leaves_nothing(tmp_path, tokenizer, refused, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with refused(words, *([] if words in ("empty", "single line") else [name])):
        data.tokenise([str(tmp_path / name)], tokenizer, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_parquet_files_without_usable_text(tmp_path, documents, tokenizer, refused):
    def write(table):
        parquet.write_table(table, tmp_path / "x.parquet")

    write(pa.table({"body": ["a"], "title": ["b"]}))
    with refused("x.parquet", "no column 'text'", "body, title"):
        read(tmp_path / "x.parquet")
    write(pa.table({"text": [1, 2]}))
    with refused("x.parquet", "does not hold text"):
        read(tmp_path / "x.parquet")
    write(pa.table({"text": pa.array([b"a\xff", b"b"]).view(pa.string())}))
    with refused("x.parquet"):
        read(tmp_path / "x.parquet")
    whole = write_corpus(tmp_path / "x.parquet", documents).read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[: len(whole) // 2])
    with refused("x.parquet"):
        read(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(whole[:10] + b"\xff" * 200 + whole[210:])
    with refused("x.parquet"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("corpus", ["nowhere.txt", "no/such/folder", "x" * 400 + ".txt", "\0.txt", ""])
def test_a_corpus_that_is_not_there(corpus, refused):
    with refused("no such file or folder"):
        data.corpus_files([corpus])


def test_a_folder_without_text_and_no_corpus_at_all(tmp_path, tokenizer, refused):
    with refused(str(tmp_path), "in this folder"):
        data.corpus_files([str(tmp_path)])
    with refused("empty"):
        data.tokenise([], tokenizer, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path, corpus, tokenizer, refused):
    (tmp_path / "file").write_text("")
    with refused(str(tmp_path / "file" / "cache")):
        data.tokenise([str(corpus)], tokenizer, tmp_path / "file" / "cache")


ANYTHING = settings(max_examples=25, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


def tokenise_or_refuse(path, tokenizer):
    """Whatever is in the file: arrays of known tokens, or a refusal in one line."""
    try:
        tokens = data.tokenise([str(path)], tokenizer, path.parent / "cache")
    except model.InputError as error:
        assert "\n" not in str(error)
        return
    assert len(tokens.train) and len(tokens.heldout)
    assert max(tokens.train.max(), tokens.heldout.max()) < len(VOCAB)


@ANYTHING
@given(texts=st.lists(st.text(st.characters(exclude_categories=())), max_size=5))
def test_any_text_in_json_is_a_clean_run_or_a_refusal(tmp_path, tokenizer, texts):
    tokenise_or_refuse(write_corpus(tmp_path / "x.jsonl", texts), tokenizer)


@ANYTHING
@given(content=st.binary(max_size=200) | st.text("a \n\r\0.!\u202e\u05d0\ufeff\u2028\x85\x1c").map(str.encode))
def test_any_bytes_are_a_clean_run_or_a_refusal(tmp_path, tokenizer, content):
    for name in ("x.txt", "x.jsonl", "x.txt.gz", "x.parquet"):
        (tmp_path / name).write_bytes(content)
        tokenise_or_refuse(tmp_path / name, tokenizer)


@pytest.mark.parametrize("text", ["!!! ... ???\n\n,,,\n\n;;;", "שלום עולם\n\n\u202eمرحبا بالعالم\n\nשלום"])
def test_odd_but_valid_text(tmp_path, tokenizer, text):
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    tokens = data.tokenise([str(tmp_path / "x.txt")], tokenizer, tmp_path / "cache")
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in text.split("\n\n")]
    assert tokens.heldout.tolist() == parts[0] and tokens.train.tolist() == parts[1] + parts[2]


def test_control_characters_alone_are_no_text(tmp_path, tokenizer, refused):
    (tmp_path / "x.txt").write_text("\x01\x02\n\n\x7f")
    with refused("empty"):
        data.tokenise([str(tmp_path / "x.txt")], tokenizer, tmp_path / "cache")


# ------------------------------------------------------------------------------------------------ split and cache


def numbers(tokens, tokenizer) -> set[str]:
    """Which documents of the fixture are in an array of tokens: each says `day N:` at its start."""
    return set(re.findall(r"day ([\d ]+) :", tokenizer.decode([int(i) for i in tokens], skip_special_tokens=False)))


def test_whole_documents_are_held_out_and_nothing_is_lost(tmp_path, corpus, documents, tokenizer):
    tokens = data.tokenise([str(corpus)], tokenizer, tmp_path)
    assert tokens.train.dtype == np.uint16 and isinstance(tokens.train, np.memmap)
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in documents]
    held = [i for i in range(len(documents)) if i % data.HELDOUT_EVERY == 0]
    assert tokens.heldout.tolist() == sum((encoded[i] for i in held), [])
    assert tokens.train.tolist() == sum((ids for i, ids in enumerate(encoded) if i not in held), [])
    train, heldout = (numbers(part, tokenizer) for part in (tokens.train, tokens.heldout))
    assert len(heldout) == 3 and len(train) == 117 and not train & heldout


def test_the_held_out_part_stops_growing(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "HELDOUT_TOKENS", 10)
    tokens = data.tokenise([str(corpus)], tokenizer, tmp_path)
    assert len(numbers(tokens.heldout, tokenizer)) == 1 and len(numbers(tokens.train, tokenizer)) == 119


def test_a_single_document_is_split_by_lines(tmp_path, tokenizer, capsys):
    path = tmp_path / "x.txt"
    path.write_text("\n".join(f"king {i} queen" for i in range(60)))
    tokens = data.tokenise([str(path)], tokenizer, tmp_path / "cache")
    assert tokenizer.decode(list(tokens.heldout)) == "king 0 queen king 50 queen"
    assert len(tokens.train) + len(tokens.heldout) == len(tokenizer.encode(path.read_text(), add_special_tokens=False))
    assert "every line counts as one" in capsys.readouterr().err


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path, corpus):
    words = {**VOCAB, **{f"word{i}": len(VOCAB) + i for i in range(70_000)}}
    path = tmp_path / "x.txt"
    path.write_text("word69999\n\nword69998")
    tokens = data.tokenise([str(path)], data.wordpiece_tokenizer(words), tmp_path / "cache")
    assert tokens.train.dtype == np.uint32 and tokens.train.tolist() == [len(VOCAB) + 69_998]


def test_the_second_run_finds_the_tokens(tmp_path, corpus, tokenizer, monkeypatch):
    first = data.tokenise([str(corpus)], tokenizer, tmp_path)
    monkeypatch.setattr(data, "write_tokens", lambda *_: pytest.fail("tokenised again"))
    again = data.tokenise([str(corpus)], tokenizer, tmp_path)
    assert again.key == first.key and np.array_equal(again.train, first.train)
    assert [path.name for path in tmp_path.iterdir()] == [first.key]


def test_other_content_and_another_tokenizer_are_tokenised_anew(tmp_path, documents, tokenizer):
    def key(documents, tokenizer):
        return data.tokenise([str(write_corpus(tmp_path / "x.txt", documents))], tokenizer, tmp_path / "cache").key

    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.BertNormalizer(lowercase=False)
    keys = [key(documents, tokenizer), key(documents[:-1] + ["Day 119: the king"], tokenizer), key(documents, other)]
    assert len(set(keys)) == 3 and key(documents, tokenizer) == keys[0]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing_that_is_taken_for_a_result(tmp_path, corpus, tokenizer, monkeypatch, error):
    blocks = data.blocks

    def interrupted(*args):
        yield next(blocks(*args))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(data, "blocks", interrupted)
        with pytest.raises(model.InputError if isinstance(error, OSError) else error):
            data.tokenise([str(corpus)], tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/meta.json"))
    assert len(numbers(data.tokenise([str(corpus)], tokenizer, tmp_path / "cache").train, tokenizer)) == 117


def test_the_demo_corpus_is_english_text_and_found_again_without_reading_it(tmp_path, tokenizer, monkeypatch):
    texts = list(data.demo_documents())
    assert 1_500_000 < sum(map(len, texts)) < 5_000_000 and max(map(len, texts)) <= data.PIECE
    assert any("with statement" in text for text in texts) and len(texts) > 500
    with monkeypatch.context() as patch:
        patch.setattr(data, "demo_documents", lambda: iter(texts[:100]))
        first = data.tokenise(["demo"], tokenizer, tmp_path)
    monkeypatch.setattr(data, "demo_documents", lambda: pytest.fail("read again"))
    assert data.tokenise(["demo"], tokenizer, tmp_path).key == first.key
    monkeypatch.setattr(data.platform, "python_version", lambda: "3.99")
    assert data.corpus_key([], True, tokenizer) != first.key


def test_the_demo_corpus_beside_others(tmp_path, corpus, documents, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "demo_documents", lambda: iter(["king " * 50] * 3))
    tokens = data.tokenise(["demo", str(corpus)], tokenizer, tmp_path)
    alone = data.tokenise([str(corpus)], tokenizer, tmp_path)
    assert len(tokens.train) == len(alone.train) + 150 and tokens.key != alone.key


# --------------------------------------------------------------------------------------------------- rows and masks

S = 32


@pytest.fixture
def rows(tokenizer):
    """41 rows of 30 tokens each, no two rows alike; token ids start after the special ones."""
    text = 5 + np.random.default_rng(0).integers(0, len(VOCAB) - 5, 41 * (S - 2) + 17).astype(np.uint16)
    return data.Rows(text, S, tokenizer)


def unmasked(batch) -> torch.Tensor:
    ids = batch.input_ids.clone()
    ids.view(-1)[batch.positions] = batch.labels
    return ids


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_rows_are_the_running_text_between_cls_and_sep(rows):
    assert len(rows) == 41  # what does not fill a row is left over
    batch = rows.batch(np.array([0, 7, 40]), seed=1, step=2)
    ids = unmasked(batch)
    assert ids.shape == (3, S) and ids.dtype == torch.int64
    assert (ids[:, 0] == VOCAB["[CLS]"]).all() and (ids[:, -1] == VOCAB["[SEP]"]).all()
    assert ids[1, 1:-1].tolist() == rows.text[7].tolist()
    untouched = torch.ones(3 * S, dtype=torch.bool)
    untouched[batch.positions] = False
    assert torch.equal(batch.input_ids.view(-1)[untouched], ids.view(-1)[untouched])


@pytest.mark.parametrize("length, count", [(3, 1), (4, 1), (8, 1), (16, 2), (32, 4), (128, 19), (512, 76)])
def test_every_row_has_the_same_number_of_masked_positions_none_of_them_special(tokenizer, length, count):
    rows = data.Rows(np.arange(5, 5 + 20 * (length - 2)) % 100 + 5, length, tokenizer)
    batch = rows.training_batch(seed=0, step=3, batch_size=6)
    assert batch.positions.shape == batch.labels.shape == (6 * count,)
    row, column = batch.positions // length, batch.positions % length
    assert torch.equal(row, torch.arange(6).repeat_interleave(count))
    assert column.min() >= 1 and column.max() <= length - 2
    assert len(set(batch.positions.tolist())) == 6 * count


def test_shares_of_mask_random_and_kept_tokens(tokenizer):
    length, count = 128, 400
    text = 5 + np.random.default_rng(0).integers(0, len(VOCAB) - 5, count * (length - 2))
    batch = data.Rows(text, length, tokenizer).training_batch(seed=0, step=0, batch_size=count)
    now, before = batch.input_ids.view(-1)[batch.positions], batch.labels
    total = len(before)
    assert total == 19 * count
    masked = now == VOCAB["[MASK]"]
    kept = now == before
    changed = ~masked & ~kept
    v = len(VOCAB)
    for found, share in ((masked, 0.8 + 0.1 / v), (kept, 0.1 + 0.1 / v), (changed, 0.1 - 0.2 / v)):
        assert abs(found.sum().item() - share * total) < 4 * (share * (1 - share) * total) ** 0.5
    words = torch.bincount(now[changed], minlength=v)  # random tokens come from the whole vocabulary alike
    assert (words[:-1] > 0).float().mean() > 0.95 and words.max() < 6 * words.float().mean()
    columns = torch.bincount(batch.positions % length, minlength=length)[1:-1]  # and every position is chosen alike
    share = 19 / 126
    assert (columns - share * count).abs().max() < 5 * (share * (1 - share) * count) ** 0.5


def test_a_batch_depends_on_seed_and_step_alone(rows, tokenizer):
    expected = rows.training_batch(seed=5, step=7, batch_size=6)
    for seed, step in ((5, 0), (5, 90), (6, 0), (6, 7)):  # whatever was asked for in between, another pass or seed
        assert not same(rows.training_batch(seed, step, 6), expected)
    assert same(rows.training_batch(5, 7, 6), expected)
    assert same(data.Rows(rows.text.ravel(), S, tokenizer).training_batch(5, 7, 6), expected)
    other = rows.training_batch(seed=5, step=7, batch_size=6)
    np.random.seed(0)
    torch.manual_seed(0)
    assert same(rows.training_batch(5, 7, 6), other)


@pytest.mark.parametrize("length", [16, 17, 18, 19, 32])
def test_a_slice_of_a_batch_is_that_slice(tokenizer, length):
    rows = data.Rows(5 + np.arange(203 * (length - 2)) % 120, length, tokenizer)
    for step in (0, 20):  # the second batch runs over the end of the first pass over 203 rows
        whole = rows.training_batch(3, step, 10)
        m = len(whole.positions) // 10
        for first, last in ((0, 4), (4, 10), (3, 5), (9, 10)):
            part = rows.training_batch(3, step, 10, first, last)
            assert torch.equal(part.input_ids, whole.input_ids[first:last])
            assert torch.equal(part.labels, whole.labels[first * m : last * m])
            assert torch.equal(part.positions, whole.positions[first * m : last * m] - first * length)


def test_every_row_comes_once_in_a_pass_and_in_another_order_in_the_next(rows):
    seen = torch.cat([unmasked(rows.training_batch(0, step, 7))[:, 1:-1] for step in range(2 * 41)])  # 14 passes
    number = {tuple(row): i for i, row in enumerate(rows.text.tolist())}
    order = [number[tuple(row)] for row in seen.tolist()]
    passes = [tuple(order[i : i + 41]) for i in range(0, len(order), 41)]
    assert len(passes) == 14 and all(sorted(one) == list(range(41)) for one in passes)
    assert len(set(passes)) == 14
    first = [number[tuple(row)] for row in unmasked(rows.training_batch(1, 0, 41))[:, 1:-1].tolist()]
    assert sorted(first) == list(range(41)) and tuple(first) != passes[0]  # and for another seed


def test_a_row_is_masked_anew_in_the_next_pass(rows):
    row = np.array([3])
    positions = {tuple(rows.batch(row, seed=0, step=step).positions.tolist()) for step in range(50)}
    assert len(positions) > 45
