"""The hub as it can be: unreachable, silent, or answering. Every test runs in a process with a hub of its own."""

import contextlib
import http.server
import socket
import threading
from pathlib import Path

import fake_hub
from test_data import write_corpus

from support.checkpoint import load_model, save_tokenizer

FIND = """
import time
from support.errors import InputError
from support.hub import find_model
start = time.monotonic()
try:
    print(find_model(NAME))
except InputError as error:
    print("refused", error)
print(time.monotonic() - start)
"""


def find(python, name, **options):
    """What find_model returns for a name, or "refused ..."; the seconds that took; and everything on stderr."""
    result = python(f"NAME = {name!r}\n{FIND}", **options)
    assert result.returncode == 0, result.stderr
    answer, seconds = result.stdout.splitlines()
    return answer, float(seconds), result.stderr


@contextlib.contextmanager
def hub(files: dict[str, bytes], downloaded: list[str]):
    """The address of a fake hub with these files."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), fake_hub.handler(files, downloaded)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_unreachable_hub_is_reported_quickly_in_one_line(python):
    answer, seconds, errors = find(python, "some-owner/some-bert")
    assert answer.startswith("refused model some-owner/some-bert") and "check the name and the network" in answer
    assert seconds < 10 and errors == ""


def test_silent_hub_is_reported_within_ten_seconds(python):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts connections, nobody answers
        answer, seconds, errors = find(python, "some-bert", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert answer.startswith("refused model some-bert") and "check the name and the network" in answer
    assert 1 < seconds < 10 and errors == ""


def test_model_is_downloaded_once_and_only_its_needed_files(python, checkpoint):
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()} | {
        "pytorch_model.bin": b"not needed", "README.md": b"not needed"}
    downloaded = []
    with hub(files, downloaded) as endpoint:
        answer, *_ = find(python, "owner/bert", endpoint=endpoint)
    assert not answer.startswith("refused"), answer
    assert set(downloaded) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                               "vocab.txt", "README.md"}
    assert (Path(answer) / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert load_model(answer).config.hidden_size == 32
    assert find(python, "owner/bert")[0] == answer  # now from the cache: this hub is unreachable
    tree = Path(answer).parents[1] / "trees" / f"{Path(answer).name}.json"
    for absent in ([], [tree]):  # as another program leaves them
        for path in (Path(answer) / "tokenizer_config.json", *absent):
            path.unlink()
        assert find(python, "owner/bert")[0] == answer
        with hub(files, []) as endpoint:
            assert find(python, "owner/bert", endpoint=endpoint)[0] == answer
        assert (Path(answer) / "tokenizer_config.json").is_file()


TOKENISE = """
import sys
from support import corpus
from support.checkpoint import load_tokenizer
from support.errors import InputError
corpus.TOKENISE_AT_ONCE = 1000
try:
    tokens = corpus.tokenise(["hub:owner/texts:sample-10BT"], load_tokenizer(FOLDER, 1000), CACHE, limit=LIMIT)
    print(len(tokens.train), tokens.key)
except InputError as error:
    print("refused", error)
"""


def test_files_of_a_data_set_are_downloaded_one_by_one_until_there_are_enough_tokens(
        python, tokenizer, documents, tmp_path):
    folder, downloaded, files = tmp_path / "files", [], {"README.md": b"", "data/CC/train-00000-of-00001.parquet": b""}
    folder.mkdir()
    save_tokenizer(tokenizer, folder, 64)
    names = [f"sample/10BT/000_0000{i}.parquet" for i in range(4)]
    for i, name in enumerate(names):
        files[name] = write_corpus(folder / "x.parquet", documents[30 * i : 30 * i + 30]).read_bytes()

    def tokenise(limit, cache="cache", **options) -> str:
        downloaded.clear()
        given = f"FOLDER, CACHE, LIMIT = {str(folder)!r}, {str(tmp_path / cache)!r}, {limit}\n"
        result = python(given + TOKENISE, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    one_file = 30 * 40  # tokens, or somewhat more
    with hub(files, downloaded) as endpoint:
        few = tokenise(200, endpoint=endpoint)
        assert set(downloaded) == {names[0]} and 200 <= int(few.split()[0]) < one_file
        more = tokenise(2 * one_file, endpoint=endpoint)
        assert set(downloaded) == {names[1]} and int(more.split()[0]) >= 2 * one_file
        assert tokenise(200, endpoint=endpoint) == few and not downloaded
    # From here on this hub is unreachable.
    for cache in ("cache", "another"):
        assert tokenise(200, cache) == few and tokenise(2 * one_file, cache) == more
    refused = tokenise(10**9)
    assert refused.startswith("refused") and f"did not deliver {names[2]}" in refused and "rerun" in refused
    assert [path.suffix for path in (tmp_path / "cache").iterdir()].count(".unfinished") == 1
    with hub(files, downloaded) as endpoint:  # continues
        whole = tokenise(10**9, endpoint=endpoint)
        assert set(downloaded) == set(names[2:])
        assert tokenise("float('inf')", endpoint=endpoint).split()[0] == whole.split()[0]
    assert tokenise(10**9, "another") == whole
