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
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import improve
import model
import prune
from model import Bert, InputError, Linear, Output

# ---- Flags ---------------------------------------------------------------------------------------------------


def number(kind: type, low: float, high: float):
    """An argparse type: an int or a float from `low` to `high`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")
        return value

    return parse


# Name, default, what it may be, and what it is with its unit and the reason for the default: the paper's recipe where
# it is known; [ours] marks what the paper leaves open.
COUNT, WEIGHT, FRACTION = number(int, 1, 10**9), number(float, 0, 1e9), number(float, 0, 1)
HUB_CORPUS = "hub:Salesforce/wikitext:wikitext-103-raw-v1"
PRESETS = {  # the paper's students of BERT-base
    "homobert-base": {"target_width": 576, "target_intermediate": 2304, "learning_rate": 3e-4},
    "homobert-small": {"target_width": 256, "target_intermediate": 1024, "learning_rate": 6e-4},
    "homobert-xsmall": {"target_width": 240, "target_intermediate": 960, "learning_rate": 6e-4},
    "homobert-tiny": {"target_width": 224, "target_intermediate": 896, "learning_rate": 6e-4},
}
DEMO = {  # without --teacher and --preset: minutes on two cores, with no network
    "teacher": str(Path(__file__).resolve().parent / "teachers" / "small"),
    "corpus": ["demo"], "steps": 300, "batch_size": 16, "learning_rate": 2e-3,
}
FLAGS = (
    ("--teacher", None, str, "Folder or hub name of the BERT to start from. The bundled one unless given, or with "
     "--preset bert-base-uncased."),
    ("--preset", None, PRESETS, "A student of the paper: sets widths and learning rate."),
    ("--corpus", None, list, "Text to learn from: .txt, .jsonl (field text), both also .gz, .parquet (column text), "
     f"folders of these, hub:OWNER/NAME:CONFIG, or demo. {HUB_CORPUS} unless given."),
    ("--target-width", None, int, "Hidden width D of the student. Half of the teacher's unless given."),
    ("--target-intermediate", None, int, "Feed-forward width F of the student. In proportion to D unless given."),
    ("--target-heads", None, int, "Attention heads H of the student. The most that divide D unless given."),
    ("--output", None, Path, "Run folder, for run.json, log.jsonl and student/. runs/TEACHER-D unless given."),
    ("--overwrite", False, bool, "Replace the run that is in the output folder."),
    ("--cache-dir", Path.home() / ".cache" / "homotopic-distillation", Path, "Folder where tokenised text is kept."),
    ("--steps", 28_000, COUNT, "Optimizer steps. The paper's are 3 passes over Wikipedia and BookCorpus."),
    ("--batch-size", 4096, COUNT, "Sequences in a step, over all micro-batches."),
    ("--micro-batch-size", 64, COUNT, "Sequences at a time: a matter of memory, not of the result."),
    ("--seq-length", 128, number(int, 8, 10**6), "Tokens in a sequence."),
    ("--learning-rate", 3e-4, WEIGHT, "Peak learning rate of Adam. The paper takes 6e-4 for its smaller students."),
    ("--warmup", 0.1, FRACTION, "Fraction of the steps in which the learning rate rises; then it falls to zero."),
    ("--weight-decay", 0.01, WEIGHT, "Decoupled decay of the matrices [ours: BERT's own]."),
    ("--clip", 1.0, WEIGHT, "Largest norm of the gradient, 0 for no limit [ours: BERT's own]."),
    ("--dropout", 0.0, number(float, 0, 0.99), "Dropout of the student [ours: none, so that losses start at zero]."),
    ("--alpha-mlm", 1.0, WEIGHT, "Weight of the masked-LM loss [ours, as all weights]; 0 leaves a loss out."),
    ("--alpha-pred", 1.0, WEIGHT, "Weight of the KL divergence from the teacher's predictions."),
    ("--alpha-hidn", 1.0, WEIGHT, "Weight of the distance of the layers' outputs."),
    ("--alpha-emb", 1.0, WEIGHT, "Weight of the distance of the embeddings."),
    ("--alpha-attn", 1.0, WEIGHT, "Weight of the distance of the attention scores."),
    ("--temperature", 1.0, number(float, 1e-3, 1e3), "Temperature tau of the KL divergence [ours]."),
    ("--prune-start", 0.0, FRACTION, "Fraction of the run at which cutting begins, t_i."),
    ("--prune-end", 0.7, FRACTION, "Fraction at which the target is reached, t_f; as --prune-start: all cut at once."),
    ("--granularity", 8, COUNT, "Hidden dimensions cut together, feed-forward neurons go by four times as many [ours: "
     "GPUs want multiples of 8]."),
    ("--importance", "sensitivity", ("sensitivity", "magnitude", "random"), "What decides which units go."),
    ("--sensitivity-decay", 0.9, number(float, 0, 0.9999), "Decay of the sensitivities' average over the steps, 0 "
     "for the last step alone [ours: about ten steps, which steadies the ranking]."),
    ("--align-heads", False, bool, "Turn the dimensions of every head, before training, so that few of them do most of "
     "its work [ours: cuts of heads do less harm]."),
    ("--compensate", False, bool, "Before a cut, fold into the weights what the units that stay can say about those "
     "that go [ours: every cut does less harm]."),
    ("--eval-every", None, COUNT, "Steps between evaluations. A tenth of the run unless given."),
    ("--eval-rows", 128, COUNT, "Held-out sequences in an evaluation."),
    ("--log-every", 10, COUNT, "Steps between lines in log.jsonl."),
    ("--seed", 0, number(int, 0, 2**32 - 1), "Seed of row order, masks and dropout."),
    ("--device", "auto", str, "cpu, cuda or cuda:N; auto takes a GPU where there is one."),
    ("--precision", "auto", ("auto", "fp32", "bf16"), "Arithmetic of the products; auto is bf16 on a GPU, else fp32."),
)
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-6


# ---- The losses ----------------------------------------------------------------------------------------------


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

        L_total = L_MLM + a1 L_pred + a2 L_hidn + a3 L_emb + a4 L_attn; a weight of zero leaves its loss out.
        """
        student = self.student(batch.input_ids, batch.positions, want_scores=self.want_scores)
        losses = {}
        if "mlm" in self.alphas:
            losses["mlm"] = F.cross_entropy(student.logits.float(), batch.labels)
        if "pred" in self.alphas:
            losses["pred"] = prediction_loss(student.logits, teacher.logits, self.temperature)
        if "hidn" in self.alphas:
            losses["hidn"] = self.hidden_loss(student, teacher)
        if "emb" in self.alphas:
            losses["emb"] = mean_mse([self.embedding_projection(student.embedding)], [teacher.embedding])
        if "attn" in self.alphas:
            losses["attn"] = mean_mse(student.scores, teacher.scores)
        return {"loss": sum(self.alphas[name] * loss for name, loss in losses.items())} | losses

    def hidden_loss(self, student: Output, teacher: Output):
        """L_hidn: the distance of the layers' outputs through W_hidn, which all layers share."""
        return mean_mse([self.hidden_projection(h) for h in student.hidden], teacher.hidden)


