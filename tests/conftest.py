"""What several test files share: a small vocabulary, a small text, a small BERT, and a way to expect a refusal."""

import contextlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network; set before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402

WORDS = re.findall(r"\w+", """
the a of and in is was to for on with as by it that river mountain city old new small large bridge king queen book water
fire stone tree house road light night day year time people war peace music art ship sea""")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"
VOCAB = {word: i for i, word in enumerate([*data.SPECIAL, *WORDS, *(c for c in LETTERS if c not in WORDS),
                                           *(f"##{c}" for c in LETTERS[:36])])}


def sentences(seed: int, count: int) -> list[str]:
    """Made-up sentences of small words, the same for the same seed."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text and models beside the project; the test is skipped where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared, real text and a real teacher, is not here")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """An uncased WordPiece tokenizer of about 130 entries."""
    return data.wordpiece_tokenizer(VOCAB)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """120 documents of a few sentences, each with a number of its own."""
    return [f"day {i}: " + " ".join(sentences(i, 3 + i % 5)) for i in range(120)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, documents) -> Path:
    """The documents as one text file."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A standard checkpoint folder: a random BERT of 2 layers x 32, with pooler, masked-LM head and tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    bert = model.Bert(model.BertConfig(
        vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2))
    model.save_model(bert, folder)
    data.save_tokenizer(tokenizer, folder, 64)
    return folder


@pytest.fixture
def refused():
    """`with refused("words", ...)`: what is inside raises InputError, one line that holds all these words."""

    @contextlib.contextmanager
    def expect(*words: str):
        with pytest.raises(model.InputError) as caught:
            yield caught
        message = str(caught.value)
        assert "\n" not in message and message.strip()
        for word in words:
            assert word in message

    return expect


@pytest.fixture
def python(tmp_path):
    """Runs code in a Python of its own, at the project's root, with a hub folder and a hub address of its own."""

    def run(code: str, endpoint: str = "http://127.0.0.1:1") -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        environment |= {"HF_HOME": str(tmp_path / "hub_home"), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def hub_snapshot(tmp_path):
    """Makes an empty snapshot folder of a hub repository in the cache that `python` runs with."""

    def make(kind: str, name: str) -> Path:
        repository = tmp_path / "hub_home" / "hub" / f"{kind}s--{name.replace('/', '--')}"
        revision = "0123456789abcdef0123456789abcdef01234567"
        (repository / "snapshots" / revision).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        return repository / "snapshots" / revision

    return make
