"""Train the bundled teacher: a small uncased BERT with a vocabulary of its own, by masked-LM on open text.

    python teachers/train_teacher.py --corpus wiki.txt.gz books.txt.gz demo --output teachers/small --minutes 75

Time, not steps, is the budget: warm-up and decay follow the clock, so the run ends trained whatever the machine. Rows
have 128 tokens for the first 90 % of the time and 512 after it, as BERT's own did, so that every position is learned.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers.trainers import WordPieceTrainer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import model  # noqa: E402

TOKENS_PER_STEP = 32 * 128
PEAK_LEARNING_RATE = 2e-3
MASKED_SHARE = 0.3  # twice BERT's: more to learn from each token when there are few
EVALUATE_ROWS = 256
WINDOW, EMBEDDING_STD = 5, 0.04


def train_vocabulary(corpora: list[str], size: int):
    """A WordPiece vocabulary of `size` entries, learned from every eighth block of the corpora."""
    tokenizer = data.wordpiece_tokenizer({})
    replaced = data.Replacements()
    blocks = data.blocks(data.corpus_files(corpora), "demo" in corpora, None, False)
    texts = (text for i, block in enumerate(blocks) if i % 8 == 0 for text in block)
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=list(data.SPECIAL), limit_alphabet=600,
                               show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    print(f"vocabulary: {tokenizer.get_vocab_size()} entries; {replaced.count} bytes were not UTF-8")
    return data.wordpiece_tokenizer(tokenizer.get_vocab())


def word_vectors(tokens: np.ndarray, vocab_size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where training starts: log frequencies (V,) for the decoder bias, and embeddings (V,D) that factorise the
    positive pointwise mutual information of tokens at most WINDOW apart (Levy and Goldberg, 2014). Counting them takes
    a minute; learning them from random vectors would take most of the hour that there is."""
    counts = np.bincount(tokens, minlength=vocab_size) + 1.0
    pairs = np.zeros(vocab_size**2, np.float32)
    for part in np.array_split(tokens.astype(np.int64), max(1, len(tokens) >> 22)):
        for distance in range(1, WINDOW + 1):
            pairs += np.bincount(part[:-distance] * vocab_size + part[distance:], minlength=vocab_size**2)
    pairs = torch.from_numpy(pairs).view(vocab_size, vocab_size)
    pairs = pairs + pairs.T
    frequency = torch.from_numpy(counts / counts.sum()).float()
    information = (pairs / pairs.sum() / frequency[:, None] / frequency).clamp_(min=1.0).log_()
    u, s, _ = torch.svd_lowrank(information, q=width, niter=4)
    vectors = u * s.sqrt()
    return frequency.log(), vectors * (EMBEDDING_STD / vectors.std())


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Where position embeddings start (positions,D): Vaswani et al. (2017), section 3.5. To look one token back is
    then the same rotation everywhere, learned once and not for every position by itself."""
    angle = torch.arange(positions)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angle.sin(), angle.cos()], 1) * 2**0.5 * EMBEDDING_STD


@torch.no_grad()
def evaluate(bert, rows, device, precision) -> dict:
    """Masked-LM loss and top-1 on the held-out rows with fixed masks."""
    bert.eval()
    loss = correct = count = 0.0
    for first in range(0, min(EVALUATE_ROWS, len(rows)), 32):
        batch = rows.batch(np.arange(first, min(first + 32, len(rows))), seed=0, step=0, first=first)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = bert(batch.input_ids.to(device), batch.positions.to(device)).logits.float()
        labels = batch.labels.to(device)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    bert.train()
    return {"mlm_loss": loss / count, "top1": correct / count}


def save(bert, tokenizer, folder: Path, history: dict):
    """The standard files, the weights in half precision to stay small."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_model(bert, folder)
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    data.save_tokenizer(tokenizer, folder, bert.config.max_position_embeddings)
    (folder / "training.json").write_text(json.dumps(history, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", default=["demo"], help="Text to learn from, as for distill.py.")
    parser.add_argument("--output", type=Path, default=Path("teachers/small"), help="Folder for the teacher.")
    parser.add_argument("--start", type=Path, help="Folder of a BERT to train on, instead of a new one.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of initial weights, row order and masks.")
    parser.add_argument("--minutes", type=float, default=75, help="Training time.")
    parser.add_argument("--vocab-size", type=int, default=8192, help="Entries of the vocabulary.")
    parser.add_argument("--hidden-size", type=int, default=256, help="Width.")
    parser.add_argument("--layers", type=int, default=4, help="Depth.")
    parser.add_argument("--heads", type=int, default=8, help="Attention heads.")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "homotopic-distillation",
                        help="Folder for the tokenised corpus.")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="bf16 autocast or float32.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda.")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if args.start is not None:
        bert = model.load_model(args.start)
        tokenizer = data.load_tokenizer(args.start, bert.config.vocab_size)
        tokens = data.tokenise(args.corpus, tokenizer, args.cache_dir)
    else:
        tokenizer = train_vocabulary(args.corpus, args.vocab_size)
        tokens = data.tokenise(args.corpus, tokenizer, args.cache_dir)
        config = model.BertConfig(
            vocab_size=tokenizer.get_vocab_size(), hidden_size=args.hidden_size, num_hidden_layers=args.layers,
            num_attention_heads=args.heads, intermediate_size=4 * args.hidden_size)
        bert = model.Bert(config)
        embeddings = bert.bert.embeddings
        bias, vectors = word_vectors(tokens.train, config.vocab_size, config.hidden_size)
        bert.cls["predictions"].bias.data, embeddings.word_embeddings.weight.data = bias, vectors
        embeddings.position_embeddings.weight.data = sinusoids(config.max_position_embeddings, config.hidden_size)
    bert.to(args.device).train()
    bert.set_dropout(0, 0)  # one pass over the text or less: nothing to overfit
    bert.bert.pooler.requires_grad_(False)  # masked-LM does not reach it; fine-tuning starts from its initial weights
    decayed = [p for p in bert.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in bert.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)
    data.MASKED_SHARE, usual = MASKED_SHARE, data.MASKED_SHARE
    phases = [data.Rows(tokens.train, length, tokenizer) for length in (128, 512)]
    data.MASKED_SHARE = usual
    heldout = data.Rows(tokens.heldout, 128, tokenizer)

    start, step, next_save, evaluations = time.time(), 0, 0.05, []

    def record(precision: str):
        minutes = round((time.time() - start) / 60, 1)
        evaluations.append({"step": step, "tokens": step * TOKENS_PER_STEP, "minutes": minutes,
                            **evaluate(bert, heldout, args.device, precision)})
        print(json.dumps(evaluations[-1]), flush=True)

    with tqdm(disable=None) as progress:
        while (elapsed := (time.time() - start) / (60 * args.minutes)) < 1:
            rows = phases[elapsed > 0.9]
            batch = rows.training_batch(args.seed, step, TOKENS_PER_STEP // rows.seq_length)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
                logits = bert(batch.input_ids.to(args.device), batch.positions.to(args.device)).logits
            loss = F.cross_entropy(logits.float(), batch.labels.to(args.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decayed + plain, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * min(elapsed / 0.04, (1 - elapsed) / 0.96)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.update()
            if elapsed > next_save or step in (1, 100, 250, 500):
                next_save = max(next_save, elapsed + 0.05)
                record(args.precision)
                save(bert, tokenizer, args.output, {"finished": False, "evaluations": evaluations})
    record("fp32")
    corpora = [Path(corpus).name for corpus in args.corpus]
    save(bert, tokenizer, args.output, {
        "finished": True, "corpora": corpora, "train_tokens_in_corpus": len(tokens.train), "device": args.device,
        "precision": args.precision, "threads": torch.get_num_threads(), "evaluations": evaluations})


if __name__ == "__main__":
    main()