def prediction_loss(student, teacher, temperature: float):
    """L_pred = tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)), the mean over M positions. Logits (M,V)."""
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def mean_mse(student: list[torch.Tensor], teacher: list[torch.Tensor]):
    """Mean squared error of every pair, then the mean over the layers."""
    return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)) / len(teacher)


# ---- Evaluation ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(distiller: Distiller, teacher: Bert, rows: data.Rows, count: int, micro: int, device, autocast) -> dict:
    """What `count` held-out rows with masks that are always the same say: L_hidn and, over the masked positions,
    KL(teacher || student) in nats and the masked-LM loss and top-1 of both (these only with a masked-LM head)."""
    distiller.eval()
    sums: dict[str, float] = {}
    for first in range(0, count, micro):
        batch = rows.batch(np.arange(first, min(first + micro, count)), seed=0, step=0, first=first).to(device)
        with autocast():
            outputs = {"": distiller.student(batch.input_ids, batch.positions),
                       "teacher_": teacher(batch.input_ids, batch.positions)}
            values = {"hidden_mse": distiller.hidden_loss(outputs[""], outputs["teacher_"])}
        if teacher.cls is not None:
            values["kl"] = prediction_loss(outputs[""].logits, outputs["teacher_"].logits, 1.0)
            for who, output in outputs.items():
                values[f"{who}mlm_loss"] = F.cross_entropy(output.logits.float(), batch.labels)
                values[f"{who}top1"] = (output.logits.argmax(-1) == batch.labels).float().mean()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(batch.input_ids)
    distiller.train()
    return {name: value / count for name, value in sums.items()}


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
    """Peak memory in MB: on the GPU that of tensors since the last call, else that of this process so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# ---- The loop ------------------------------------------------------------------------------------------------


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

    def fit_batches(units: int, step: int):
        return improve.fit_batches(rows, units, args.seed, step, args.batch_size, micro, device)

    if args.align_heads:
        improve.align_heads(student, fit_batches(first.hidden, 0))

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
            result = evaluate(distiller, teacher, heldout, eval_rows, micro, device, autocast)
            log("eval", step=step, **result)
            progress.write("step {:>6}  D {:>4}  F {:>4}  H {:>2}  K {:>2}  ".format(step, *widths) + "  ".join(
                f"{name} {value:.3f}" for name, value in result.items() if not name.startswith("teacher")))
            return result

        log_evaluation(0)
        clock, tokens_seen = time.perf_counter(), 0
        for step in range(args.steps):
            # Batch, losses and gradients, one micro-batch at a time.
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

            # Sensitivity: complete gradients, not yet clipped, with the weights that they belong to.
            if widths != last:
                prune.accumulate_sensitivity(sensitivity, distiller, args.sensitivity_decay)

            # Adam.
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

            # The schedule, and the cut: parameters, moments, projections, sensitivities, lineage.
            new = prune.scheduled_widths(step + 1, prune_start, prune_end, first, last, args.granularity)
            if new != widths:
                start = now(device)
                importance = prune.unit_importance(args.importance, distiller, sensitivity, args.seed + step)
                keep = prune.choose_units(importance, widths, new)
                if args.compensate:
                    improve.compensate(distiller, keep, fit_batches(max(map(len, keep.values())), step + 1))
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


# ---- The run folder ------------------------------------------------------------------------------------------


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
    args.output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.output / "student", ignore_errors=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    run = {"flags": vars(args), "seed": args.seed, "versions": {"python": platform.python_version()} | versions}
    (args.output / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")


def export(student: Bert, tokenizer, lineage: dict[str, torch.Tensor], folder: Path):
    """Write the student as a standard checkpoint that appears complete or not at all, with `lineage.json`: set of units
    -> for every unit its index in the teacher."""
    work = folder.with_name("student.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    model.save_model(student, work)
    data.save_tokenizer(tokenizer, work, student.config.max_position_embeddings)
    indices = {units: kept.tolist() for units, kept in lineage.items()}
    (work / "lineage.json").write_text(json.dumps(indices) + "\n")
    work.rename(folder)


def end_table(teacher: Bert, student: Bert, result: dict, milliseconds: list[float]) -> str:
    """Teacher beside student."""
    configs = teacher.config, student.config
    counts = teacher.parameter_count(), student.parameter_count()
    rows = {"": ("teacher", "student"),
            "hidden / feed-forward width": [f"{c.hidden_size} / {c.intermediate_size}" for c in configs],
            "heads x dimensions": [f"{c.num_attention_heads} x {c.attention_head_size}" for c in configs],
            "parameters": [f"{count:,}" for count in counts],
            "file in float32, MB": [f"{4 * count / 1e6:.1f}" for count in counts]}
    if "kl" in result:
        rows["held-out masked-LM loss"] = f"{result['teacher_mlm_loss']:.3f}", f"{result['mlm_loss']:.3f}"
        rows["held-out top-1"] = f"{result['teacher_top1']:.1%}", f"{result['top1']:.1%}"
        rows["KL to the teacher, nats"] = "0", f"{result['kl']:.3f}"
    rows["hidden states, MSE"] = "0", f"{result['hidden_mse']:.4f}"
    rows["milliseconds a sequence"] = [f"{ms:.2f}" for ms in milliseconds]
    return "\n".join(f"{name:<28}{a:>14}{b:>14}" for name, (a, b) in rows.items())


# ---- The command line ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with defaults from FLAGS, then from DEMO or the preset. Raises InputError."""
    parser = Parser(description="Distil a BERT into a narrower one, cutting its width step by step (HomoDistil).",
                    epilog="Without --teacher and --preset a bundled teacher learns on bundled text, with its own "
                    f"defaults: {', '.join(f'{k} {v}' for k, v in list(DEMO.items())[2:])}.", allow_abbrev=False)
    for flag, default, kind, meaning in FLAGS:
        stated = default is None or default is False
        options = {"default": default, "help": meaning if stated else f"{meaning} [%(default)s]"}
        if kind is bool:
            options["action"] = "store_true"
        elif kind is list:
            options["nargs"] = "+"
        elif callable(kind):
            options["type"] = kind
        else:
            options["choices"] = kind
        parser.add_argument(flag, **options)
    chosen = parser.parse_args(argv)
    demo = chosen.teacher is None and chosen.preset is None
    usual = {"teacher": "bert-base-uncased", "corpus": [HUB_CORPUS]}
    parser.set_defaults(**usual | (DEMO if demo else PRESETS.get(chosen.preset, {})))
    args = parser.parse_args(argv)
    if args.prune_start > args.prune_end:
        raise InputError(f"--prune-start {args.prune_start} is after --prune-end {args.prune_end}")
    if args.output is None:
        name = Path(args.teacher).resolve().name + (f"-{args.target_width}" if args.target_width else "")
        args.output = Path("runs") / ("demo" if demo else name)
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
    except (InputError, OSError) as error:  # of the system's errors: a full disk, a folder that may not be written
        print(f"distill.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distill.py: interrupted; no student was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
