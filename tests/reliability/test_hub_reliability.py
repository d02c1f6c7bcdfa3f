"""The hub as it can be: unreachable, silent, or answering. Every test runs in a process with a hub of its own."""

import http.server
import socket
import threading
from pathlib import Path

import fake_hub

from support.checkpoint import load_model

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


def test_unreachable_hub_is_reported_quickly_in_one_line(python):
    answer, seconds, errors = find(python, "some-owner/some-bert")
    assert answer.startswith("refused some-owner/some-bert") and "check the name and the network" in answer
    assert seconds < 10 and errors == ""


def test_silent_hub_is_reported_within_ten_seconds(python):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts connections, nobody answers
        answer, seconds, errors = find(python, "some-bert", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert answer.startswith("refused some-bert") and "check the name and the network" in answer
    assert 1 < seconds < 10 and errors == ""


def test_model_is_downloaded_once_and_only_its_needed_files(python, checkpoint):
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()} | {
        "pytorch_model.bin": b"not needed", "README.md": b"not needed"}
    downloaded = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), fake_hub.handler(files, downloaded)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer, *_ = find(python, "owner/bert", endpoint=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert not answer.startswith("refused"), answer
    assert set(downloaded) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                               "vocab.txt", "README.md"}
    assert (Path(answer) / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert load_model(answer).config.hidden_size == 32
    assert find(python, "owner/bert")[0] == answer  # now from the cache: this hub is unreachable
