"""Homotopic distillation of BERT (HomoDistil: Liang et al., ICLR 2023, algorithm 1).

The student starts as a copy of the teacher. In every step it learns from the teacher on open text and the sensitivity
of its weights is accumulated; whenever the cubic schedule asks for it, the least important units are sliced out of its
weight matrices. `distill` below is that loop; the losses are defined above it.

    python distill.py                                                     demonstration on the CPU, minutes
    python distill.py --teacher bert-base-uncased --target-width 384      the paper's settings, for GPUs

Shape letters as in model.py; the subscripts t and s are teacher and student.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import prune
from extensions.align_heads import align_heads
from extensions.compensate import compensate, fit_batches
from model import Bert, Linear, Output
from support import distributed
from support.errors import InputError, run_program
from support.flags import COUNT, FRACTION, NONNEGATIVE, Flag, number, parse_flags
from support.session import Session

# ---- The method's settings -----------------------------------------------------------------------------------
# The defaults are the paper's, unless the help texts mark them as "our choice" or "our extension".

COMPENSATED = {"align_heads": True, "compensate": True, "prune_start": 1 / 30, "prune_end": 1 / 30}
SMALL_STUDENT = {"teacher": "bert-base-uncased", "learning_rate": 6e-4}
PRESETS = {
    "homobert-base": {"teacher": "bert-base-uncased", "target_width": 576, "target_intermediate": 2304},
    "homobert-small": SMALL_STUDENT | {"target_width": 256, "target_intermediate": 1024},
    "homobert-xsmall": SMALL_STUDENT | {"target_width": 240, "target_intermediate": 960},
    "homobert-tiny": SMALL_STUDENT | {"target_width": 224, "target_intermediate": 896},
    "compensated": COMPENSATED,
    "imitation": COMPENSATED | {"alpha_mlm": 0.0},
    "demo": {"teacher": str(Path(__file__).resolve().parent / "teachers" / "small"), "corpus": ["demo"], "steps": 300,
             "batch_size": 16, "learning_rate": 2e-3},
}
METHOD_FLAGS = (
    Flag("--preset", [], list, f"Named settings, one or more of {', '.join(PRESETS)}. Explicit flags override them. "
         "homobert-*: the paper's students. compensated: our extensions, with everything pruned at "
         "once at a thirtieth of the run. imitation: the same without the masked-LM loss, closest to the "
         "teacher. demo: minutes on a CPU, no network (300 steps of 16 rows, learning rate 2e-3)."),
    Flag("--target-width", None, int, "Hidden size D of the student. Default: half of the teacher's."),
    Flag("--target-intermediate", None, int, "Feed-forward size F of the student. Default: in proportion to D."),
    Flag("--target-heads", None, int, "Attention heads H of the student. Default: the largest number, from the "
         "teacher's down to half of it, that divides D into heads no wider than the teacher's. In our runs, "
         "heads of 16 dimensions did better than twice as many of 8."),
    Flag("--steps", 28_000, COUNT, "Optimizer steps."),
    Flag("--batch-size", 4096, COUNT, "Rows per step, over all micro-batches and processes."),
    Flag("--learning-rate", 3e-4, NONNEGATIVE, "Peak learning rate. The paper uses 6e-4 for its smaller students."),
    Flag("--warmup", 0.1, FRACTION, "Fraction of the run in which the learning rate rises; then it falls to zero. "
         "Our choice."),
    Flag("--weight-decay", 0.01, NONNEGATIVE, "Decoupled weight decay of the matrices. Our choice: BERT's."),
    Flag("--clip", 1.0, NONNEGATIVE, "Maximum gradient norm, 0 for none. Our choice: BERT's."),
    Flag("--dropout", 0.0, number(float, 0, 0.99), "Dropout of the student. Our choice: 0, so the "
         "distillation losses start at 0."),
    Flag("--alpha-mlm", 1.0, NONNEGATIVE, "Weight of the masked-LM loss; 0 drops a loss. All weights are our choice."),
    Flag("--alpha-pred", 1.0, NONNEGATIVE, "Weight of the KL divergence from the teacher's predictions."),
    Flag("--alpha-hidn", 1.0, NONNEGATIVE, "Weight of the distance between layer outputs."),
    Flag("--alpha-emb", 1.0, NONNEGATIVE, "Weight of the distance between embedding outputs."),
    Flag("--alpha-attn", 1.0, NONNEGATIVE, "Weight of the distance between attention scores."),
    Flag("--alpha-pool", 1.0, NONNEGATIVE, "For sentence encoders: weight of the distance between sentence vectors "
         "(our extension)."),
    Flag("--temperature", 1.0, number(float, 1e-3, 1e3), "Temperature tau of the KL divergence. Our choice."),
    Flag("--prune-start", 0.0, FRACTION, "Fraction of the run at which pruning starts, t_i. Our choice."),
    Flag("--prune-end", 0.7, number(float, 0, 0.9), "Fraction of the run at which the target shape is reached, t_f "
         "(our choice). The rest is for recovery. Equal to --prune-start: all is pruned at once."),
    Flag("--prune-power", 3.0, number(float, 0.1, 100), "Exponent of the schedule. 3 is cubic, 1 is linear."),
    Flag("--granularity", 8, COUNT, "Hidden dimensions, and dimensions of each head, pruned at a time; 4 times as many "
         "feed-forward neurons (our choice)."),
    Flag("--importance", "sensitivity", ("sensitivity", "platon", "magnitude", "random"), "Pruning criterion. "
         "Our choice: sensitivity. Another paper says that HomoDistil used platon."),
    Flag("--sensitivity-decay", 0.9, number(float, 0, 0.9999), "Decay of the sensitivities' moving average per step "
         "(our choice: about ten steps, which steadies the ranking)."),
    Flag("--init", "teacher", ("teacher", "truncated", "random"), "Where the student starts: as the teacher or, for "
         "comparison, at its target shape with the teacher's first units or with random weights."),
    Flag("--align-heads", False, bool, "Before training, change the basis of every head so that its first dimensions "
         "matter most; the model computes the same (our extension: pruning heads does less harm)."),
    Flag("--compensate", False, bool, "Before each prune, fit the pruned units as linear functions of the kept ones, "
         "by least squares on training text, and fold this into the weights (our extension: pruning does less harm)."),
)
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-6


# ---- The losses ----------------------------------------------------------------------------------------------


def vocabulary_losses(student_logits, teacher_logits, labels, temperature: float):
    """L_MLM, the cross entropy at the masked positions, and L_pred = tau^2 KL(softmax(z_t/tau) || softmax(z_s/tau)).

    Logits (M,V), labels (M,); both losses are means over the M positions.
    """
    log_q, log_p = (F.log_softmax(logits.float(), dim=-1) for logits in (student_logits, teacher_logits))
    masked_lm = F.nll_loss(log_q, labels)
    if temperature != 1:  # log-probabilities serve as logits: they differ by a constant, which softmax ignores
        log_q, log_p = (F.log_softmax(log_probs / temperature, dim=-1) for log_probs in (log_q, log_p))
    return masked_lm, F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2


def mean_mse(student: list[torch.Tensor], teacher: list[torch.Tensor]):
    """The mean squared error of each pair of tensors, averaged over the layers: L_hidn, L_emb and L_attn."""
    return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)) / len(teacher)


def ranking_loss(student: Output, labels):
    """A loss that only ranks the units, while all distillation losses are zero [ours]: L_MLM or, without a head, the
    mean squared error between the last output and a noisy copy of it. No weight is trained on it. The latter's gradient
    is that of a Gaussian likelihood at a sampled target, as in the Fisher information."""
    if student.logits is not None:
        return F.cross_entropy(student.logits.float(), labels)
    output = student.hidden[-1].float()  # (B,S,D)
    return F.mse_loss(output, (output + torch.randn_like(output)).detach())


class Distiller(nn.Module):
    """The student and the projections W_hidn^k (one per layer k) and W_emb, which map its states to the teacher's.

    All projections start as the identity, so that every distillation loss is exactly zero as long as the student,
    without dropout, is the teacher. They are pruned with the hidden group and dropped at export.
    """

    def __init__(self, student: Bert, alphas: dict[str, float], temperature: float = 1.0, encoder=None):
        super().__init__()
        hidden_size = student.config.hidden_size
        self.student = student
        self.hidden_projections = nn.ModuleList(
            Linear(hidden_size, hidden_size, bias=False) for _ in range(student.config.num_hidden_layers))  # W_hidn^k
        self.embedding_projection = Linear(hidden_size, hidden_size, bias=False)  # W_emb
        for projection in (*self.hidden_projections, self.embedding_projection):
            nn.init.eye_(projection.weight)
        self.alphas = {name: alpha for name, alpha in alphas.items() if alpha > 0}
        self.temperature, self.encoder = temperature, encoder  # encoder: a SentenceEncoder or None

    def forward(self, batch: data.Batch, teacher: Output, ranking: bool = False) -> dict[str, torch.Tensor]:
        """All losses by name, and `loss`, their sum weighted by `alphas`; in the paper (section 3.1) it is
        L = L_MLM + a1 L_pred + a2 L_hidn + a3 L_emb + a4 L_attn. A loss of weight 0 is left out. With `ranking`,
        `ranking_loss` is added."""
        alphas = self.alphas | ({"ranking": 1.0} if ranking else {})
        student = self.student(batch.input_ids, batch.positions, want_scores="attn" in alphas)
        losses = {}
        if "mlm" in alphas or "pred" in alphas:
            losses["mlm"], losses["pred"] = vocabulary_losses(student.logits, teacher.logits, batch.labels,
                                                              self.temperature)
        if "hidn" in alphas:
            losses["hidn"] = mean_mse(self.project_hidden(student.hidden), teacher.hidden)
        if "pool" in alphas:
            losses["pool"] = self.encoder.distance(self.hidden_projections[-1](student.hidden[-1]), teacher.hidden[-1])
        if "emb" in alphas:
            losses["emb"] = mean_mse([self.embedding_projection(student.embedding)], [teacher.embedding])
        if "attn" in alphas:
            losses["attn"] = mean_mse(student.scores, teacher.scores)
        if ranking:
            losses["ranking"] = ranking_loss(student, batch.labels)
        losses = {name: losses[name] for name in alphas}
        return {"loss": sum(alphas[name] * loss for name, loss in losses.items())} | losses

    def project_hidden(self, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        """H_s^k W_hidn^k for the layers k: L times (B,S,D_s) -> (B,S,D_t)."""
        return [project(h) for project, h in zip(self.hidden_projections, hidden, strict=True)]

    def uses_all_parameters(self) -> bool:
        """Whether every trained parameter gets a gradient in every step."""
        head = self.student.cls is None or self.alphas.keys() & {"mlm", "pred"}
        return bool(head) and {"hidn", "emb"} <= self.alphas.keys()


# ---- The state of a run, and its optimizer -------------------------------------------------------------------


@dataclasses.dataclass
class TrainingState:
    """Everything that the loop changes. A checkpoint holds all of it but the engine, which is built again."""

    step: int  # finished optimizer steps
    distiller: Distiller
    optimizer: torch.optim.AdamW
    lineage: dict[str, torch.Tensor]  # group -> (units,), indices in the (aligned) teacher
    statistics: dict[str, dict[str, torch.Tensor]] = dataclasses.field(default_factory=dict)  # of importance
    engine: nn.Module | None = None  # the distiller, wrapped for several processes

    @property
    def shape(self) -> prune.Shape:
        return prune.Shape.of(self.distiller.student.config)

    def wrap(self):
        self.engine = None  # the old wrapper holds the parameters from before the prune; free them first
        self.engine = distributed.wrap_ddp(self.distiller, self.distiller.uses_all_parameters())


def initial_state(args: argparse.Namespace, session: Session) -> TrainingState:
    """The state before the first step, with a copy of the teacher or what --init asks for as the student; or the state
    in the checkpoint to resume from. Raises InputError."""
    alphas = {name: getattr(args, f"alpha_{name}") for name in ("mlm", "pred", "hidn", "emb", "attn", "pool")}
    if session.teacher.cls is None:
        print(f"{args.teacher} has no masked-LM head, so the student gets none: L_MLM, L_pred and masks are off")
        alphas["mlm"] = alphas["pred"] = 0.0
    if session.encoder is None:
        alphas["pool"] = 0.0
    if not any(alphas.values()):
        raise InputError("all loss weights --alpha-* are zero: there is nothing to learn")
    student = copy.deepcopy(session.teacher).requires_grad_(True)
    student.set_dropout(args.dropout)
    if student.bert.pooler is not None:
        student.bert.pooler.requires_grad_(False)  # no loss reaches the pooler; it is only sliced
    distiller = Distiller(student, alphas, args.temperature, session.encoder).to(session.device).train()
    optimizer = make_optimizer(distiller, args.weight_decay)
    state = TrainingState(0, distiller, optimizer, prune.teacher_indices(distiller))
    if args.align_heads and not session.saved:  # before a student is truncated
        align_heads(student, fit_batches(session, state.shape.hidden_size, step=0))
    if session.saved:
        session.restore(state)
    elif args.init != "teacher":  # for comparison: start at the target shape
        prefer_first = {group: -indices for group, indices in state.lineage.items()}  # in place of importance
        keep = prune.choose_units(prefer_first, state.shape, session.target_shape)
        prune.prune_units(distiller, keep, session.target_shape, state.optimizer, (state.lineage,))
        if args.init == "random":
            torch.manual_seed(args.seed)
            fresh = Bert(student.config, student.bert.pooler is not None, student.cls is not None)
            student.load_state_dict(fresh.state_dict())
    state.wrap()
    return state


def make_optimizer(model: nn.Module, weight_decay: float, betas=ADAM_BETAS) -> torch.optim.AdamW:
    """AdamW. Weight decay applies to matrices, but not to biases, LayerNorms and the projections, which belong near the
    identity."""
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if parameter.dim() == 1 or "projection" in name else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=ADAM_EPS, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step 0, 1, ...: it rises linearly to the peak in the first `warmup` of the run, then falls linearly
    to near zero."""
    warmup_steps = round(warmup * steps)
    rising = (step + 1) / warmup_steps if warmup_steps else 1.0
    return peak * min(rising, (steps - step) / max(steps - warmup_steps, 1))


