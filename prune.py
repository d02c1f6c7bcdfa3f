"""Making a BERT narrower: which weights go together, which units matter least, when they go, and the cut itself.

The four parts of iterative pruning in HomoDistil (Liang et al., ICLR 2023, section 3 and algorithm 1), in this order:
the structure table, the sensitivity, the cubic schedule, the choice and the cut. Shape letters as in model.py.

A *set of units* is what one index set can cut, named as in the table below:
    hidden             D units, one set for the whole model, because of the residual stream
    feed_forward.l     F units of layer l
    query_key.l        H*K units of layer l, head by head: rows of W_q and of W_k
    value_output.l     H*K units of layer l, head by head: rows of W_v, columns of W_o
A whole head is cut by taking all its units out of both sets of its layer.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from model import Bert, BertConfig, InputError, Sliceable

# ---- The structure table -------------------------------------------------------------------------------------
# Every layer of the model -> the set of units along each of its axes. It drives the slicing of parameters, gradients,
# Adam moments and sums of sensitivities. The decoder is the word embeddings, and its bias (V) is never cut. The
# projections W_hidn and W_emb (distill.py) map to the teacher's width, which stays.

STRUCTURE = {
    "bert.embeddings.word_embeddings": {"width": "hidden"},
    "bert.embeddings.position_embeddings": {"width": "hidden"},
    "bert.embeddings.token_type_embeddings": {"width": "hidden"},
    "bert.embeddings.LayerNorm": {"width": "hidden"},
    "bert.encoder.layer.*.attention.self.query": {"out": "query_key.*", "in": "hidden"},
    "bert.encoder.layer.*.attention.self.key": {"out": "query_key.*", "in": "hidden"},
    "bert.encoder.layer.*.attention.self.value": {"out": "value_output.*", "in": "hidden"},
    "bert.encoder.layer.*.attention.output.dense": {"out": "hidden", "in": "value_output.*"},
    "bert.encoder.layer.*.attention.output.LayerNorm": {"width": "hidden"},
    "bert.encoder.layer.*.intermediate.dense": {"out": "feed_forward.*", "in": "hidden"},
    "bert.encoder.layer.*.output.dense": {"out": "hidden", "in": "feed_forward.*"},
    "bert.encoder.layer.*.output.LayerNorm": {"width": "hidden"},
    "bert.pooler.dense": {"out": "hidden", "in": "hidden"},
    "cls.predictions.transform.dense": {"out": "hidden", "in": "hidden"},
    "cls.predictions.transform.LayerNorm": {"width": "hidden"},
    "hidden_projection": {"in": "hidden"},
    "embedding_projection": {"in": "hidden"},
}


def structure(model: nn.Module) -> dict[str, dict[str, str]]:
    """The table for one model, a Bert or a module that holds one as `student`: layer name -> axis -> set of units."""
    table = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Sliceable):
            number = re.search(r"\.layer\.(\d+)\.", name)
            row = STRUCTURE[re.sub(r"\.layer\.\d+\.", ".layer.*.", name.removeprefix("student."))]
            table[name] = {axis: units.replace("*", number[1]) if number else units for axis, units in row.items()}
    return table


def tensor_axes(model: nn.Module) -> dict[str, dict[int, str]]:
    """The same table by tensor: parameter name -> dimension -> set of units. What is never cut is absent."""
    table = {}
    for name, row in structure(model).items():
        layer = model.get_submodule(name)
        for axis, units in row.items():
            for tensor, dimension in layer.axes[axis].items():
                if getattr(layer, tensor) is not None:
                    table.setdefault(f"{name}.{tensor}", {})[dimension] = units
    return table


# ---- Importance ----------------------------------------------------------------------------------------------


def unit_sums(model: nn.Module, score: Callable[[nn.Parameter], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Sum `score` (a tensor of a parameter's shape, or None to pass it over) over all weights of each unit.

    Returns set of units -> (units,). A weight of a matrix counts for its row's unit and for its column's unit.
    """
    parameters = dict(model.named_parameters())
    sums: dict[str, torch.Tensor] = {}
    for name, dimensions in tensor_axes(model).items():
        values = score(parameters[name])
        if values is None:
            continue
        for dimension, units in dimensions.items():
            total = values.sum(1 - dimension) if values.dim() == 2 else values
            sums[units] = sums[units] + total if units in sums else total
    return sums


