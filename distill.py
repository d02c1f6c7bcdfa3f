"""Homotopic distillation: a BERT becomes narrower while it is trained to imitate what it was.

All of HomoDistil (Liang et al., ICLR 2023, algorithm 1) in one loop, `distill` below: the student starts as a copy
of the teacher; in every step it learns from the teacher on open text, the sensitivity of its weights is added up, and
when the cubic schedule says so the least important units are sliced out of its matrices.

    python distill.py                                                     a demonstration in minutes, on the CPU
    python distill.py --teacher bert-base-uncased --target-width 384      the published recipe

Shape letters as in model.py; subscripts t and s are teacher and student.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import re
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
import run
from model import Bert, InputError, Linear, Output, read_json

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


def widths_list(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them, from large to small."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of widths such as 576,512")
    return sorted({int(width) for width in text.split(",")}, reverse=True)


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
RECIPES = {  # beside the published one
    "best": {"align_heads": True, "compensate": True, "prune_start": 1 / 30, "prune_end": 1 / 30, "alpha_mlm": 0.0},
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
    ("--target-heads", None, int, "Attention heads H of the student. The most that divide D, and fit --snapshots, "
     "unless given."),
    ("--recipe", None, RECIPES, "best: what has paid in our experiments, beside the published method, which is the "
     "default."),
    ("--output", None, Path, "Run folder, for run.json, log.jsonl and student/. runs/TEACHER-D unless given."),
    ("--overwrite", False, bool, "Replace the run that is in the output folder."),
    ("--resume", False, bool, "Go on with the run in the output folder; its flags are known. Nothing is lost but the "
     "steps since its last checkpoint."),
    ("--save-every", None, COUNT, "Steps between checkpoints, beside those of --save-minutes."),
    ("--save-minutes", 15.0, WEIGHT, "Minutes between checkpoints."),
    ("--cache-dir", Path.home() / ".cache" / "homotopic-distillation", Path, "Folder where tokenised text is kept."),
    ("--steps", 28_000, COUNT, "Optimizer steps. The paper's are 3 passes over Wikipedia and BookCorpus."),
    ("--batch-size", 4096, COUNT, "Sequences in a step, over all micro-batches."),
    ("--micro-batch-size", None, COUNT, "Sequences that a process takes at a time: a matter of memory, not of the "
     "result. What fits on the GPU unless given, 64 on the CPU."),
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
    ("--prune-power", 3.0, number(float, 0.1, 100), "Exponent of the schedule: 3 is the cubic one, 1 cuts evenly."),
    ("--init", "teacher", ("teacher", "truncated", "random"), "Where the student starts: as the teacher, which is the "
     "method; or, to compare, at its final widths with the teacher's first units or with random weights."),
    ("--granularity", 8, COUNT, "Hidden dimensions cut together, feed-forward neurons go by four times as many [ours: "
     "GPUs want multiples of 8]."),
    ("--importance", "sensitivity", ("sensitivity", "magnitude", "random"), "What decides which units go."),
    ("--sensitivity-decay", 0.9, number(float, 0, 0.9999), "Decay of the sensitivities' average over the steps, 0 "
     "for the last step alone [ours: about ten steps, which steadies the ranking]."),
    ("--align-heads", False, bool, "Turn the dimensions of every head, before training, so that few of them do most of "
     "its work [ours: cuts of heads do less harm]."),
    ("--compensate", False, bool, "Before a cut, fold into the weights what the units that stay can say about those "
     "that go [ours: every cut does less harm]."),
    ("--snapshots", None, widths_list, "Hidden widths on the way, as 576,512: a student of each is written, too, to "
     "student-576 and so on."),
    ("--eval-every", None, COUNT, "Steps between evaluations. A tenth of the run unless given."),
    ("--eval-rows", 128, COUNT, "Held-out sequences in an evaluation."),
    ("--eval-cuts", False, bool, "Evaluate right before and right after every cut, too; in log.jsonl."),
    ("--log-every", 10, COUNT, "Steps between lines in log.jsonl."),
    ("--seed", 0, number(int, 0, 2**32 - 1), "Seed of row order, masks and dropout."),
    ("--device", "auto", str, "cpu, cuda or cuda:N; auto takes a GPU where there is one."),
    ("--precision", "auto", ("auto", "fp32", "bf16"), "Arithmetic of the products; auto is bf16 on a GPU, else fp32."),
    ("--deterministic", False, bool, "The same bits in every run on the same GPU, at some cost; on the CPU always so."),
)
MAY_CHANGE = {  # in a resumed run: they have no bearing on the student
    "output", "overwrite", "resume", "save_every", "save_minutes", "cache_dir", "eval_every", "eval_rows", "log_every",
    "device"}
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
        if "mlm" in self.alphas or "pred" in self.alphas:
            logits = student.logits, teacher.logits
            losses["mlm"], losses["pred"] = PredictionLosses.apply(*logits, batch.labels, self.temperature)
        if "hidn" in self.alphas:
            losses["hidn"] = self.hidden_loss(student, teacher)
        if "emb" in self.alphas:
            losses["emb"] = mean_mse([self.embedding_projection(student.embedding)], [teacher.embedding])
        if "attn" in self.alphas:
            losses["attn"] = mean_mse(student.scores, teacher.scores)
        losses = {name: losses[name] for name in self.alphas}
        return {"loss": sum(self.alphas[name] * loss for name, loss in losses.items())} | losses

    def hidden_loss(self, student: Output, teacher: Output):
        """L_hidn: the distance of the layers' outputs through W_hidn, which all layers share."""
        return mean_mse([self.hidden_projection(h) for h in student.hidden], teacher.hidden)


