"""Train a teacher by masked-LM on open text: the bundled small BERT, or an encoder on which a masked-LM head is put.

    python teachers/train_teacher.py --corpus wiki.txt.gz books.txt.gz demo --output my-teacher --minutes 60
    python teachers/train_teacher.py --encoder sentence-transformers/all-MiniLM-L6-v2 --learning-rate 5e-4 \\
        --corpus hub:wikimedia/wikipedia:20231101.en --corpus-tokens 50_000_000 --output minilm-lm --minutes 120

The budget is time: warm-up and decay follow the clock, so that the run ends on any machine. Rows have 128 tokens in the
first 90 % of the time and 512 after it, as for the original BERT, so that all positions are trained."""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers.trainers import WordPieceTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import MaskedRows  # noqa: E402
from distill import make_optimizer  # noqa: E402
from model import Bert, BertConfig  # noqa: E402
from support import checkpoint  # noqa: E402
from support.corpus import corpus_files, numbered_pieces, tokenise  # noqa: E402
from support.distributed import autocast, find_device, resolve_precision  # noqa: E402
from support.errors import InputError, run_program  # noqa: E402
from support.flags import COUNT, NONNEGATIVE, number  # noqa: E402
from support.hub import find_model  # noqa: E402

VOCAB_SIZE, HIDDEN_SIZE, LAYERS, HEADS = 8192, 256, 4, 8
TOKENS_PER_STEP, MASKED_FRACTION = 32 * 128, 0.3  # twice BERT's fraction, because there is little text
VOCABULARY_PIECES = 200_000  # at the start of the corpus; every eighth of them trains the vocabulary
WINDOW, STD = 5, 0.04  # tokens of a co-occurrence; standard deviation of the initial embeddings


def train_vocabulary(corpora: list[str]):
    """A WordPiece tokenizer, trained on every eighth of the first VOCABULARY_PIECES pieces of the corpora."""
    pieces = numbered_pieces(corpus_files(corpora), "demo" in corpora)
    every_eighth = itertools.islice(pieces, 0, VOCABULARY_PIECES, 8)
    tokenizer = checkpoint.wordpiece_tokenizer({})
    tokenizer.train_from_iterator((text for _, text in every_eighth), WordPieceTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(checkpoint.SPECIAL_TOKENS), limit_alphabet=600, show_progress=False))
    return checkpoint.wordpiece_tokenizer(tokenizer.get_vocab())


def frequencies(tokens: np.ndarray, vocab_size: int) -> torch.Tensor:
    """(V,), of every token with one occurrence added."""
    counts = np.bincount(tokens, minlength=vocab_size) + 1.0
    return torch.from_numpy(counts / counts.sum()).float()


def initialise(bert: Bert, tokens: np.ndarray):
    """Set what takes longest to learn. Decoder bias: log frequencies. Word embeddings: factors of positive pointwise
    mutual information of tokens at most WINDOW apart (Levy and Goldberg, 2014). Position embeddings: sinusoids (Vaswani
    et al., 2017), so that looking one token back is the same rotation everywhere."""
    v, d, positions = bert.config.vocab_size, bert.config.hidden_size, bert.config.max_position_embeddings
    pairs = np.zeros(v * v, np.float32)
    for part in np.array_split(tokens.astype(np.int64), max(1, len(tokens) >> 22)):
        for distance in range(1, WINDOW + 1):
            pairs += np.bincount(part[:-distance] * v + part[distance:], minlength=v * v)
    frequency = frequencies(tokens, v)
    pairs = torch.from_numpy(pairs).view(v, v)
    pairs = pairs + pairs.T
    information = (pairs / pairs.sum() / frequency[:, None] / frequency).clamp_(min=1.0).log_()  # (V,V)
    u, s, _ = torch.svd_lowrank(information, q=d, niter=4)
    words = u * s.sqrt()  # (V,D)
    angles = torch.arange(positions)[:, None] / 10_000 ** (torch.arange(0, d, 2) / d)  # (positions,D/2)
    bert.cls["predictions"].bias.data = frequency.log()
    bert.bert.embeddings.word_embeddings.weight.data = words * (STD / words.std())
    bert.bert.embeddings.position_embeddings.weight.data = torch.cat([angles.sin(), angles.cos()], 1) * 2**0.5 * STD


