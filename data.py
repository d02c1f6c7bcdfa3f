"""Documents -> tokens -> masked rows.

    train, heldout, corpus_hash = load_rows(["my/text.txt"], tokenizer, cache_dir, seq_length=128)
    batch = train.training_batch(seed=0, step=0, batch_size=64)

Tokenised once. support/corpus.py reads the documents and writes two flat arrays of token ids into a cache, one for
training and one for evaluation, which share no document.

Packed. A row is exactly S tokens: [CLS], S-2 tokens cut from the running text, [SEP]. There is no padding, so a row can
cross the border between two documents.

Masked (Devlin et al., 2019, section 3.1). 15 % of a row's tokens are to be predicted. Every row has the same
number of them, so that the tensors of all batches have the same shape. The masks are drawn again in every step, from
(seed, step, row) alone, so that any step can be repeated by itself.

Without a masked-LM head the rows are not masked, and their length varies by step in training.

Shape letters: B batch, S sequence, M masked positions in the batch; m = M/B masked positions in a row.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from support.corpus import TEXT, tokenise
from support.distributed import to_device
from support.errors import InputError

SHORTEST = 16  # tokens of an unmasked row in training
MASKED_FRACTION = 0.15  # of the tokens of a row; 80 % of these become [MASK], 10 % a random token, 10 % stay


@dataclass
class Batch:
    """Rows, masked or not. `positions` index the flattened (B*S) batch, row by row."""

    input_ids: torch.Tensor  # (B,S) int64
    positions: torch.Tensor  # (M,) int64
    labels: torch.Tensor  # (M,) int64, the original tokens at `positions`

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(to_device(tensor, device) for tensor in vars(self).values()))


class MaskedRows:
    """A flat array of token ids as rows of S tokens, masked on demand. len() is the number of rows in one pass."""

    def __init__(self, tokens: np.ndarray, seq_length: int, tokenizer: Tokenizer, masked_fraction=MASKED_FRACTION):
        self.count = len(tokens) // (seq_length - 2)  # tokens that do not fill a row are left out
        self.text = tokens[: self.count * (seq_length - 2)].reshape(self.count, seq_length - 2)  # (count,S-2), a view
        self.seq_length = seq_length
        self.masked = max(1, round(masked_fraction * (seq_length - 2)))  # m
        self.cls, self.sep, self.mask = (tokenizer.token_to_id(tokenizer.special[t]) for t in ("cls", "sep", "mask"))
        self.vocab_size = tokenizer.get_vocab_size()
        self.shuffled, self.order = None, None  # (seed, epoch) and the order of the rows in that epoch

    def __len__(self):
        return self.count

    def training_batch(self, seed: int, step: int, batch_size: int, first: int = 0, last: int | None = None) -> Batch:
        """Rows first..last (exclusive; default all) of the batch of `step`. Every epoch has a new order of the rows."""
        numbers = np.arange(first, batch_size if last is None else last) + step * batch_size  # (B,) since the start
        indices = np.empty_like(numbers)  # (B,) of the rows in self.text
        for epoch in np.unique(numbers // self.count):
            if self.shuffled != (seed, epoch):
                self.shuffled, self.order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(self.count)
            here = numbers // self.count == epoch  # (B,) bool: a batch can cross the end of an epoch
            indices[here] = self.order[numbers[here] % self.count]
        return self.batch(indices, seed, step, first)

    def batch(self, indices: np.ndarray, seed: int, step: int, first: int = 0) -> Batch:
        """The rows `indices` (B,), masked. They are rows first, first+1, ... of the batch of (seed, step): their random
        numbers are the same whether the batch is computed at once or in parts."""
        b, s, m = len(indices), self.seq_length, self.masked
        ids = np.empty((b, s), np.int64)
        ids[:, 0], ids[:, 1:-1], ids[:, -1] = self.cls, self.text[indices], self.sep

        blocks_per_row = -(-(s + 2 * m) // 4)  # Philox can jump to `first`, in blocks of four numbers
        generator = np.random.Philox(key=[seed, step]).advance(first * blocks_per_row)
        uniform = np.random.Generator(generator).random((b, 4 * blocks_per_row))
        uniform = uniform[:, 1 : s - 1 + 2 * m]  # (B,S-2+2m); skipping the first keeps old runs repeatable
        chosen, action, word = np.split(uniform, [s - 2, s - 2 + m], axis=1)  # (B,S-2), (B,m), (B,m)

        # The m smallest are masked: (B,m), never [CLS] or [SEP].
        columns = 1 + np.sort(np.argpartition(chosen, m - 1, axis=1)[:, :m], axis=1)
        positions = (columns + np.arange(b)[:, None] * s).ravel()  # (B,m) -> (M,)
        labels = ids.ravel()[positions]  # (M,)
        word = (word.ravel() * self.vocab_size).astype(np.int64)  # (B,m) -> (M,), random tokens
        action = action.ravel()  # (B,m) -> (M,)
        ids.ravel()[positions] = np.where(action < 0.8, self.mask, np.where(action < 0.9, word, labels))
        return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels))


class UnmaskedRows(MaskedRows):
    """Rows for a teacher without masked-LM head, which predicts nothing. In training they are short and long, like the
    sentences and paragraphs that such an encoder is used for."""

    def batch(self, indices: np.ndarray, seed: int, step: int, first: int = 0) -> Batch:
        return self.unmasked(self.text[indices])

    def training_batch(self, seed: int, step: int, batch_size: int, first: int = 0, last: int | None = None) -> Batch:
        """Every row of the batch, cut into 1, 2, 4, ... rows of at least SHORTEST tokens. The number is drawn once a
        step, so that nothing is padded."""
        batch = super().training_batch(seed, step, batch_size, first, last)
        choices = max(1, self.seq_length // SHORTEST).bit_length()
        parts = 2 ** np.random.default_rng([seed, step]).integers(choices)
        length = self.seq_length // parts - 2
        return self.unmasked(batch.input_ids[:, 1 : 1 + parts * length].reshape(-1, length).numpy())

    def unmasked(self, text) -> Batch:
        """Text (B,S-2) as rows with nothing to predict."""
        ids = np.pad(text.astype(np.int64), ((0, 0), (1, 1)))  # (B,S)
        ids[:, 0], ids[:, -1] = self.cls, self.sep
        nothing = torch.empty(0, dtype=torch.int64)
        return Batch(torch.from_numpy(ids), positions=nothing, labels=nothing)


def load_rows(corpora: list[str], tokenizer: Tokenizer, cache_dir: Path, seq_length: int, columns=TEXT, limit=math.inf,
              masked: bool = True) -> tuple[MaskedRows, MaskedRows, str]:
    """The training rows and held-out rows of corpora, and a hash of everything that their tokens depend on.

    columns: those of a record that hold its text. limit: training tokens after which the rest is not read. masked: True
    for MaskedRows, False for UnmaskedRows. The corpora are tokenised into `cache_dir`, or found there. Raises
    InputError if a corpus cannot be read or the held-out part is shorter than two rows.
    """
    tokens = tokenise(corpora, tokenizer, cache_dir, columns, limit)
    kind = MaskedRows if masked else UnmaskedRows
    train, heldout = (kind(part, seq_length, tokenizer) for part in (tokens.train, tokens.heldout))
    if len(heldout) < 2:  # one row has no standard error
        raise InputError(f"the held-out part of the corpus is shorter than two rows of {seq_length} tokens: use more "
                         "text or a smaller --seq-length")
    return train, heldout, tokens.key