# ---- The loop ------------------------------------------------------------------------------------------------


def losses_and_gradients(session: Session, state: TrainingState, batch: data.Batch, fraction: float, is_last: bool,
                         ranking: bool) -> dict[str, torch.Tensor]:
    """Add the gradients of one micro-batch, `fraction` of the global batch, and return its share of the losses.
    Several processes average their gradients in the last micro-batch."""
    with distributed.sync_only_if(state.engine, is_last):
        with session.autocast():
            with torch.no_grad():
                teacher = session.teacher(batch.input_ids, batch.positions,
                                          want_scores="attn" in state.distiller.alphas)  # its Output
            losses = state.engine(batch, teacher, ranking)
        (losses["loss"] * fraction * distributed.WORLD).backward()  # DDP averages over the WORLD; this makes it a sum
    return {name: loss.detach() * fraction for name, loss in losses.items()}


def distill(args: argparse.Namespace, session: Session, state: TrainingState):
    """Algorithm 1: distil and prune the student in `state` until step `args.steps`."""
    distiller, optimizer = state.distiller, state.optimizer
    prune_start, prune_end = args.prune_start * args.steps, args.prune_end * args.steps
    start_shape = session.teacher_shape if args.init == "teacher" else session.target_shape
    while state.step < args.steps:
        # 1. Losses and gradients, one micro-batch at a time. In a student that equals the teacher only L_MLM has a
        #    gradient. If it is off, `ranking_loss` ranks the units until the first prune, and AdamW waits.
        ranking = "mlm" not in distiller.alphas and state.shape == session.teacher_shape
        losses: dict[str, torch.Tensor] = {}
        for batch, fraction, is_last in session.micro_batches(state):
            part = losses_and_gradients(session, state, batch, fraction, is_last, ranking)
            losses = {name: losses.get(name, 0.0) + value for name, value in part.items()}

        # 2. Importance, from complete, unclipped gradients and the weights at which they were taken.
        if state.shape != session.target_shape:
            prune.accumulate_importance(args.importance, state.statistics, distiller.student, args.sensitivity_decay)

        # 3. Clip the gradients; AdamW.
        gradient_norm = nn.utils.clip_grad_norm_(distiller.parameters(), args.clip or float("inf"))
        *values, gradient_norm = torch.stack([*losses.values(), gradient_norm]).tolist()  # waits for the GPU
        losses = distributed.all_reduce_sum(dict(zip(losses, values, strict=True)))
        session.check_finite(state, losses, gradient_norm)
        rate = learning_rate(state.step, args.steps, args.learning_rate, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if not ranking:
            optimizer.step()
        optimizer.zero_grad()

        # 4. When the schedule asks for it: rank, choose, prune weights, moments, lineage and statistics.
        new_shape = prune.scheduled_shape(state.step + 1, prune_start, prune_end, start_shape, session.target_shape,
                                          args.granularity, args.prune_power)
        if new_shape != state.shape:
            with session.logged_prune(state):
                importance = prune.unit_importance(args.importance, state.statistics, distiller.student,
                                                   args.seed + state.step)
                keep = prune.choose_units(importance, state.shape, new_shape)
                distributed.check_same_units(state.step + 1, keep)
                if args.compensate:
                    largest = max(map(len, keep.values()))  # units that one group keeps
                    compensate(distiller, keep, fit_batches(session, largest, state.step + 1))
                prune.prune_units(distiller, keep, new_shape, optimizer, (state.lineage, *state.statistics.values()))
                if new_shape == session.target_shape:
                    state.statistics = {}  # no longer needed
            state.wrap()  # DDP must be rebuilt around the new parameters

        # 5. Log, evaluate and save. A signal stops the run before the next micro-batch.
        state.step += 1
        session.end_step(state, losses, rate, gradient_norm)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    args = parse_flags(argv, "Shrink a pretrained BERT by pruning it while it is distilled.", METHOD_FLAGS, PRESETS)
    if args.prune_start > args.prune_end:
        raise InputError(f"--prune-start {args.prune_start} is after --prune-end {args.prune_end}")
    return args


def run(args: argparse.Namespace):
    """Run what the flags ask for. Raises InputError, and Interrupted if a signal ended the run."""
    if args.resume and (args.output / "student").is_dir():
        print(f"{args.output} is finished")
        return
    session = Session(args)
    state = initial_state(args, session)
    with session.running(state):
        distill(args, session, state)


def main(argv: list[str] | None = None) -> int:
    return run_program("distill.py", lambda: run(parse_arguments(argv)),
                       resume_hint="to continue, use --resume --output FOLDER, or rerun the command if FOLDER holds no "
                                   "run",
                       memory_hint="use a smaller --micro-batch-size")


if __name__ == "__main__":
    sys.exit(main())
