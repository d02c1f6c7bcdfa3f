"""Homotopic distillation: a BERT becomes narrower while it is trained to imitate what it was.

All of HomoDistil (Liang et al., ICLR 2023, algorithm 1) in one loop, `distill` below: the student starts as a copy
of the teacher; in every step it learns from the teacher on open text, the sensitivity of its weights is added up, and
when the cubic schedule says so the least important units are sliced out of its matrices.

    python distill.py                                                     a demonstration in minutes, on the CPU
    python distill.py --teacher bert-base-uncased --target-width 384      the published recipe

Shape letters as in model.py; subscripts t and s are teacher and student.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
import prune
from model import Bert, InputError, Linear, Output

# ---------------------------------------------------------------------------------------------------------------
# Defaults. The paper's recipe where it is known; [ours] marks what the paper leaves open.

RECIPE = {
    "steps": 28_000,  # optimizer steps: 3 passes over Wikipedia and BookCorpus
    "batch_size": 4096,  # sequences in a step, over all micro-batches
    "seq_length": 128,  # tokens in a sequence
    "learning_rate": 3e-4,  # at its peak; the paper takes 6e-4 for its smaller students
    "warmup": 0.1,  # of the steps, from zero to the peak; then linear decay to zero
    "weight_decay": 0.01,  # [ours] BERT's own, on matrices only
    "clip": 1.0,  # [ours] BERT's own largest gradient norm
    "dropout": 0.0,  # [ours] so that the losses start at exactly zero; one pass over much text does not overfit
    "alpha_mlm": 1.0,  # weights of the losses [ours]
    "alpha_pred": 1.0,
    "alpha_hidn": 1.0,
    "alpha_emb": 1.0,
    "alpha_attn": 1.0,
    "temperature": 1.0,  # tau of L_pred [ours]
    "prune_start": 0.0,  # t_i, of the steps
    "prune_end": 0.7,  # t_f, of the steps
    "granularity": 8,  # hidden dimensions that go together [ours]: tensor cores want multiples of 8
    "sensitivity_decay": 0.9,  # [ours] averages over about ten steps, which steadies the ranking
}
DEMO = {  # without --teacher and --preset: minutes on two cores, with no network
    "teacher": str(Path(__file__).resolve().parent / "teachers" / "small"),
    "corpus": ["demo"],
    "steps": 300,
    "batch_size": 16,
    "learning_rate": 1e-3,
}
PRESETS = {  # the four students of BERT-base in the paper
    "homobert-base": {"target_width": 576, "target_intermediate": 2304, "learning_rate": 3e-4},
    "homobert-small": {"target_width": 256, "target_intermediate": 1024, "learning_rate": 6e-4},
    "homobert-xsmall": {"target_width": 240, "target_intermediate": 960, "learning_rate": 6e-4},
    "homobert-tiny": {"target_width": 224, "target_intermediate": 896, "learning_rate": 6e-4},
}
HUB_CORPUS = "hub:Salesforce/wikitext:wikitext-103-raw-v1"
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-6


# ---------------------------------------------------------------------------------------------------------------
# The losses


class Distiller(nn.Module):
    """The student and the projections W_hidn and W_emb that compare its narrow states with the teacher's.

    Both start as the identity, since the student starts as the teacher, so that L_pred, L_hidn, L_emb and L_attn are
    exactly zero at first. They lose their input columns with the student and are thrown away at the end.
    """

    def __init__(self, student: Bert, alphas: dict[str, float], temperature: float = 1.0):
        super().__init__()
        width = student.config.hidden_size
        self.student = student
        self.hidden_projection = Linear(width, width, bias=False)  # W_hidn
        self.embedding_projection = Linear(width, width, bias=False)  # W_emb
        for projection in (self.hidden_projection, self.embedding_projection):
            nn.init.eye_(projection.weight)
        self.alphas = {name: alpha for name, alpha in alphas.items() if alpha > 0}
        self.temperature = temperature

    @property
    def want_scores(self) -> bool:
        return "attn" in self.alphas

    def forward(self, batch: data.Batch, teacher: Output) -> dict[str, torch.Tensor]:
        """All losses by name and their weighted sum `loss`, means over the batch (HomoDistil, section 3.1).

        L_total = L_MLM + a1 L_pred + a2 L_hidn + a3 L_emb + a4 L_attn; a weight of zero leaves its loss out, and so
        does a teacher without a masked-LM head for the first two.
        """
        student = self.student(batch.input_ids, batch.positions, want_scores=self.want_scores)
        losses = {}
        if student.logits is not None:
            losses["mlm"] = F.cross_entropy(student.logits.float(), batch.labels)
            if "pred" in self.alphas:
                losses["pred"] = prediction_loss(student.logits, teacher.logits, self.temperature)
        losses["hidn"] = mean_mse([self.hidden_projection(h) for h in student.hidden], teacher.hidden)
        losses["emb"] = mean_mse([self.embedding_projection(student.embedding)], [teacher.embedding])
        if self.want_scores:
            losses["attn"] = mean_mse(student.scores, teacher.scores)
        losses = {name: loss for name, loss in losses.items() if name in self.alphas}
        return {"loss": sum(self.alphas[name] * loss for name, loss in losses.items())} | losses


def prediction_loss(student, teacher, temperature: float):
    """L_pred = tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)), the mean over M positions. Logits (M,V)."""
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def mean_mse(student: list[torch.Tensor], teacher: list[torch.Tensor]):
    """Mean squared error of every pair, then the mean over the layers."""
    return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)) / len(teacher)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(student: Bert, teacher: Bert, rows: data.Rows, count: int, micro: int, device, autocast) -> dict:
    """Masked-LM loss and top-1 of both and KL(teacher || student) in nats, over the masked positions of `count`
    held-out rows whose masks are always the same. Empty without a masked-LM head."""
    if teacher.cls is None:
        return {}
    training = student.training
    student.eval()
    sums, positions = dict.fromkeys(("mlm_loss", "kl", "top1", "teacher_mlm_loss", "teacher_top1"), 0.0), 0
    for first in range(0, count, micro):
        batch = rows.batch(np.arange(first, min(first + micro, count)), seed=0, step=0, first=first).to(device)
        with autocast():
            logits = {"": student(batch.input_ids, batch.positions).logits.float(),
                      "teacher_": teacher(batch.input_ids, batch.positions).logits.float()}
        here = len(batch.labels)
        for who, z in logits.items():
            sums[f"{who}mlm_loss"] += F.cross_entropy(z, batch.labels, reduction="sum").item()
            sums[f"{who}top1"] += (z.argmax(-1) == batch.labels).sum().item()
        sums["kl"] += prediction_loss(logits[""], logits["teacher_"], 1.0).item() * here
        positions += here
    student.train(training)
    return {name: value / positions for name, value in sums.items()}


@torch.no_grad()
def milliseconds_per_sequence(models: list[Bert], rows: data.Rows, device, autocast) -> list[float]:
    """Forward time of one row in a batch of at most 16, median of 7 after a warm-up, the models in alternation."""
    batch = rows.batch(np.arange(min(16, len(rows))), seed=0, step=0).to(device)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(8):
        for bert, seen in zip(models, times, strict=True):
            start = now(device)
            with autocast():
                bert.eval()(batch.input_ids)
            seen.append((now(device) - start) * 1000 / len(batch.input_ids))
    return [statistics.median(seen[1:]) for seen in times]


def now(device) -> float:
    """Seconds on a clock that waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_mb(device) -> float:
    """The most memory in use so far in MB: on the GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# ---------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of step 0, 1, ...: linear from near zero to the peak over `warmup` (a fraction), then linear to near zero."""
    rising = warmup * steps
    return peak * min((step + 1) / rising if rising else 1.0, (steps - step) / max(steps - rising, 1))