@torch.no_grad()
def accumulate_sensitivity(average: dict[str, torch.Tensor], model: nn.Module, decay: float):
    """Add this step's sensitivities to their moving average (in place; empty before the first step).

    S_j = |theta_j * dL/dtheta_j| for every weight, absolute value first, then the L1 norm over the weights of a unit
    (HomoDistil, section 3.2). Call it with complete gradients, before clipping, with the weights they belong to.
    """
    sums = unit_sums(model, lambda p: None if p.grad is None else (p * p.grad).abs_())
    for units, now in sums.items():
        average[units] = average[units].mul_(decay).add_(now, alpha=1 - decay) if units in average else now


@torch.no_grad()
def unit_importance(kind: str, model: nn.Module, sensitivity: dict[str, torch.Tensor], seed: int):
    """Set of units -> importance (units,): the averaged sensitivity, or, to compare, the L1 norm of the weights
    ("magnitude") or noise ("random")."""
    if kind == "sensitivity":
        return sensitivity
    magnitude = unit_sums(model, torch.abs)
    if kind == "magnitude":
        return magnitude
    generator = torch.Generator().manual_seed(seed)
    return {units: torch.rand(len(m), generator=generator).to(m.device) for units, m in sorted(magnitude.items())}


# ---- Widths and their schedule -------------------------------------------------------------------------------


class Widths(NamedTuple):
    hidden: int  # D
    intermediate: int  # F
    heads: int  # H
    head_size: int  # K

    @classmethod
    def of(cls, config: BertConfig) -> "Widths":
        return cls(config.hidden_size, config.intermediate_size, config.num_attention_heads, config.attention_head_size)


