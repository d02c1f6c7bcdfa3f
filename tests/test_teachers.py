"""The bundled teacher, and the script that trained it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model

TEACHERS = Path(__file__).resolve().parent.parent / "teachers"


def test_the_bundled_teacher_is_small_and_predicts_better_than_word_frequencies(tmp_path):
    folder = TEACHERS / "small"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    bert = model.load_model(folder).eval()
    tokenizer = data.load_tokenizer(folder, bert.config.vocab_size)
    tokens = data.tokenise(["demo"], tokenizer, tmp_path)
    rows = data.Rows(tokens.heldout, 128, tokenizer)
    batch = rows.batch(np.arange(min(64, len(rows))), seed=0, step=0)
    with torch.no_grad():
        loss = F.cross_entropy(bert(batch.input_ids, batch.positions).logits, batch.labels)
    counts = torch.from_numpy(np.bincount(tokens.train, minlength=bert.config.vocab_size)) + 1.0
    by_frequency = -(counts / counts.sum()).log()[batch.labels].mean()
    assert loss < by_frequency - 0.2


def test_the_bundled_teacher_opens_in_transformers():
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    standard, info = AutoModelForMaskedLM.from_pretrained(TEACHERS / "small", output_loading_info=True)
    assert not info["missing_keys"] and standard.config.pad_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(TEACHERS / "small")
    assert tokenizer.convert_tokens_to_ids(list(data.SPECIAL)) == [0, 1, 2, 3, 4]
    text = "Distillation, naïvely: [MASK] ☃"
    ours = data.load_tokenizer(TEACHERS / "small", standard.config.vocab_size).encode(text).ids
    assert tokenizer(text)["input_ids"] == ours


@pytest.mark.parametrize("start", [False, True])
def test_the_script_trains_a_teacher(tmp_path, monkeypatch, start):
    monkeypatch.syspath_prepend(str(TEACHERS))
    import train_teacher

    generator = np.random.default_rng(0)
    words = [f"w{i:03d}" for i in range(300)]
    documents = [" ".join(words[i] for i in generator.integers(0, 300, 300)) for _ in range(120)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    flags = ["train_teacher.py", "--corpus", str(tmp_path / "text.txt"), "--output", str(tmp_path / "teacher"),
             "--cache-dir", str(tmp_path / "cache"), "--minutes", "0.01", "--vocab-size", "200", "--hidden-size", "16",
             "--layers", "1", "--heads", "2", "--precision", "fp32", "--device", "cpu"]
    for more in ([], ["--start", str(tmp_path / "teacher")])[: 1 + start]:
        monkeypatch.setattr(sys, "argv", flags + more)
        train_teacher.main()
    bert = model.load_model(tmp_path / "teacher")
    tokenizer = data.load_tokenizer(tmp_path / "teacher", bert.config.vocab_size)
    assert [tokenizer.token_to_id(token) for token in data.SPECIAL] == [0, 1, 2, 3, 4]
    assert bert.config.hidden_size == 16 and tokenizer.get_vocab_size() == bert.config.vocab_size <= 200
    history = json.loads((tmp_path / "teacher" / "training.json").read_text())
    assert history["finished"] and history["evaluations"][-1]["mlm_loss"] < np.log(bert.config.vocab_size) + 0.5
    assert (tmp_path / "teacher" / "vocab.txt").read_text().startswith("[PAD]\n[UNK]\n")
