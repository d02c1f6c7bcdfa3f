"""From the texts of a task to rows of token ids, and from rows to batches of similar length for finetune.py.

Shape letters as in model.py; N: rows of a split.
"""

import dataclasses

import numpy as np
import torch

from model import BertConfig
from support.glue import TASKS, Table
from support.squad import Question, Window, make_windows

TOKENISE_AT_ONCE = 4096  # rows; an Encoding of the tokenizer takes much more memory than its token ids
SORTED_TOGETHER = 64  # batches whose rows are sorted by length among themselves


@dataclasses.dataclass
class Examples:
    """N rows of token ids, [CLS] a [SEP] or [CLS] a [SEP] b [SEP], without padding."""

    ids: list[np.ndarray]
    first_length: list[int]  # tokens in "[CLS] a [SEP]"
    labels: np.ndarray | None  # (N,) classes or scores, or (N,2) first and last token of the answer
    source: Table | list[Question]  # what the rows were made from
    windows: list[Window] | None = None  # SQuAD


def encode_table(table: Table, key: str, tokenizer, max_length: int) -> Examples:
    """Rows of at most `max_length` tokens. In a pair that is too long the longer text is truncated first."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    ids, first_length = [], []
    for start in range(0, len(table.texts), TOKENISE_AT_ONCE):
        columns = zip(*table.texts[start : start + TOKENISE_AT_ONCE], strict=True)
        encodings = [tokenizer.encode_batch_fast(list(column), add_special_tokens=False) for column in columns]
        for a, *rest in zip(*encodings, strict=True):
            a, b = a.ids, rest[0].ids if rest else []
            room = max_length - 2 - len(rest)
            if len(a) + len(b) > room:
                a = a[: max(room - len(b), room - room // 2)]
            ids.append(np.array([cls, *a, sep, *([*b[: room - len(a)], sep] if rest else [])], np.int32))
            first_length.append(len(a) + 2)
    dtype = np.float32 if TASKS[key].kind == "regression" else np.int64
    return Examples(ids, first_length, None if table.labels is None else np.array(table.labels, dtype), table)


def encode_questions(questions: list[Question], tokenizer, max_length: int, training: bool) -> Examples:
    """The windows of SQuAD as rows; labels only for training."""
    windows = make_windows(questions, tokenizer, max_length, training)
    labels = np.array([window.answer for window in windows], np.int64).reshape(-1, 2) if training else None
    return Examples([w.ids for w in windows], [w.context_start for w in windows], labels, questions, windows)


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Every row once, in batches of similar length. lengths (N,). Random, and reproducible from (seed, epoch).

    Sorting within SORTED_TOGETHER batches avoids nearly all padding and leaves batches random in all but length.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), SORTED_TOGETHER * batch_size):
        chunk = order[start : start + SORTED_TOGETHER * batch_size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def make_batch(examples: Examples, indices: np.ndarray, config: BertConfig, device):
    """Rows padded to the longest: input_ids, token_type_ids, attention_mask, each (B,S), and the labels.

    The types are None if all are 0, the mask is None if nothing is padded, and the labels if there are none.
    """
    lengths = np.array([len(examples.ids[i]) for i in indices])
    columns = np.arange(lengths.max())
    ids = np.full((len(indices), len(columns)), config.pad_token_id, np.int64)  # (B,S)
    for row, i in zip(ids, indices, strict=True):
        row[: len(examples.ids[i])] = examples.ids[i]
    mask = columns < lengths[:, None]  # (B,S)
    types = (columns >= np.array([examples.first_length[i] for i in indices])[:, None]) & mask  # (B,S)
    arrays = [ids, types.astype(np.int64) if types.any() and config.type_vocab_size > 1 else None,
              None if mask.all() else mask, None if examples.labels is None else examples.labels[indices]]
    return [None if array is None else torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
