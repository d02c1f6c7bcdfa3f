"""Train the bundled teacher: a small uncased BERT with its own vocabulary, by masked-LM on open text, on the CPU.

    python teachers/train_teacher.py --corpus wiki.txt.gz books.txt.gz demo --output teachers/small --minutes 60

The budget is time: warm-up and decay follow the clock, so that the run ends on any machine. Rows have 128 tokens in the
first 90 % of the time and 512 after it, as for the original BERT, so that all positions are trained."""

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers.trainers import WordPieceTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import MaskedRows  # noqa: E402
from model import Bert, BertConfig  # noqa: E402
from support.checkpoint import SPECIAL_TOKENS, save_config, save_tokenizer, wordpiece_tokenizer  # noqa: E402
from support.corpus import corpus_files, numbered_pieces, tokenise  # noqa: E402

VOCAB_SIZE, HIDDEN_SIZE, LAYERS, HEADS = 8192, 256, 4, 8
TOKENS_PER_STEP, PEAK_LEARNING_RATE, MASKED_FRACTION = 32 * 128, 2e-3, 0.3  # twice BERT's fraction, as text is short
WINDOW, STD = 5, 0.04  # tokens of a co-occurrence; standard deviation of the initial embeddings


def train_vocabulary(corpora: list[str]):
    """A WordPiece tokenizer, trained on every eighth piece of the corpora."""
    every_eighth = itertools.islice(numbered_pieces(corpus_files(corpora), "demo" in corpora), 0, None, 8)
    tokenizer = wordpiece_tokenizer({})
    tokenizer.train_from_iterator((text for _, text in every_eighth), WordPieceTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL_TOKENS), limit_alphabet=600, show_progress=False))
    return wordpiece_tokenizer(tokenizer.get_vocab())


def initialise(bert: Bert, tokens: np.ndarray):
    """Set what takes longest to learn. Decoder bias: log frequencies. Word embeddings: factors of positive pointwise
    mutual information of tokens at most WINDOW apart (Levy and Goldberg, 2014). Position embeddings: sinusoids (Vaswani
    et al., 2017), so that looking one token back is the same rotation everywhere."""
    v, d, positions = bert.config.vocab_size, bert.config.hidden_size, bert.config.max_position_embeddings
    counts, pairs = np.bincount(tokens, minlength=v) + 1.0, np.zeros(v * v, np.float32)
    for part in np.array_split(tokens.astype(np.int64), max(1, len(tokens) >> 22)):
        for distance in range(1, WINDOW + 1):
            pairs += np.bincount(part[:-distance] * v + part[distance:], minlength=v * v)
    frequency = torch.from_numpy(counts / counts.sum()).float()
    pairs = torch.from_numpy(pairs).view(v, v)
    pairs = pairs + pairs.T
    information = (pairs / pairs.sum() / frequency[:, None] / frequency).clamp_(min=1.0).log_()  # (V,V)
    u, s, _ = torch.svd_lowrank(information, q=d, niter=4)
    words = u * s.sqrt()  # (V,D)
    angles = torch.arange(positions)[:, None] / 10_000 ** (torch.arange(0, d, 2) / d)  # (positions,D/2)
    bert.cls["predictions"].bias.data = frequency.log()
    bert.bert.embeddings.word_embeddings.weight.data = words * (STD / words.std())
    bert.bert.embeddings.position_embeddings.weight.data = torch.cat([angles.sin(), angles.cos()], 1) * 2**0.5 * STD


@torch.autocast("cpu", torch.bfloat16)
def masked_lm_loss(bert: Bert, batch) -> torch.Tensor:
    return F.cross_entropy(bert(batch.input_ids, batch.positions).logits.float(), batch.labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", nargs="+", default=["demo"], help="training text, as for distill.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the teacher and the token cache")
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = train_vocabulary(args.corpus)
    tokens = tokenise(args.corpus, tokenizer, args.output / "cache")
    bert = Bert(BertConfig(tokenizer.get_vocab_size(), HIDDEN_SIZE, LAYERS, HEADS, 4 * HIDDEN_SIZE))
    initialise(bert, tokens.train)
    bert.set_dropout(0)  # one pass over the text or less, so there is nothing to overfit
    groups = [{"params": [p for p in bert.parameters() if p.dim() == dim], "weight_decay": decay}
              for dim, decay in ((2, 0.01), (1, 0.0))]  # the pooler gets no gradient and keeps its initial weights
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    phases = [MaskedRows(tokens.train, length, tokenizer, MASKED_FRACTION) for length in (128, 512)]
    start, step, elapsed = time.time(), 0, 0.0  # elapsed: fraction of the time
    while elapsed < 1:
        rows = phases[elapsed > 0.9]
        loss = masked_lm_loss(bert, rows.training_batch(0, step, TOKENS_PER_STEP // rows.seq_length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min(elapsed / 0.04, (1 - elapsed) / 0.96)
        optimizer.step()
        optimizer.zero_grad()
        step, elapsed = step + 1, (time.time() - start) / (60 * args.minutes)
        if step % 100 == 0:
            print(f"step {step}, {elapsed:.0%} of the time, training loss {loss.item():.3f}", flush=True)
    heldout = MaskedRows(tokens.heldout, 128, tokenizer)
    with torch.no_grad():
        loss = masked_lm_loss(bert, heldout.batch(np.arange(min(256, len(heldout))), seed=0, step=0))
    print(f"step {step}, held-out loss {loss.item():.3f}")
    save_config(bert.config, args.output, "BertForMaskedLM")
    save_tokenizer(tokenizer, args.output, bert.config.max_position_embeddings)
    weights = {name: tensor.half() for name, tensor in bert.state_dict().items()}  # half precision is smaller
    save_file(weights, args.output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
