"""Tokenisation of any input and of large input, in bounded memory, interrupted, and by several runs at once."""

import gzip
import threading
import tracemalloc

import pytest
from conftest import VOCAB
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import write_corpus

from support import corpus as corpora
from support.corpus import tokenise
from support.errors import InputError

ANYTHING = settings(max_examples=25, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_tokenised_or_refused(path, tokenizer):
    try:
        tokens = tokenise([str(path)], tokenizer, path.parent / "cache")
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert len(tokens.train) and len(tokens.heldout)
    assert max(tokens.train.max(), tokens.heldout.max()) < len(VOCAB)


@ANYTHING
@given(texts=st.lists(st.text(st.characters(exclude_categories=())), max_size=5))
def test_any_text_in_json_is_tokenised_or_refused_in_one_line(tmp_path, tokenizer, texts):
    assert_tokenised_or_refused(write_corpus(tmp_path / "x.jsonl", texts), tokenizer)


@ANYTHING
@given(content=st.binary(max_size=200) | st.text("a \n\r\0.!\u202e\u05d0\ufeff\u2028\x85\x1c").map(str.encode))
def test_any_bytes_are_tokenised_or_refused_in_one_line(tmp_path, tokenizer, content):
    for name in ("x.txt", "x.jsonl", "x.txt.gz", "x.parquet"):
        (tmp_path / name).write_bytes(content)
        assert_tokenised_or_refused(tmp_path / name, tokenizer)


def test_file_without_line_breaks_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"x " * (10 << 20)))
    tracemalloc.start()
    sizes = [len(text) for _, text in corpora.numbered_pieces([path], demo=False)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 20 << 20 and max(sizes) <= corpora.PIECE and peak < 2 << 20


def test_demo_corpus_is_english_text_of_a_few_megabytes():
    texts = list(corpora.demo_documents())
    assert 1_500_000 < sum(map(len, texts)) < 5_000_000
    assert len(texts) > 500 and any("with statement" in text for text in texts)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


@pytest.mark.parametrize("heading", ["", " = {} = \n\n"], ids=["paragraphs", "articles"])
def test_interrupted_tokenisation_resumes_after_the_last_finished_block(tmp_path, tokenizer, documents, monkeypatch,
                                                                        capsys, heading):
    """After every block once. Documents have several pieces, so that many blocks end inside a document."""
    monkeypatch.setattr(corpora, "TOKENISE_AT_ONCE", 500)
    monkeypatch.setattr(corpora, "PIECE", 60)
    monkeypatch.setattr(corpora, "HELDOUT_TOKENS", 200)  # reached inside a document
    text = "\n\n".join(heading.format(i) + document.replace(". ", ".\n") for i, document in enumerate(documents[:60]))
    (tmp_path / "text.txt").write_bytes(text.encode() + b"\n\nbroken \xff byte\n")
    corpus = [str(tmp_path / "text.txt")]
    uninterrupted = tokenise(corpus, tokenizer, tmp_path / "other")
    real, calls, kills = corpora.np.array, 0, 0  # np.array is called once for every piece

    def killing(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == 12:  # in the second block
            raise Killed
        return real(*arguments, **named)

    tokens = None
    with monkeypatch.context() as patch:
        patch.setattr(corpora.np, "array", killing)
        while tokens is None:
            calls = 0
            try:
                tokens = tokenise(corpus, tokenizer, tmp_path / "cache")
            except Killed:
                kills += 1
    assert kills > 30  # and every attempt got further: finished blocks are not tokenised again
    assert (tokens.train == uninterrupted.train).all() and (tokens.heldout == uninterrupted.heldout).all()
    assert capsys.readouterr().err.count("not UTF-8: 1\n") == 2
    assert {p.name for p in (tmp_path / "cache" / tokens.key).iterdir()} == {"train.bin", "heldout.bin", "meta.json"}


def test_several_runs_can_tokenise_the_same_text_at_once(tmp_path, tokenizer, corpus):
    results = []
    threads = [threading.Thread(target=lambda: results.append(tokenise([str(corpus)], tokenizer, tmp_path / "cache")))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({bytes(tokens.train) for tokens in results}) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [results[0].key]