def make_optimizer(distiller: Distiller, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over everything that is trained. Decay pulls the student's matrices towards zero; biases, LayerNorms and
    the projections, which belong near the identity, are spared."""
    decayed = [p for p in distiller.student.parameters() if p.requires_grad and p.dim() == 2]
    spared = [p for p in distiller.student.parameters() if p.requires_grad and p.dim() == 1]
    spared += [distiller.hidden_projection.weight, distiller.embedding_projection.weight]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)


def distill(args: argparse.Namespace) -> Path:
    """Run what the flags ask for and return the folder of the finished student. Raises InputError."""
    # What is given: teacher, text, widths, device. Nothing is written before all of it has been found good.
    check_output(args.output, args.overwrite)
    device = find_device(args.device)
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    torch.manual_seed(args.seed)
    folder = model.find_model(args.teacher)
    teacher = model.load_model(folder).to(device).eval().requires_grad_(False)
    first = prune.Widths.of(teacher.config)
    target_width = first.hidden // 2 if args.target_width is None else args.target_width
    last = prune.target_widths(teacher.config, target_width, args.target_intermediate, args.target_heads)
    if args.seq_length > teacher.config.max_position_embeddings:
        raise InputError(f"--seq-length {args.seq_length} is beyond the teacher's "
                         f"{teacher.config.max_position_embeddings} positions")
    tokenizer = data.load_tokenizer(folder, teacher.config.vocab_size)
    alphas = {name: getattr(args, f"alpha_{name}") for name in ("mlm", "pred", "hidn", "emb", "attn")}
    if teacher.cls is None:
        print(f"{args.teacher} has no masked-LM head: L_MLM and L_pred are off, and the student will have no head")
        alphas["mlm"] = alphas["pred"] = 0.0
    if not any(alphas.values()):
        raise InputError("all weights --alpha-* of the losses are zero: there is nothing to learn from")
    tokens = data.tokenise(args.corpus, tokenizer, args.cache_dir)
    rows, heldout = (data.Rows(part, args.seq_length, tokenizer) for part in (tokens.train, tokens.heldout))
    if len(rows) < args.batch_size:
        raise InputError(f"the corpus gives {len(rows)} rows of {args.seq_length} tokens, fewer than one batch of "
                         f"{args.batch_size}: give more text, or a smaller --batch-size or --seq-length")
    if not len(heldout):
        raise InputError(f"the held-out part of the corpus is shorter than one row of {args.seq_length} tokens: "
                         "give more text or a smaller --seq-length")

    # The student is the teacher. The pooler has no loss here; it is only sliced.
    distiller = Distiller(copy.deepcopy(teacher).requires_grad_(True), alphas, args.temperature).to(device).train()
    student = distiller.student
    student.set_dropout(args.dropout, args.dropout)
    if student.bert.pooler is not None:
        student.bert.pooler.requires_grad_(False)
    optimizer = make_optimizer(distiller, args.weight_decay)
    lineage = prune.new_lineage(distiller)
    sensitivity: dict[str, torch.Tensor] = {}
    widths = first
    prune_start, prune_end = args.prune_start * args.steps, args.prune_end * args.steps
    micro = min(args.micro_batch_size, args.batch_size)
    eval_every = args.eval_every or max(1, args.steps // 10)
    eval_rows = min(args.eval_rows, len(heldout))

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    start_run(args)
    print(f"{args.teacher}: {teacher.parameter_count() / 1e6:.1f} M parameters, D F H K {tuple(first)} -> "
          f"{tuple(last)}\n{args.steps} steps of {args.batch_size} x {args.seq_length} tokens on {device}; "
          f"{len(rows):,} rows of text, {len(heldout):,} held out")
    with (
        open(args.output / "log.jsonl", "w") as log_file,
        tqdm(total=args.steps, unit="step", desc="distill", disable=None) as progress,
    ):
        def log(event: str, **values):
            log_file.write(json.dumps({"event": event, **values}) + "\n")
            log_file.flush()

        def log_evaluation(step: int) -> dict:
            result = evaluate(student, teacher, heldout, eval_rows, micro, device, autocast)
            log("eval", step=step, **result)
            if result:
                progress.write("step {:>6}  D {:>4}  F {:>4}  H {:>2}  K {:>2}  ".format(step, *widths) +
                               "  ".join(f"{name} {value:.3f}" for name, value in result.items()
                                         if not name.startswith("teacher")))
            return result

        log_evaluation(0)
        clock, tokens_seen = time.perf_counter(), 0
        for step in range(args.steps):
            # 1-4. Losses and gradients of the global batch, one micro-batch at a time.
            losses: dict[str, torch.Tensor] = {}
            for begin in range(0, args.batch_size, micro):
                end = min(begin + micro, args.batch_size)
                batch = rows.training_batch(args.seed, step, args.batch_size, begin, end).to(device)
                with autocast():
                    with torch.no_grad():
                        target = teacher(batch.input_ids, batch.positions, want_scores=distiller.want_scores)
                    part = distiller(batch, target)
                share = (end - begin) / args.batch_size  # every row has as many masked positions as any other
                (part["loss"] * share).backward()
                for name, value in part.items():
                    losses[name] = losses.get(name, 0.0) + value.detach() * share
            del part, target  # nothing may hold the graph of a step over a cut

            # 5. Sensitivity: complete gradients, not yet clipped, with the weights that they belong to.
            if widths != last:
                prune.accumulate_sensitivity(sensitivity, distiller, args.sensitivity_decay)

            # 4. Adam.
            norm = nn.utils.clip_grad_norm_(distiller.parameters(), args.clip or float("inf"))
            if not torch.isfinite(norm + losses["loss"]):
                values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
                raise InputError(f"step {step + 1}: loss or gradient is not finite ({values}, gradient norm "
                                 f"{norm.item():.4g}); try a smaller --learning-rate, or check the teacher's weights")
            rate = learning_rate(step, args.steps, args.learning_rate, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

            # 6-8. The schedule, and the cut.
            new = prune.scheduled_widths(step + 1, prune_start, prune_end, first, last, args.granularity)
            if new != widths:
                start = now(device)
                importance = prune.unit_importance(args.importance, distiller, sensitivity, args.seed + step)
                keep = prune.choose_units(importance, widths, new)
                prune.cut(distiller, keep, new, optimizer, (sensitivity, lineage))
                log("cut", step=step + 1, before=widths._asdict(), after=new._asdict(),
                    milliseconds=(now(device) - start) * 1000)
                widths = new

            # What is seen of it.
            progress.update()
            tokens_seen += args.batch_size * args.seq_length
            if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
                values = {name: value.item() for name, value in losses.items()}
                speed = tokens_seen / (time.perf_counter() - clock)
                log("train", step=step + 1, tokens=(step + 1) * args.batch_size * args.seq_length,
                    loss=values["loss"], **{f"loss_{name}": value for name, value in values.items() if name != "loss"},
                    D=widths.hidden, F=widths.intermediate, H=widths.heads, K=widths.head_size,
                    parameters=student.parameter_count(), learning_rate=rate, gradient_norm=norm.item(),
                    tokens_per_second=speed, memory_mb=memory_mb(device))
                progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()} |
                                     dict(D=widths.hidden, F=widths.intermediate, tok_s=f"{speed:,.0f}"))
                clock, tokens_seen = time.perf_counter(), 0
            if (step + 1) % eval_every == 0 and step + 1 < args.steps:
                before = time.perf_counter()
                log_evaluation(step + 1)
                clock += time.perf_counter() - before
        result = log_evaluation(args.steps)

    export(student, tokenizer, lineage, args.output / "student")
    print(end_table(teacher, student, result, milliseconds_per_sequence([teacher, student], heldout, device, autocast)))
    print(f"student: {args.output / 'student'}")
    return args.output / "student"


# ---------------------------------------------------------------------------------------------------------------
# The run folder


def check_output(output: Path, overwrite: bool):
    """Refuse a folder that has something in it, unless it is an old run and may be overwritten."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is not a folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise InputError(f"--output {output} is not empty: give another folder, or --overwrite to replace that run")
        if not (output / "run.json").is_file():
            raise InputError(f"--output {output} holds something that is not a run; nothing is overwritten there")
    parent = next(p for p in (output, *output.absolute().parents) if p.is_dir())
    if not os.access(parent, os.W_OK):
        raise InputError(f"--output {output}: {parent} is not writable")


def start_run(args: argparse.Namespace):
    """Make the run folder, without what an old run left there, and write run.json."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "log.jsonl").unlink(missing_ok=True)
        shutil.rmtree(args.output / "student", ignore_errors=True)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
        run = {"flags": vars(args), "seed": args.seed, "versions": {"python": platform.python_version()} | versions}
        (args.output / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
    except OSError as error:
        raise InputError(f"--output {args.output} cannot be written: {model.one_line(error)}") from None


def export(student: Bert, tokenizer, lineage: dict[str, torch.Tensor], folder: Path):
    """Write the student as a standard checkpoint that appears complete or not at all, with `lineage.json`: set of units
    -> for every unit its index in the teacher."""
    work = Path(tempfile.mkdtemp(prefix="student.", dir=folder.parent))
    work.chmod(0o755)
    model.save_model(student, work)
    data.save_tokenizer(tokenizer, work, student.config.max_position_embeddings)
    indices = {units: kept.tolist() for units, kept in lineage.items()}
    (work / "lineage.json").write_text(json.dumps(indices) + "\n")
    work.rename(folder)


def end_table(teacher: Bert, student: Bert, result: dict, milliseconds: list[float]) -> str:
    """Teacher beside student."""
    configs = teacher.config, student.config
    counts = teacher.parameter_count(), student.parameter_count()
    rows = [("", "teacher", "student"),
            ("hidden / feed-forward width", *(f"{c.hidden_size} / {c.intermediate_size}" for c in configs)),
            ("heads x dimensions", *(f"{c.num_attention_heads} x {c.attention_head_size}" for c in configs)),
            ("parameters", *(f"{count:,}" for count in counts)),
            ("file in float32, MB", *(f"{4 * count / 1e6:.1f}" for count in counts))]
    if result:
        rows += [("held-out masked-LM loss", f"{result['teacher_mlm_loss']:.3f}", f"{result['mlm_loss']:.3f}"),
                 ("held-out top-1", f"{result['teacher_top1']:.1%}", f"{result['top1']:.1%}"),
                 ("KL to the teacher, nats", "0", f"{result['kl']:.3f}")]
    rows.append(("milliseconds a sequence", *(f"{ms:.2f}" for ms in milliseconds)))
    return "\n".join("{:<28}{:>14}{:>14}".format(*row) for row in rows)


# ---------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def number(kind: type, low: float, high: float = float("inf"), above: bool = False):
    """An argparse type: an int or float from `low` (or above it) to `high`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or above and value == low or value == float("inf"):
            name = "a whole number" if kind is int else "a number"
            limits = f"{'above' if above else 'from'} {low}" + (f" to {high}" if high < float("inf") else " on")
            raise argparse.ArgumentTypeError(f"{text!r} must be {name} {limits}")
        return value

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with defaults from RECIPE, then DEMO (bundled teacher) or the preset. Raises InputError."""
    count, fraction, weight = number(int, 1), number(float, 0, 1), number(float, 0)
    parser = Parser(description="Distil a BERT into a narrower one, cutting its width step by step (HomoDistil).",
                    epilog="Without --teacher and --preset a bundled teacher is distilled on bundled text.",
                    allow_abbrev=False)

    def add(flag: str, help: str, **options):
        stated = "[" in help or "action" in options
        parser.add_argument(flag, help=help if stated else f"{help} [%(default)s]", **options)

    add("--teacher", help="Folder or hub name of the BERT to start from. [the bundled one]")
    add("--preset", choices=PRESETS, help="One of the paper's four students of bert-base-uncased. [none]")
    add("--corpus", nargs="+", help="Text: .txt, .jsonl (field text), both also .gz, .parquet (column text), folders of "
        f"these, hub:OWNER/NAME:CONFIG, or demo. [demo for the bundled teacher, else {HUB_CORPUS}]")
    add("--target-width", type=int, help="Hidden width D of the student. [half of the teacher's]")
    add("--target-intermediate", type=int, help="Feed-forward width F of the student. [in proportion to D]")
    add("--target-heads", type=int, help="Attention heads of the student. [the most that divide D]")
    add("--output", type=Path, help="Run folder for run.json, log.jsonl and student/. [runs/TEACHER-D, or runs/demo]")
    add("--overwrite", action="store_true", help="Replace a run that is in the output folder.")
    add("--cache-dir", type=Path, default=Path.home() / ".cache" / "homotopic-distillation",
        help="Folder where tokenised text is kept.")
    add("--steps", type=count, help="Optimizer steps.")
    add("--batch-size", type=count, help="Sequences in a step.")
    add("--micro-batch-size", type=count, default=64,
        help="Sequences at a time. Reduce it when memory runs out: the result does not depend on it.")
    add("--seq-length", type=number(int, 8), help="Tokens in a sequence.")
    add("--learning-rate", type=weight, help="Peak learning rate of Adam.")
    add("--warmup", type=fraction, help="Fraction of the steps in which the learning rate rises.")
    add("--weight-decay", type=weight, help="Decoupled weight decay of the matrices.")
    add("--clip", type=weight, help="Largest norm of the gradient; 0 switches clipping off.")
    add("--dropout", type=number(float, 0, 0.99), help="Dropout of the student while it is trained.")
    add("--alpha-mlm", type=weight, help="Weight of the masked-LM loss.")
    add("--alpha-pred", type=weight, help="Weight of the KL divergence from the teacher's predictions.")
    add("--alpha-hidn", type=weight, help="Weight of the distance of the layers' outputs.")
    add("--alpha-emb", type=weight, help="Weight of the distance of the embeddings.")
    add("--alpha-attn", type=weight, help="Weight of the distance of the attention scores.")
    add("--temperature", type=number(float, 0, above=True), help="Temperature tau of the KL divergence.")
    add("--prune-start", type=fraction, help="Fraction of the run at which cutting begins.")
    add("--prune-end", type=fraction, help="Fraction of the run at which the target is reached. Equal to "
        "--prune-start: everything is cut at once.")
    add("--granularity", type=count, help="Hidden dimensions cut together; feed-forward units go by four times that.")
    add("--importance", choices=("sensitivity", "magnitude", "random"), default="sensitivity",
        help="What decides which units go.")
    add("--sensitivity-decay", type=number(float, 0, 0.9999), help="Decay of the sensitivities' moving average over "
        "the steps; 0 takes the last step alone.")
    add("--eval-every", type=count, help="Steps between evaluations. [a tenth of the run]")
    add("--eval-rows", type=count, default=128, help="Held-out sequences in an evaluation.")
    add("--log-every", type=count, default=10, help="Steps between lines in log.jsonl.")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="Seed of row order, masks and dropout.")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="Arithmetic of the matrix products; auto is bf16 on a GPU and fp32 on a CPU.")
    parser.set_defaults(**RECIPE)
    chosen = parser.parse_args(argv)
    bundled = chosen.teacher is None and chosen.preset is None
    if bundled:
        parser.set_defaults(**DEMO)
    else:
        parser.set_defaults(teacher="bert-base-uncased", corpus=[HUB_CORPUS], **PRESETS.get(chosen.preset, {}))
    args = parser.parse_args(argv)
    if args.prune_start > args.prune_end:
        raise InputError(f"--prune-start {args.prune_start} is after --prune-end {args.prune_end}")
    if args.output is None:
        name = Path(args.teacher).name + (f"-{args.target_width}" if args.target_width else "")
        args.output = Path("runs") / ("demo" if bundled else name)
    return args


def find_device(name: str) -> torch.device:
    """The device that --device names. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


def main(argv: list[str] | None = None) -> int:
    try:
        distill(parse_arguments(argv))
    except InputError as error:
        print(f"distill.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill.py: interrupted; no student was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
