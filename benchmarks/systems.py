"""The same training step in four versions with one interface, and the check that they compute the same losses.

    ours            the step of distill.py: pruning slices the matrices
    compiled        the same with support/fast.py, as in long runs on a GPU
    stock-best      our best step from stock modules of `transformers`: fused attention (eager if faster), logits at
                    masked positions, head-averaged scores in one matmul, fused optimizer, sensitivities per unit;
                    pruning by masks
    research code   as research code on top of `transformers` is usually written: logits and KL at all positions,
                    attention scores of every head, default optimizer, sensitivities per weight; pruning by masks
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from common import PAPER
from torch import nn
from transformers import AttentionInterface, BertForMaskedLM
from transformers import BertConfig as StockConfig

import distill
import prune
from data import MASKED_FRACTION, Batch
from distill import ADAM_BETAS, ADAM_EPS, Distiller, mean_mse
from model import Bert, BertConfig, Output, mean_attention_scores
from prune import Shape
from support import fast
from support.distributed import autocast, find_device, synchronized_time
from support.shapes import target_shape

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPES = {  # teacher, tokens per row, rows per step on the CPU
    "base": (BertConfig(30_522, 768, 12, 12, 3072, **NO_DROPOUT), 128, 8),
    "small": (BertConfig(30_522, 256, 4, 8, 1024, **NO_DROPOUT), 128, 16),
    "toy": (BertConfig(211, 32, 2, 4, 96, **NO_DROPOUT), 16, 3),  # for the tests
}
ALPHAS = {"mlm": 1.0, "pred": 1.0, "hidn": 1.0, "emb": 1.0, "attn": 1.0}
TOLERANCE = 1e-3  # relative difference of every loss


# ---- The three systems ---------------------------------------------------------------------------------------


class Ours:
    """The loop of distill.py, one step at a time."""

    sliced = True  # whether the student's matrices get smaller with its shape
    all_positions = False  # whether logits are computed at unmasked positions
    score_matmul = True  # whether the compared scores need a matmul beside that of the attention

    def __init__(self, teacher: Bert, student: Bert, config: BertConfig, device: torch.device, bf16: bool):
        self.config, self.device, self.bf16 = config, device, bf16
        self.shape, self.target_shape = Shape.of(config), target(config)
        self.teacher = self.convert(teacher).to(device).eval().requires_grad_(False)
        self.distiller = self.make_distiller(self.convert(student)).to(device).train()
        self.optimizer = self.make_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = PAPER.learning_rate
        self.sensitivity: dict[str, torch.Tensor] = {}
        self.prepare(student)

    def convert(self, bert: Bert) -> nn.Module:
        return bert

    def make_distiller(self, student: nn.Module) -> Distiller:
        return Distiller(student, ALPHAS)

    def make_optimizer(self):
        return distill.make_optimizer(self.distiller, PAPER.weight_decay)

    def prepare(self, student: Bert):
        self.lineage = prune.teacher_indices(self.distiller)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        with autocast(self.device, self.bf16):
            with torch.no_grad():
                target = self.teacher(batch.input_ids, batch.positions, want_scores=True)
            return self.distiller(batch, target)

    def step(self, batches: list[Batch]):
        """One optimizer step over micro-batches, in the order of distill.py."""
        total = 0.0
        for batch in batches:
            loss = self.losses(batch)["loss"] / len(batches)
            loss.backward()
            total += loss.detach()
        if self.shape != self.target_shape:
            self.accumulate_sensitivity()
        norm = nn.utils.clip_grad_norm_(self.distiller.parameters(), PAPER.clip)
        if not torch.isfinite(norm + total):
            raise RuntimeError("loss or gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.apply_masks()

    def accumulate_sensitivity(self):
        prune.accumulate_importance("sensitivity", {"sensitivity": self.sensitivity}, self.distiller.student,
                                    PAPER.sensitivity_decay)

    def apply_masks(self):
        """Nothing to do: pruned units do not exist."""

    def prune_to(self, new_shape: Shape, importance: dict[str, torch.Tensor]) -> float:
        """Prune to `new_shape` and return the seconds that it took."""
        start = synchronized_time(self.device)
        keep = prune.choose_units(importance, self.shape, new_shape)
        prune.prune_units(self.distiller, keep, new_shape, self.optimizer, (self.lineage, self.sensitivity))
        self.shape = new_shape
        return synchronized_time(self.device) - start

    @classmethod
    def flops_per_token(cls, config: BertConfig, seq_length: int, shape: Shape) -> float:
        """Operations in the matmuls of a step: teacher forward, student forward, and twice that backward."""
        logits = 1.0 if cls.all_positions else masked_positions(seq_length) / seq_length
        scores = 2 * seq_length * cls.score_matmul

        def forward(s: Shape) -> float:
            hidden, inner = s.hidden_size, s.num_heads * s.head_size
            layer = 8 * hidden * inner + 4 * hidden * s.intermediate_size + (4 * seq_length + scores) * inner
            return config.num_hidden_layers * layer + logits * 2 * hidden * (hidden + config.vocab_size)

        teacher = Shape.of(config)
        student = shape if cls.sliced else teacher
        projections = 2 * (config.num_hidden_layers + 1) * student.hidden_size * teacher.hidden_size
        return forward(teacher) + 3 * (forward(student) + projections)


class Compiled(Ours):
    """It replaces functions of distill.py, so no other system can be used in its process until `undo` is closed."""

    backend = "inductor"

    def prepare(self, student: Bert):
        super().prepare(student)
        self.undo = contextlib.ExitStack()
        fast.switch_on(self.undo, self.distiller.student, self.teacher, distill, self.backend)


class StockBert(BertForMaskedLM):
    """A stock BERT that returns what the losses need: logits at `positions`, scores from one matmul per layer."""

    def forward(self, input_ids, positions, want_scores) -> Output:
        projected = []
        attention = [layer.attention.self for layer in self.bert.encoder.layer]
        hooks = [linear.register_forward_hook(lambda _, inputs, output: projected.append(output))
                 for module in attention for linear in (module.query, module.key)]
        embedding, *hidden = self.bert(input_ids, output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        scores = [mean_attention_scores(q, k, self.config.num_attention_heads)
                  for q, k in zip(projected[::2], projected[1::2], strict=True)]
        return Output(embedding, hidden, scores, self.cls(hidden[-1].flatten(0, 1)[positions]))


class StockBest(Ours):
    """As good as stock modules allow. They cannot lose a few dimensions, so masks take the place of slicing."""

    sliced = False
    bert, attention = StockBert, "sdpa"

    def convert(self, bert: Bert) -> nn.Module:
        config = StockConfig(**{k: v for k, v in vars(self.config).items() if k != "attention_head_size"})
        slow = self.bf16 and self.device.type == "cpu" and self.attention == "sdpa"  # the fused kernel, in bf16
        config._attn_implementation = "eager" if slow else self.attention
        stock = self.bert(config)
        tied = {"weight": bert.bert.embeddings.word_embeddings.weight, "bias": bert.cls["predictions"].bias}
        stock.load_state_dict(bert.state_dict() | {f"cls.predictions.decoder.{name}": t for name, t in tied.items()})
        return stock

    def prepare(self, student: Bert):
        """The names are those of our model, so its structure table gives the groups of every parameter's dimensions."""
        parameters = dict(self.distiller.named_parameters())
        axes = prune.tensor_axes(Distiller(student, ALPHAS))
        self.prunable = {name: (parameters[name], dimensions) for name, dimensions in axes.items()}
        self.masks = [torch.ones_like(p) for p, _ in self.prunable.values()]

    def prune_to(self, new_shape: Shape, lineage: dict[str, torch.Tensor]):
        """Mask everything but the units in `lineage`."""
        self.shape = new_shape
        for mask, (_, dimensions) in zip(self.masks, self.prunable.values(), strict=True):
            mask.fill_(1)
            for dimension, group in dimensions.items():
                kept = torch.zeros(mask.shape[dimension], device=self.device).index_fill_(0, lineage[group], 1)
                mask.mul_(kept[:, None] if mask.dim() == 2 and dimension == 0 else kept)
        self.apply_masks()

    @torch.no_grad()
    def apply_masks(self):
        torch._foreach_mul_([p for p, _ in self.prunable.values()], self.masks)

    @torch.no_grad()
    def accumulate_sensitivity(self):
        sums: dict[str, torch.Tensor] = {}
        for name, (p, dimensions) in self.prunable.items():
            if "projection" in name:  # not a part of the student
                continue
            values = (p * p.grad).abs_()
            for dimension, group in dimensions.items():
                total = values.sum(1 - dimension) if values.dim() == 2 else values
                sums[group] = sums[group] + total if group in sums else total
        for group, total in sums.items():
            self.sensitivity.setdefault(group, total).lerp_(total, 1 - PAPER.sensitivity_decay)