def initial_model(args: argparse.Namespace):
    """A new BERT with its own vocabulary, or the BERT --encoder with a masked-LM head, which is new if it had none; its
    tokenizer, and the corpus as tokens."""
    if args.encoder:
        folder = find_model(args.encoder)
        bert = checkpoint.load_model(folder)
        tokenizer = checkpoint.load_tokenizer(folder, bert.config.vocab_size)
    else:
        tokenizer = train_vocabulary(args.corpus)
        bert = Bert(BertConfig(tokenizer.get_vocab_size(), HIDDEN_SIZE, LAYERS, HEADS, 4 * HIDDEN_SIZE))
        if bert.config.vocab_size < HIDDEN_SIZE:
            raise InputError(f"the corpus has only {bert.config.vocab_size} different pieces of words: use more text")
    tokens = tokenise(args.corpus, tokenizer, args.output / "cache", limit=args.corpus_tokens)
    if not args.encoder:
        initialise(bert, tokens.train)
    elif bert.cls is None:
        bert.cls = Bert(bert.config, pooler=False).cls
        bert.cls["predictions"].bias.data = frequencies(tokens.train, bert.config.vocab_size).log()
    return bert, tokenizer, tokens


def masked_lm_loss(bert: Bert, batch, precision: str) -> torch.Tensor:
    batch = batch.to(bert.cls["predictions"].bias.device)
    with autocast(batch.input_ids.device, precision == "bf16"):
        logits = bert(batch.input_ids, batch.positions).logits
    return F.cross_entropy(logits.float(), batch.labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", help="Folder or hub name of a BERT to train further; it gets a masked-LM head "
                        "if it has none. Default: a new, small BERT with its own vocabulary.")
    parser.add_argument("--corpus", nargs="+", default=["demo"], help="Training text, as for distill.py. [demo]")
    parser.add_argument("--corpus-tokens", type=COUNT, default=math.inf, help="Stop reading the corpus after this many "
                        "training tokens, as in distill.py. Default: the whole corpus.")
    parser.add_argument("--learning-rate", type=NONNEGATIVE, default=2e-3, help="Peak learning rate. [%(default)s]")
    parser.add_argument("--minutes", type=number(float, 1e-3, 1e6), default=60,
                        help="Training time in minutes. [%(default)s]")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the teacher and the token cache.")
    args = parser.parse_args()
    if (args.output / "config.json").exists():
        raise InputError(f"--output {args.output} holds a model: choose another folder")
    torch.manual_seed(0)
    device = find_device("auto")
    precision = resolve_precision("auto", device)
    bert, tokenizer, tokens = initial_model(args)
    bert.to(device).set_dropout(0)  # the text is seen about once, so there is nothing to overfit
    # The pooler gets no gradient and keeps its initial weights
    optimizer = make_optimizer(bert, weight_decay=0.01, betas=(0.9, 0.98))
    lengths = [min(length, bert.config.max_position_embeddings) for length in (128, 512)]
    phases = [MaskedRows(tokens.train, length, tokenizer, MASKED_FRACTION) for length in lengths]
    heldout = MaskedRows(tokens.heldout, lengths[0], tokenizer)
    if not len(phases[1]) or not len(heldout):
        raise InputError(f"the corpus needs at least {lengths[1]} training tokens and {lengths[0]} held-out tokens")
    start, step, elapsed = time.time(), 0, 0.0  # elapsed: fraction of the time
    while elapsed < 1:
        rows = phases[elapsed > 0.9]
        loss = masked_lm_loss(bert, rows.training_batch(0, step, TOKENS_PER_STEP // rows.seq_length), precision)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(elapsed / 0.04, (1 - elapsed) / 0.96)
        optimizer.step()
        optimizer.zero_grad()
        step, elapsed = step + 1, (time.time() - start) / (60 * args.minutes)
        if step % 100 == 0:
            print(f"step {step}, {elapsed:.0%} of the time, training loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        loss = masked_lm_loss(bert, heldout.batch(np.arange(min(256, len(heldout))), seed=0, step=0), precision)
    if not loss.isfinite():
        raise InputError("the held-out loss is not finite; try a smaller --learning-rate")
    print(f"{step} steps of {TOKENS_PER_STEP} tokens on {device} in {precision}, held-out loss {loss.item():.3f}")
    checkpoint.save_model(bert, args.output, torch.float16)  # a smaller file
    checkpoint.save_tokenizer(tokenizer, args.output, bert.config.max_position_embeddings)


if __name__ == "__main__":
    sys.exit(run_program("train_teacher.py", main, resume_hint="start again", memory_hint="use a smaller encoder"))
