"""Rows of token ids, and batches of rows of similar length, for finetune.py. Shape letters as in model.py."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Encoding
from torch import nn

from model import BertConfig
from support.distributed import to_device

TOKENISE_AT_ONCE = 4096  # texts; an Encoding of the tokenizer takes much more memory than its token ids


class Example(NamedTuple):
    """One example of a task, as it stands in the data."""

    texts: tuple[str, ...]  # one or two; of SQuAD, the question and the context
    label: int | float | list[tuple[str, int]]  # class, score, or answers: text, and its first character in the context
    name: str  # in the file of predictions


@dataclasses.dataclass(slots=True)
class Row:
    """[CLS] a [SEP] or [CLS] a [SEP] b [SEP], without padding, or what the tokenizer's template has in place of these.
    SQuAD: a is the question, b a part of its context."""

    ids: np.ndarray  # (S,) token ids
    first_length: int  # tokens of type 0; of SQuAD, those before the context
    label: int | float | tuple[int, int]  # class, score, or first and last token of the answer
    example: Example
    offsets: np.ndarray | None = None  # SQuAD: (tokens of b, 2), the characters start:end of each in the context
    second_type: int = 1  # token type of b and what follows


def tokenise(texts: list, tokenizer, special: bool) -> Iterator[Encoding]:
    """The Encoding of every text or pair of texts, with or without special tokens."""
    for start in range(0, len(texts), TOKENISE_AT_ONCE):
        yield from tokenizer.encode_batch(texts[start : start + TOKENISE_AT_ONCE], add_special_tokens=special)


def training_batches(rows: list[Row], batch_size: int, seed: int, epoch: int) -> list[list[Row]]:
    """Every row once, in batches of similar length, which need little padding; reproducible from (seed, epoch)."""
    generator = np.random.default_rng([seed, epoch])
    lengths = np.array([len(row.ids) for row in rows])
    order = np.argsort(lengths * generator.uniform(0.97, 1.03, len(rows)))  # so that the epochs have different batches
    batches = [[rows[i] for i in order[start : start + batch_size]] for start in range(0, len(rows), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def make_batch(rows: list[Row], config: BertConfig, device) -> list[torch.Tensor]:
    """Padded rows: input_ids, token_type_ids, attention_mask, each (B,S), and the labels, (B,) or (B,2)."""
    ids = [torch.from_numpy(row.ids) for row in rows]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=config.pad_token_id).long()  # (B,S)
    columns = torch.arange(ids.shape[1])
    mask = columns < torch.tensor([[len(row.ids)] for row in rows])  # (B,S)
    types = mask & (columns >= torch.tensor([[row.first_length] for row in rows]))  # (B,S)
    types = types.long() * min(rows[0].second_type, config.type_vocab_size - 1)  # some models have a single type
    labels = torch.tensor([row.label for row in rows])
    return [to_device(tensor, device) for tensor in (ids, types, mask, labels)]
