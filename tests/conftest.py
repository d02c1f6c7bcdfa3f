"""Fixtures of several test files: a small vocabulary, a small text, a small BERT, and checks for one-line errors."""

import contextlib
import json
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
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors  # noqa: E402

from model import Bert, BertConfig  # noqa: E402
from support.checkpoint import SPECIAL_TOKENS, save_model, save_tokenizer, wordpiece_tokenizer  # noqa: E402
from support.errors import InputError  # noqa: E402

torch.set_num_threads(1)  # the models of the tests are too small for more

WORDS = re.findall(r"\w+", """
the a of and in is was to for on with as by it that river mountain city old new small large bridge king queen book water
fire stone tree house road light night day year time people war peace music art ship sea""")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-"
VOCAB = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *WORDS, *(c for c in LETTERS if c not in WORDS),
                                           *(f"##{c}" for c in LETTERS[:36])])}


def pytest_addoption(parser):
    parser.addoption("--reliability", action="store_true",
                     help="Run tests/reliability/ too: slow or destructive tests, such as kills and fault injection.")


def pytest_ignore_collect(collection_path, config):
    if collection_path.name == "reliability" and not config.getoption("--reliability"):
        return True
    return None  # undecided


def sentences(seed: int, count: int) -> list[str]:
    """Made-up sentences of words in the vocabulary, the same for the same seed."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of real text and real models beside the project. Tests that need it are skipped if it is missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared, with real text and a real teacher, does not exist")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """An uncased WordPiece tokenizer of about 130 entries."""
    return wordpiece_tokenizer(VOCAB)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """120 documents of a few sentences. Each starts with its number."""
    return [f"day {i}: " + " ".join(sentences(i, 3 + i % 5)) for i in range(120)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, documents) -> Path:
    """The documents as one text file."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A standard model folder: a random BERT of 2 layers and hidden size 32, with pooler, masked-LM head, tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    bert = Bert(BertConfig(
        vocab_size=len(VOCAB), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2))
    save_model(bert, folder)
    save_tokenizer(tokenizer, folder, 64)
    return folder


@pytest.fixture(scope="session")
def xlmr_checkpoint(tmp_path_factory) -> Path:
    """A BERT with an XLM-R tokenizer, as multilingual-e5-small has it: Unigram, "<s> a </s> </s> b </s>", and fewer
    entries than the model."""
    folder = tmp_path_factory.mktemp("xlmr")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS if len(word) > 1), "▁", *LETTERS]
    tokenizer = Tokenizer(models.Unigram([(piece, -i / 10) for i, piece in enumerate(pieces)] + [("<mask>", 0.0)], 3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*pieces[:4], AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
             "pad_token": "<pad>", "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"} | names))
    torch.manual_seed(0)
    save_model(Bert(BertConfig(
        vocab_size=tokenizer.get_vocab_size() + 7, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64)), folder)
    return folder


@pytest.fixture
def refused():
    """`with refused("words", ...)`: the block raises InputError with a one-line message that contains all of them."""

    @contextlib.contextmanager
    def expect(*words: str):
        with pytest.raises(InputError) as caught:
            yield caught
        message = str(caught.value)
        assert "\n" not in message and message.strip()
        for word in words:
            assert word in message

    return expect


@pytest.fixture
def python(tmp_path):
    """Runs code in a new Python process, which imports from the project and has a hub cache and a hub address of its
    own."""

    def run(code: str, endpoint: str = "http://127.0.0.1:1") -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        environment |= {"HF_HOME": str(tmp_path / "hub_home"), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def hub_snapshot(tmp_path):
    """Creates the empty snapshot folder of a hub repository in the hub cache of `python`."""

    def make(kind: str, name: str) -> Path:
        repository = tmp_path / "hub_home" / "hub" / f"{kind}s--{name.replace('/', '--')}"
        revision = "0123456789abcdef0123456789abcdef01234567"
        (repository / "snapshots" / revision).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        return repository / "snapshots" / revision

    return make