class PredictionLosses(torch.autograd.Function):
    """L_MLM and L_pred of the same logits (M,V), both means over the M positions, with their gradients written out.

        L_MLM  = -log q[label]                                           dL_MLM / dz  = (q - onehot(label)) / M
        L_pred = tau^2 KL(p_tau || q_tau), p_tau = softmax(z_t / tau)     dL_pred / dz = tau (q_tau - p_tau) / M

    The (M,V) tensors are the largest of a step; this walks over them less often than autograd's own way would.
    """

    @staticmethod
    def forward(ctx, student, teacher, labels, temperature: float):
        log_q = F.log_softmax(student, dim=-1, dtype=torch.float32)  # (M,V)
        masked_lm = F.nll_loss(log_q, labels)
        if temperature == 1:
            log_q_tau, log_p_tau = log_q, F.log_softmax(teacher, dim=-1, dtype=torch.float32)
        else:
            log_q_tau, log_p_tau = (F.log_softmax(z.float() / temperature, dim=-1) for z in (student, teacher))
        p_tau, q_tau = log_p_tau.exp(), log_q_tau.exp()
        prediction_gradient = q_tau - p_tau
        prediction = p_tau.mul_(log_p_tau.sub_(log_q_tau)).sum(-1).mean() * temperature**2
        q = q_tau if temperature == 1 else log_q.exp_()
        q[torch.arange(len(labels), device=labels.device), labels] -= 1
        ctx.save_for_backward(q, prediction_gradient)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return masked_lm, prediction

    @staticmethod
    def backward(ctx, masked_lm_gradient, prediction_gradient):
        masked_lm, prediction = ctx.saved_tensors
        gradient = masked_lm * (masked_lm_gradient / len(masked_lm))
        gradient += prediction * (prediction_gradient * ctx.temperature / len(prediction))
        return gradient.to(ctx.dtype), None, None, None


def mean_mse(student: list[torch.Tensor], teacher: list[torch.Tensor]):
    """Mean squared error of every pair, then the mean over the layers."""
    return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)) / len(teacher)


# ---- Evaluation ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(distiller: Distiller, teacher: Bert, rows: data.Rows, count: int, micro: int, device, autocast) -> dict:
    """What `count` held-out rows with masks that are always the same say: L_hidn and, over the masked positions,
    KL(teacher || student) in nats and the masked-LM loss and top-1 of both (these only with a masked-LM head).
    The processes share the rows."""
    distiller.eval()
    sums: dict[str, float] = {}
    last = run.share_of(count)[1]
    for first in range(*run.share_of(count), micro):
        batch = rows.batch(np.arange(first, min(first + micro, last)), seed=0, step=0, first=first).to(device)
        with autocast():
            outputs = {"": distiller.student(batch.input_ids, batch.positions),
                       "teacher_": teacher(batch.input_ids, batch.positions)}
            values = {"hidden_mse": distiller.hidden_loss(outputs[""], outputs["teacher_"])}
        if teacher.cls is not None:
            logits = outputs[""].logits, outputs["teacher_"].logits
            values["mlm_loss"], values["kl"] = PredictionLosses.apply(*logits, batch.labels, 1.0)
            values["teacher_mlm_loss"] = F.cross_entropy(logits[1].float(), batch.labels)
            for who, output in outputs.items():
                values[f"{who}top1"] = (output.logits.argmax(-1) == batch.labels).float().mean()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(batch.input_ids)
    distiller.train()
    return {name: value / count for name, value in run.total(sums).items()}


