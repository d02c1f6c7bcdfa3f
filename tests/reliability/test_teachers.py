"""The bundled teacher, and the script that trained it."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from data import MaskedRows
from support.checkpoint import SPECIAL_TOKENS, load_model, load_tokenizer, save_model, save_tokenizer
from support.corpus import demo_documents

TEACHERS = ROOT / "teachers"


def test_the_bundled_teacher_is_small_and_beats_word_frequencies():
    folder = TEACHERS / "small"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    bert = load_model(folder).eval()
    tokenizer = load_tokenizer(folder, bert.config.vocab_size)
    texts = list(itertools.islice(demo_documents(), 15))
    tokens = np.concatenate([encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)])
    rows = MaskedRows(tokens, 128, tokenizer)
    batch = rows.batch(np.arange(16), seed=0, step=0)
    with torch.no_grad():
        loss = F.cross_entropy(bert(batch.input_ids, batch.positions).logits, batch.labels)
    counts = torch.from_numpy(np.bincount(tokens, minlength=bert.config.vocab_size)) + 1.0
    by_frequency = -(counts / counts.sum()).log()[batch.labels].mean()
    assert loss < by_frequency - 0.2


def test_the_bundled_teacher_loads_in_transformers():
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    theirs, info = AutoModelForMaskedLM.from_pretrained(TEACHERS / "small", output_loading_info=True)
    assert not info["missing_keys"] and theirs.config.pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(TEACHERS / "small")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    text = "Distillation, naïvely: [MASK] ☃"
    ours = load_tokenizer(TEACHERS / "small", theirs.config.vocab_size).encode(text).ids
    assert tokenizer(text)["input_ids"] == ours


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs train_teacher.py for 8 steps by a clock of its own, on 120 documents; further flags are arguments."""
    monkeypatch.syspath_prepend(str(TEACHERS))
    import train_teacher

    for name, value in (("VOCAB_SIZE", 200), ("HIDDEN_SIZE", 16), ("LAYERS", 1), ("HEADS", 2),
                        ("TOKENS_PER_STEP", 512)):
        monkeypatch.setattr(train_teacher, name, value)
    clock = itertools.count()
    monkeypatch.setattr(train_teacher, "time", SimpleNamespace(time=lambda: 0.04 * next(clock)))
    generator = np.random.default_rng(0)
    words = [f"w{i:03d}" for i in range(300)]
    documents = [" ".join(words[i] for i in generator.integers(0, 300, 300)) for _ in range(120)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))

    def run(*flags, output="teacher"):
        monkeypatch.setattr(sys, "argv", ["train_teacher.py", "--corpus", str(tmp_path / "text.txt"), "--minutes",
                                          "0.005", "--output", str(tmp_path / output), *flags])
        train_teacher.main()
        bert = load_model(tmp_path / output)
        return bert, load_tokenizer(tmp_path / output, bert.config.vocab_size)

    return run


def test_the_script_trains_a_teacher_on_a_text(train, tmp_path, capsys):
    bert, tokenizer = train()
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert bert.config.hidden_size == 16 and tokenizer.get_vocab_size() == bert.config.vocab_size <= 200
    loss = float(capsys.readouterr().out.split("held-out loss ")[1])
    assert 0 < loss < np.log(bert.config.vocab_size) + 0.5
    assert (tmp_path / "teacher" / "vocab.txt").read_text().startswith("[PAD]\n[UNK]\n")


def test_the_vocabulary_is_made_from_the_beginning_of_a_corpus(train, monkeypatch):
    """So that few files of a large hub corpus are downloaded for it."""
    import train_teacher

    def pieces(*_):
        for number in range(1000):
            read.append(number)
            yield number, f"w{number}"

    read: list[int] = []
    monkeypatch.setattr(train_teacher, "numbered_pieces", pieces)
    monkeypatch.setattr(train_teacher, "VOCABULARY_PIECES", 80)
    train_teacher.train_vocabulary(["demo"])
    assert 72 < len(read) <= 80


def test_the_script_puts_a_masked_lm_head_onto_an_encoder(train, tmp_path):
    small = load_model(TEACHERS / "small")
    small.cls = None
    positions = small.bert.embeddings.position_embeddings
    small.config.max_position_embeddings, positions.weight.data = 128, positions.weight.data[:128]
    (tmp_path / "encoder").mkdir()
    save_model(small, tmp_path / "encoder")
    save_tokenizer(load_tokenizer(TEACHERS / "small", small.config.vocab_size), tmp_path / "encoder", 512)
    bert, tokenizer = train("--encoder", str(tmp_path / "encoder"), "--learning-rate", "0")
    for name, tensor in small.bert.state_dict().items():  # the bundled teacher is stored in half precision
        assert torch.equal(bert.bert.state_dict()[name], tensor), name
    head = bert.cls["predictions"]
    assert tokenizer.decode([head.bias.argmax().item()]).strip("#").startswith("w")  # of w000, w001, ...
    assert head.bias.exp().sum().item() == pytest.approx(1, abs=0.01)
    trained, _ = train("--encoder", str(tmp_path / "encoder"), output="trained")
    after, before = (model.bert.layers[0].intermediate["dense"].weight for model in (trained, small))
    assert not torch.equal(after, before)


def test_the_script_refuses_a_model_as_output_a_short_text_and_a_loss_that_is_not_finite(train, tmp_path, refused):
    with refused("not finite", "--learning-rate"):
        train("--learning-rate", "1e9", output="nan")
    assert not (tmp_path / "nan" / "config.json").exists()
    train()
    with refused("holds a model"):
        train()
    (tmp_path / "text.txt").write_text("a b\n\nc d")
    with refused("different pieces of words"):
        train(output="short")
    with refused("512 training tokens"):
        train("--encoder", str(TEACHERS / "small"), output="short")


def test_the_script_keeps_the_head_of_a_masked_lm(train):
    bert, _ = train("--encoder", str(TEACHERS / "small"), "--learning-rate", "0")
    expected = load_model(TEACHERS / "small").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bert.state_dict().items())