def head_counts(hidden: int, config: BertConfig) -> list[int]:
    """The numbers of heads that divide `hidden` and need no head wider than the teacher's, from the largest to half of
    the teacher's. A checkpoint must have H * K = D to open in the standard library."""
    return [heads for heads in range(config.num_attention_heads, (config.num_attention_heads - 1) // 2, -1)
            if hidden % heads == 0 and hidden // heads <= config.attention_head_size]


def target_widths(config: BertConfig, hidden: int, intermediate: int | None = None, heads: int | None = None) -> Widths:
    """The student's final widths for a teacher `config`. F follows D unless it is given; so does H.

    Raises InputError for widths that are not below the teacher's or that no head count fits.
    """
    if not 0 < hidden < config.hidden_size:
        raise InputError(f"target width {hidden} must be from 1 to {config.hidden_size - 1}, below the teacher's "
                         f"{config.hidden_size}")
    if intermediate is None:
        intermediate = max(1, round(config.intermediate_size * hidden / config.hidden_size))
    if not 0 < intermediate <= config.intermediate_size:
        raise InputError(f"target intermediate width {intermediate} must be from 1 to the teacher's "
                         f"{config.intermediate_size}")
    if heads is None:
        heads = max(head_counts(hidden, config), default=None)
        if heads is None:
            usable = [width for width in range(1, config.hidden_size) if head_counts(width, config)]
            nearest = sorted(sorted(usable, key=lambda width: abs(width - hidden))[:2])
            raise InputError(f"target width {hidden}: no head count from {-(-config.num_attention_heads // 2)} to "
                             f"{config.num_attention_heads} divides it into heads of at most "
                             f"{config.attention_head_size}; take width {' or '.join(map(str, nearest))}, or choose "
                             "with --target-heads")
    elif not 0 < heads <= config.num_attention_heads:
        raise InputError(f"target heads {heads} must be from 1 to the teacher's {config.num_attention_heads}")
    elif hidden % heads or hidden // heads > config.attention_head_size:
        raise InputError(f"target heads {heads} do not divide width {hidden} into equal heads of at most "
                         f"{config.attention_head_size} dimensions, the teacher's")
    return Widths(hidden, intermediate, heads, hidden // heads)


def remaining(step: float, start: float, end: float, power: float = 3) -> float:
    """What is left to remove at `step`: 1 before t_i = `start`, 0 from t_f = `end` on, between them
    (1 - (t - t_i) / (t_f - t_i))^power."""
    if step >= end:
        return 0.0
    if step < start:
        return 1.0
    return (1 - (step - start) / (end - start)) ** power


def scheduled_widths(step: float, start: float, end: float, first: Widths, last: Widths, granularity: int,
                     power: float = 3) -> Widths:
    """The widths after `step` steps of the cubic schedule from `first` to `last` (HomoDistil, section 3.2).

    r(t) = r_f + (1 - r_f) remaining(t) of every width, rounded to the nearest whole grain so that kernels keep good
    shapes: `granularity` hidden dimensions, 4 x that of the feed-forward, a quarter of it for the dimensions of a head.
    Where heads have to go, whole heads go first, as long as the heads left hold the inner width H*K of the schedule.
    """
    left = remaining(step, start, end, power)
    if left in (0, 1):
        return first if left else last

    def between(start: float, end: float) -> float:
        return end + (start - end) * left

    def whole(width: float, grain: int, largest: int, smallest: int) -> int:
        return min(largest, max(smallest, round(width / grain) * grain))

    inner = between(first.heads * first.head_size, last.heads * last.head_size)
    heads = max(last.heads, math.ceil(inner / first.head_size))
    head_size = whole(inner / heads, max(1, granularity // 4), first.head_size, last.head_size)
    return Widths(
        whole(between(first.hidden, last.hidden), granularity, first.hidden, last.hidden),
        whole(between(first.intermediate, last.intermediate), 4 * granularity, first.intermediate, last.intermediate),
        heads, head_size if heads == last.heads else first.head_size)


def snapshot_widths(hidden: int, config: BertConfig, last: Widths) -> Widths:
    """The shape of a student of `hidden` dimensions on the way from the teacher to `last`: F between theirs in
    proportion, and the fewest heads that fit, since heads go before their dimensions. Raises InputError for a width
    that is not on the way or that no such head count fits."""
    first = Widths.of(config)
    if not last.hidden < hidden < first.hidden:
        raise InputError(f"--snapshots {hidden} is not between the target width {last.hidden} and the teacher's "
                         f"{first.hidden}")
    share = (hidden - last.hidden) / (first.hidden - last.hidden)
    for heads in range(last.heads, first.heads + 1):
        if hidden % heads == 0 and last.head_size <= hidden // heads <= first.head_size:
            intermediate = round(last.intermediate + share * (first.intermediate - last.intermediate))
            return Widths(hidden, intermediate, heads, hidden // heads)
    raise InputError(f"--snapshots {hidden}: no head count from {last.heads} to {first.heads} divides it into heads of "
                     f"{last.head_size} to {first.head_size} dimensions; choose another width or --target-heads")


def family_widths(config: BertConfig, hidden: int, intermediate: int | None, heads: int | None,
                  snapshots: list[int]) -> tuple[Widths, list[Widths]]:
    """`target_widths` and the shapes of `snapshots` (falling) on the way there. Where the number of heads is open, the
    largest is taken that lets the path pass through all of them. Raises InputError."""
    refusal = None
    for count in ([heads] if heads or not snapshots else head_counts(hidden, config) or [None]):
        last = target_widths(config, hidden, intermediate, count)
        try:
            return last, [snapshot_widths(width, config, last) for width in snapshots if width != hidden]
        except InputError as error:
            refusal = refusal or error
    raise refusal


def next_widths(now: Widths, scheduled: Widths, snapshots: list[Widths]) -> Widths:
    """The widths after this step: what is scheduled, but the path passes through each of `snapshots` (falling), where
    it stays until the schedule wants less in a later step."""
    ahead = [shape for shape in snapshots if shape.hidden < now.hidden]
    if ahead and scheduled.hidden <= ahead[0].hidden:
        return ahead[0]
    floor = ahead[0] if ahead else scheduled
    return Widths(*(min(n, max(s, f)) for n, s, f in zip(now, scheduled, floor, strict=True)))


# ---- The cut -------------------------------------------------------------------------------------------------


def top(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices (count,) of the most important units, in ascending order."""
    return importance.topk(count).indices.sort().values


def choose_units(importance: dict[str, torch.Tensor], now: Widths, new: Widths) -> dict[str, torch.Tensor]:
    """The units that stay: set of units -> ascending indices. Sets that lose nothing are absent.

    Every set is ranked by itself, so each matrix ends at the width that was asked for. Heads are ranked by all of their
    units in both sets, then the units within each head that stays.
    """
    keep = {}
    for units, values in importance.items():
        kind, _, layer = units.partition(".")
        if kind == "hidden" and new.hidden < now.hidden:
            keep[units] = top(values, new.hidden)
        elif kind == "feed_forward" and new.intermediate < now.intermediate:
            keep[units] = top(values, new.intermediate)
        elif kind in ("query_key", "value_output") and (new.heads, new.head_size) != (now.heads, now.head_size):
            by_head = values.view(now.heads, now.head_size)  # (H,K)
            other = importance[f"{'value_output' if kind == 'query_key' else 'query_key'}.{layer}"].view_as(by_head)
            heads = top((by_head + other).sum(1), new.heads)
            within = torch.stack([top(by_head[head], new.head_size) for head in heads])  # (H_new, K_new)
            keep[units] = (heads[:, None] * now.head_size + within).flatten()
    return keep


@torch.no_grad()
def cut(model: nn.Module, keep: dict[str, torch.Tensor], new: Widths, optimizer: torch.optim.Optimizer | None = None,
        per_unit: tuple[dict[str, torch.Tensor], ...] = ()):
    """Slice a model to the units in `keep`, in place, and with it everything that has an entry for each unit.

    `optimizer` goes on with exactly the surviving tensors and their moments; `per_unit` are dictionaries set of units
    -> (units,) such as sensitivities and the lineage. Nothing refers to a full-size tensor afterwards.
    """
    bert: Bert = getattr(model, "student", model)
    before = dict(model.named_parameters())
    for name, row in structure(model).items():
        for axis, units in row.items():
            if units in keep:
                model.get_submodule(name).slice_(axis, keep[units])
    after = dict(model.named_parameters())

    # Scores are q.k / sqrt(K). With fewer dimensions they must change by what was cut and not by the divisor.
    scale = (new.head_size / bert.config.attention_head_size) ** 0.5
    for layer in bert.bert.layers:
        layer.heads = new.heads
        layer.attention["self"].query.weight.mul_(scale)
        layer.attention["self"].query.bias.mul_(scale)
    bert.config.hidden_size, bert.config.intermediate_size = new.hidden, new.intermediate
    bert.config.num_attention_heads, bert.config.attention_head_size = new.heads, new.head_size

    for vectors in per_unit:
        for units in keep.keys() & vectors.keys():
            vectors[units] = vectors[units][keep[units]]
    if optimizer is None:
        return
    replaced = {before[name]: after[name] for name in after if after[name] is not before[name]}
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(p, p) for p in group["params"]]
    for name, dimensions in tensor_axes(model).items():
        old = before[name]
        if old in replaced and old in optimizer.state:
            state = optimizer.state.pop(old)
            for key, value in state.items():
                if value.shape == old.shape:
                    for dimension, units in dimensions.items():
                        value = value.index_select(dimension, keep[units]) if units in keep else value
                    state[key] = value
            optimizer.state[replaced[old]] = state


def new_lineage(model: nn.Module) -> dict[str, torch.Tensor]:
    """Set of units -> (units,) int64: for every unit its index in the teacher. Sliced by every cut."""
    widths = {units: len(values) for units, values in unit_sums(model, torch.abs).items()}
    device = next(model.parameters()).device
    return {units: torch.arange(width, device=device) for units, width in widths.items()}