@torch.no_grad()
def milliseconds_per_sequence(models: list[Bert], rows: data.Rows, device, autocast) -> list[float]:
    """Forward time of one row in a batch of at most 16, median of 7 after a warm-up, the models in alternation."""
    batch = rows.batch(np.arange(min(16, len(rows))), seed=0, step=0).to(device)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(8):
        for bert, seen in zip(models, times, strict=True):
            start = run.now(device)
            with autocast():
                bert.eval()(batch.input_ids)
            seen.append((run.now(device) - start) * 1000 / len(batch.input_ids))
    return [statistics.median(seen[1:]) for seen in times]


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


def largest_micro_batch(trial, rows: int) -> int:
    """`rows`, halved until `trial` (a function of the number of rows that runs them) fits into the memory of every
    process. Raises torch.OutOfMemoryError where a single row does not."""
    while True:
        try:
            trial(rows)
            fits = True
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            fits = False
        torch.cuda.empty_cache()
        if all(run.gather(fits)):
            return rows
        rows = -(-rows // 2)


def distill(args: argparse.Namespace) -> Path:
    """Run what the flags ask for and return the folder of the finished student. Raises InputError, and run.Interrupted
    where a signal ends the run."""
    # What is given: teacher, text, widths, device. Nothing is written before all of it has been found good.
    run.check_output(args.output, args.overwrite or args.resume)
    if args.resume and (args.output / "student").is_dir():
        print(f"{args.output} is finished")
        return args.output / "student"
    device = run.find_device(args.device)
    run.reuse_memory()
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(args.deterministic)
    folder = model.find_model(args.teacher)
    teacher = model.load_model(folder).to(device).eval().requires_grad_(False)
    first = prune.Widths.of(teacher.config)
    target_width = first.hidden // 2 if args.target_width is None else args.target_width
    last, snapshots = prune.family_widths(teacher.config, target_width, args.target_intermediate, args.target_heads,
                                          args.snapshots or [])
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
    if args.batch_size < run.WORLD:
        raise InputError(f"--batch-size {args.batch_size} leaves nothing to do for some of the {run.WORLD} processes")
    traces = {"corpus": tokens.key, "teacher": run.weights_hash(folder)}
    checkpoints = run.Checkpoints(args.output / "checkpoints")
    saved = checkpoints.newest() if args.resume else None
    if args.resume:
        run.check_traces(args.output, traces)

    # The student is the teacher. The pooler has no loss here; it is only sliced.
    distiller = Distiller(copy.deepcopy(teacher).requires_grad_(True), alphas, args.temperature).to(device).train()
    student = distiller.student
    student.set_dropout(args.dropout, args.dropout)
    if student.bert.pooler is not None:
        student.bert.pooler.requires_grad_(False)
    lineage = prune.new_lineage(distiller)
    sensitivity: dict[str, torch.Tensor] = {}
    widths, begun = first, 0
    start = first if args.init == "teacher" else last  # of the path
    if saved:  # its shape is what the cuts up to then have left of the teacher
        tensors, record = saved
        lineage, sensitivity = (run.with_prefix(tensors, f"{name}.", device) for name in ("lineage", "sensitivity"))
        widths, begun, result = prune.Widths(**record["widths"]), record["step"], record["evaluation"]
        prune.cut(distiller, lineage, widths)
        distiller.load_state_dict(run.with_prefix(tensors, "model."))
    elif args.init != "teacher":  # the classical ways
        in_order = {units: -torch.arange(len(kept), device=device) for units, kept in lineage.items()}
        prune.cut(distiller, prune.choose_units(in_order, first, last), last, per_unit=(lineage,))
        widths = last
        if args.init == "random":
            torch.manual_seed(args.seed)
            fresh = Bert(student.config, student.bert.pooler is not None, student.cls is not None)
            student.load_state_dict(fresh.state_dict())
    optimizer = make_optimizer(distiller, args.weight_decay)
    if saved:
        run.restore_moments(distiller, optimizer, tensors)
    prune_start, prune_end = args.prune_start * args.steps, args.prune_end * args.steps
    eval_every = args.eval_every or max(1, args.steps // 10)
    eval_rows = min(args.eval_rows, len(heldout))

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def losses_of(module: nn.Module, step: int, begin: int, end: int) -> dict[str, torch.Tensor]:
        batch = rows.training_batch(args.seed, step, args.batch_size, begin, end).to(device)
        with autocast():
            with torch.no_grad():
                target = teacher(batch.input_ids, batch.positions, want_scores=distiller.want_scores)
            return module(batch, target)

    # The processes: each has its rows of every batch, and takes them as many at a time as its memory holds.
    run.join_processes(device)
    first_row, last_row = run.share_of(args.batch_size)

    def trial(count: int):
        moments = [torch.empty_like(p) for p in distiller.parameters() for _ in range(2 * (not optimizer.state))]
        losses_of(distiller, 0, first_row, first_row + count)["loss"].backward()
        del moments  # the optimizer will want as much
        optimizer.zero_grad()

    def fit() -> int:
        if args.micro_batch_size or device.type == "cpu":
            return min(args.micro_batch_size or 64, last_row - first_row)
        return largest_micro_batch(trial, last_row - first_row)

    micro, fitted_width = record["micro_batch_size"] if saved else fit(), widths.hidden

    def fit_batches(units: int, step: int):
        return improve.fit_batches(rows, units, args.seed, step, args.batch_size, micro, device)

    if args.align_heads and not saved:
        improve.align_heads(student, fit_batches(first.hidden, 0))
    all_used = all(alphas.values()) or teacher.cls is None and all(alphas[name] for name in ("hidn", "emb", "attn"))
    engine = run.parallel(distiller, all_used)

    if not args.resume:
        run.start_run(args, traces)
    if run.RANK == 0:
        run.truncate_log(args.output / "log.jsonl", begun if saved else -1)
    print(f"{args.teacher}: {teacher.parameter_count() / 1e6:.1f} M parameters, D F H K {tuple(first)} -> "
          f"{tuple(last)}\n{args.steps} steps of {args.batch_size} x {args.seq_length} tokens on {device}"
          f"{f' and {run.WORLD - 1} more' * (run.WORLD > 1)}; {len(rows):,} rows of text, {len(heldout):,} held out")
    if saved:
        print(f"resumed after step {begun}")
    with (
        open(args.output / "log.jsonl" if run.RANK == 0 else os.devnull, "a") as log_file,
        tqdm(total=args.steps, initial=begun, unit="step", desc="distill", disable=None) as progress,
        run.Interrupts() as interrupts,
    ):
        def log(event: str, **values):
            log_file.write(json.dumps({"event": event, **values}) + "\n")
            log_file.flush()

        def evaluation() -> dict:
            return evaluate(distiller, teacher, heldout, eval_rows, micro, device, autocast)

        def log_evaluation(step: int) -> dict:
            result = evaluation()
            log("eval", step=step, **result)
            progress.write("step {:>6}  D {:>4}  F {:>4}  H {:>2}  K {:>2}  ".format(step, *widths) + "  ".join(
                f"{name} {value:.3f}" for name, value in result.items() if not name.startswith("teacher")))
            return result

        def write_student(name: str):
            if run.RANK == 0:
                export(student, tokenizer, {} if args.init == "random" else lineage, args.output / name)

        def save(step: int):
            if run.RANK == 0:
                run.flush(args.output / "log.jsonl")
                tensors = run.snapshot(distiller, optimizer, {"sensitivity": sensitivity, "lineage": lineage})
                checkpoints.save(step, tensors, {"widths": widths._asdict(), "micro_batch_size": micro,
                                                 "evaluation": result})

        def stop(after: int):
            save(after)
            checkpoints.wait()
            raise run.Interrupted(interrupts.number, f"interrupted after step {after}, which is saved; to go on: "
                                  f"python distill.py --resume --output {args.output}")

        if not saved:
            result = log_evaluation(0)
        clock, tokens_seen, saved_at = time.perf_counter(), 0, time.monotonic()
        for step in range(begun, args.steps):
            # Batch, losses and gradients, one micro-batch at a time. The processes' gradients are averaged in the last.
            while True:  # once, unless the GPU's memory turns out too small
                torch.manual_seed(((args.seed * args.steps + step) * run.WORLD + run.RANK) % 2**63)  # of dropout
                losses: dict[str, torch.Tensor] = {}
                try:
                    for begin in range(first_row, last_row, micro):
                        if interrupts.overdue():
                            stop(step)  # nothing of this step has touched the state yet
                        end = min(begin + micro, last_row)
                        with engine.no_sync() if run.WORLD > 1 and end < last_row else contextlib.nullcontext():
                            part = losses_of(engine, step, begin, end)
                            share = (end - begin) / args.batch_size  # all rows have as many masked positions
                            (part["loss"] * share * run.WORLD).backward()
                        for name, value in part.items():
                            losses[name] = losses.get(name, 0.0) + value.detach() * share
                    break
                except torch.OutOfMemoryError:
                    if args.micro_batch_size or run.WORLD > 1 or micro == 1:
                        raise
                    micro = -(-micro // 2)
                    optimizer.zero_grad()
            del part  # nothing may hold the graph of a step over a cut
            values = run.total(dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True)))

            # Sensitivity: complete gradients, not yet clipped, with the weights that they belong to.
            if widths != last:
                prune.accumulate_sensitivity(sensitivity, distiller, args.sensitivity_decay)

            # Adam.
            norm = nn.utils.clip_grad_norm_(distiller.parameters(), args.clip or float("inf")).item()
            if not math.isfinite(norm + values["loss"]):
                told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                raise InputError(f"step {step + 1}: loss or gradient is not finite ({told}, gradient norm "
                                 f"{norm:.4g}); try a smaller --learning-rate, or check the teacher's weights")
            rate = learning_rate(step, args.steps, args.learning_rate, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

            # The schedule, and the cut: parameters, moments, projections, sensitivities, lineage.
            scheduled = prune.scheduled_widths(step + 1, prune_start, prune_end, start, last, args.granularity,
                                               args.prune_power)
            new = prune.next_widths(widths, scheduled, snapshots)
            if new != widths:
                if widths in snapshots:
                    write_student(f"student-{widths.hidden}")
                around = {"eval_before": evaluation()} if args.eval_cuts else {}
                cut_at = run.now(device)
                importance = prune.unit_importance(args.importance, distiller, sensitivity, args.seed + step)
                keep = prune.choose_units(importance, widths, new)
                run.check_agreement(step + 1, keep)
                if args.compensate:
                    improve.compensate(distiller, keep, fit_batches(max(map(len, keep.values())), step + 1))
                prune.cut(distiller, keep, new, optimizer, (sensitivity, lineage))
                milliseconds = (run.now(device) - cut_at) * 1000
                if args.eval_cuts:
                    around["eval_after"] = evaluation()
                log("cut", step=step + 1, before=widths._asdict(), after=new._asdict(), milliseconds=milliseconds,
                    **around)
                widths = new
                if widths.hidden * 2 <= fitted_width:
                    micro, fitted_width = fit(), widths.hidden
                engine = run.parallel(distiller, all_used)

            # What is seen of it.
            progress.update()
            tokens_seen += args.batch_size * args.seq_length
            if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
                speed = tokens_seen / (time.perf_counter() - clock)
                log("train", step=step + 1, tokens=(step + 1) * args.batch_size * args.seq_length,
                    loss=values["loss"], **{f"loss_{name}": value for name, value in values.items() if name != "loss"},
                    D=widths.hidden, F=widths.intermediate, H=widths.heads, K=widths.head_size,
                    parameters=student.parameter_count(), learning_rate=rate, gradient_norm=norm,
                    tokens_per_second=speed, memory_mb=run.memory_mb(device))
                progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()} |
                                     dict(D=widths.hidden, F=widths.intermediate, tok_s=f"{speed:,.0f}"))
                clock, tokens_seen = time.perf_counter(), 0
            before = time.perf_counter()
            if (step + 1) % eval_every == 0 or step + 1 == args.steps:
                result = log_evaluation(step + 1)

            # What is kept of it.
            if interrupts.agreed():
                stop(step + 1)
            if (step + 1 == args.steps or args.save_every and (step + 1) % args.save_every == 0
                    or time.monotonic() - saved_at >= 60 * args.save_minutes):
                save(step + 1)
                saved_at = time.monotonic()
            clock += time.perf_counter() - before
        checkpoints.wait()

        write_student("student")

    if run.RANK == 0:
        shutil.rmtree(checkpoints.folder)
        milliseconds = milliseconds_per_sequence([teacher, student], heldout, device, autocast)
        print(end_table(teacher, student, result, milliseconds))
        print(f"student: {args.output / 'student'}")
    return args.output / "student"