def attention_with_scores(module, query, key, value, mask, scaling, dropout=0.0, **_):
    """Eager attention as in `transformers`. It also keeps the scores before the softmax, (B,H,S,S)."""
    module.scores = query @ key.transpose(2, 3) * scaling
    weights = F.dropout(module.scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("with_scores", attention_with_scores)


class ResearchBert(BertForMaskedLM):
    def forward(self, input_ids, positions=None, want_scores=True) -> Output:
        output = super().forward(input_ids, output_hidden_states=True, output_attentions=True)
        scores = [vars(layer.attention.self).pop("scores").mean(1) for layer in self.bert.encoder.layer]
        return Output(output.hidden_states[0], output.hidden_states[1:], scores, output.logits)  # logits (B,S,V)


class ResearchDistiller(Distiller):
    """The same losses from logits at all positions, of which only the masked ones count."""

    def forward(self, batch: Batch, teacher: Output) -> dict[str, torch.Tensor]:
        student = self.student(batch.input_ids)
        labels = torch.full_like(batch.input_ids, -100).flatten().index_put_((batch.positions,), batch.labels)  # (B*S,)
        log_p, log_q = (F.log_softmax(output.logits.float(), dim=-1) for output in (teacher, student))
        divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # (B,S)
        losses = {"mlm": F.cross_entropy(student.logits.flatten(0, 1).float(), labels),
                  "pred": divergence.flatten()[labels >= 0].mean(),
                  "hidn": mean_mse(self.project_hidden(student.hidden), teacher.hidden),
                  "emb": mean_mse([self.embedding_projection(student.embedding)], [teacher.embedding]),
                  "attn": mean_mse(student.scores, teacher.scores)}
        return {"loss": sum(losses.values())} | losses


class ResearchCode(StockBest):
    """As most published code is written."""

    bert, attention = ResearchBert, "with_scores"
    all_positions, score_matmul = True, False

    def make_distiller(self, student):
        return ResearchDistiller(student, ALPHAS)

    def make_optimizer(self):
        return torch.optim.AdamW(self.distiller.parameters(), betas=ADAM_BETAS, eps=ADAM_EPS,
                                 weight_decay=PAPER.weight_decay)

    @torch.no_grad()
    def accumulate_sensitivity(self):
        decay = PAPER.sensitivity_decay
        for name, p in self.distiller.named_parameters():
            sensitivity = (p * p.grad).abs()
            if name in self.sensitivity:
                sensitivity = decay * self.sensitivity[name] + (1 - decay) * sensitivity
            self.sensitivity[name] = sensitivity

    @torch.no_grad()
    def apply_masks(self):
        for mask, (p, _) in zip(self.masks, self.prunable.values(), strict=True):
            p.mul_(mask)


PEERS = {"stock-best": StockBest, "research code": ResearchCode}
SYSTEMS = PEERS | {"compiled": Compiled, "ours": Ours}  # ours is last: it takes the weights that the others copy


# ---- Before the clock runs -----------------------------------------------------------------------------------


def masked_positions(seq_length: int) -> int:
    return max(1, round(MASKED_FRACTION * (seq_length - 2)))  # per row, as in data.MaskedRows


def target(config: BertConfig) -> Shape:
    return target_shape(config, config.hidden_size // 2)


def random_batch(shape: str, rows: int, device) -> Batch:
    config, seq_length, _ = SHAPES[shape]
    ids = torch.randint(config.vocab_size, (rows, seq_length))
    columns = 1 + torch.rand(rows, seq_length - 2).argsort(1)[:, : masked_positions(seq_length)]  # (B,m)
    positions = (columns.sort(1).values + torch.arange(rows)[:, None] * seq_length).flatten()  # (M,)
    return Batch(ids, positions, torch.randint(config.vocab_size, positions.shape)).to(device)


def build(shape: str, names: list[str], device, bf16: bool) -> dict[str, Ours]:
    """The systems with equal weights: a random teacher, and a student that differs, so that no loss is zero."""
    find_device(str(device))  # sets the kernels of attention, as in distill.py
    torch.manual_seed(0)
    config = SHAPES[shape][0]
    teacher = Bert(copy.copy(config), pooler=False)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p), alpha=config.initializer_range / 2)
    return {name: SYSTEMS[name](teacher, student, config, device, bf16) for name in SYSTEMS if name in names}


def check_agreement(systems: dict[str, Ours], batch: Batch, where: str):
    """Raise RuntimeError unless the losses of all systems are ours, to TOLERANCE."""
    ours = systems["ours"].losses(batch)
    for name, system in systems.items():
        for loss, value in system.losses(batch).items():
            if not abs(value.item() - ours[loss].item()) <= TOLERANCE * abs(ours[loss].item()):
                raise RuntimeError(f"{name} does not agree with ours {where}: loss {loss} is {value.item():.6g}, "
                                   f"not {ours[loss].item():.6g}")


def check_all(shape: str, device):
    """Compare the losses in float32 at full width, and with feed-forward, query-key and value-output units pruned.

    Hidden dimensions are not pruned here: a stock LayerNorm includes masked dimensions in its mean and variance, so
    that masks of hidden dimensions define another model.
    """
    systems = build(shape, ["ours", *PEERS], device, bf16=False)
    batch = random_batch(shape, 2, device)
    ours = systems["ours"]
    with torch.no_grad():
        check_agreement(systems, batch, "at full width")
        inner = ours.target_shape._replace(hidden_size=ours.shape.hidden_size)
        ours.prune_to(inner, prune.unit_importance("magnitude", {}, ours.distiller.student, 0))
        for name in PEERS:
            systems[name].prune_to(inner, ours.lineage)
        check_agreement(systems, batch, "with inner widths halved")