# ---- The run folder ------------------------------------------------------------------------------------------


def export(student: Bert, tokenizer, lineage: dict[str, torch.Tensor], folder: Path):
    """Write the student as a standard checkpoint that appears complete or not at all, with `lineage.json`: set of units
    -> for every unit its index in the teacher."""
    work = folder.with_name("student.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    model.save_model(student, work)
    data.save_tokenizer(tokenizer, work, student.config.max_position_embeddings)
    shutil.rmtree(folder, ignore_errors=True)  # a snapshot that a resumed run comes past again
    indices = {units: kept.tolist() for units, kept in lineage.items()}
    (work / "lineage.json").write_text(json.dumps(indices, sort_keys=True) + "\n")
    run.publish(work, folder)


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
    """The flags: defaults from FLAGS, then from DEMO or the preset, or, with --resume, those that the run began with;
    then what is given. Raises InputError."""
    parser = Parser(description="Distil a BERT into a narrower one, cutting its width step by step (HomoDistil).",
                    epilog="Without --teacher and --preset a bundled teacher learns on bundled text, with its own "
                    f"defaults: {', '.join(f'{k} {v}' for k, v in list(DEMO.items())[2:])}.", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    defaults = {}
    for flag, default, kind, meaning in FLAGS:
        defaults[flag[2:].replace("-", "_")] = default
        options = {"help": meaning if default is None or default is False else f"{meaning} [{default}]"}
        if kind is bool:
            options["action"] = "store_true"
        elif kind is list:
            options["nargs"] = "+"
        elif callable(kind):
            options["type"] = kind
        else:
            options["choices"] = kind
        parser.add_argument(flag, **options)
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if word.encode(errors="replace").decode() != word:  # the libraries that write the student cannot spell it
            raise InputError(f"{word!a}: a name that is not UTF-8; give that file or folder another one")
    given = vars(parser.parse_args(argv))
    demo = "teacher" not in given and "preset" not in given
    usual = {"teacher": "bert-base-uncased", "corpus": [HUB_CORPUS]}
    flags = defaults | usual | (DEMO if demo else PRESETS.get(given.get("preset"), {}))
    flags |= RECIPES.get(given.get("recipe"), {}) | given
    if flags["output"] is None:
        name = Path(flags["teacher"]).resolve().name + (f"-{flags['target_width']}" if flags["target_width"] else "")
        flags["output"] = Path("runs") / ("demo" if demo else name)
    if flags["resume"]:
        flags = resumed_flags(flags["output"], given) | {"output": flags["output"]}
    args = argparse.Namespace(**flags)
    if args.prune_start > args.prune_end:
        raise InputError(f"--prune-start {args.prune_start} is after --prune-end {args.prune_end}")
    return args


def resumed_flags(output: Path, given: dict) -> dict:
    """The flags of the run in `output`, and those given now that may differ. Raises InputError."""
    if given.get("overwrite"):
        raise InputError("--resume and --overwrite: give one of them")
    if not (output / "run.json").is_file():
        raise InputError(f"--resume: there is no run in {output}; name its folder with --output")
    record = read_json(output / "run.json")
    began = record.get("flags")
    if not isinstance(began, dict) or set(began) != {flag[2:].replace("-", "_") for flag, *_ in FLAGS}:
        raise InputError(f"--resume: {output / 'run.json'} was written by another version of this program")
    if record.get("checksum") != run.record_hash(record):
        raise InputError(f"--resume: {output / 'run.json'} is damaged: its checksum is another one; start anew with "
                         "--overwrite")
    for name, value in given.items():
        if name not in MAY_CHANGE and json.loads(json.dumps(value, default=str)) != began[name]:
            raise InputError(f"--resume: --{name.replace('_', '-')} was {began[name]} when the run began, now {value}; "
                             "it would end elsewhere: leave the flag out")
    return began | {"cache_dir": Path(began["cache_dir"])} | given


def main(argv: list[str] | None = None) -> int:
    try:
        with run.only_the_first_speaks():
            distill(parse_arguments(argv))
            run.leave_processes()
    except run.Interrupted as error:
        print(f"distill.py: {error}", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("distill.py: interrupted before the first step", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print("distill.py: error: the GPU's memory is full; give a smaller --micro-batch-size", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"distill.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"distill.py: error: {error}; when that is mended, --resume goes on from the last checkpoint",
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
