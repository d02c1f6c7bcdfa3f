"""Pruning the width of a BERT while it is trained (HomoDistil: Liang et al., ICLR 2023, section 3 and algorithm 1).

The four parts stand in this order: which weights are pruned together, how important each unit is, how many units the
schedule keeps, and the pruning itself. Shape letters as in model.py.

A *unit* is one neuron: a hidden dimension, a feed-forward neuron, or a dimension of a head. A *group* is a set of units
that one index set prunes, named by a key:
    hidden             D units; one group for the whole model, because of the residual stream
    feed_forward.l     F units of layer l
    query_key.l        H*K units of layer l, ordered by head: rows of W_q and of W_k
    value_output.l     H*K units of layer l, ordered by head: rows of W_v, columns of W_o
A whole head is pruned by pruning all of its units in the last two groups of its layer.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from model import Bert, BertConfig, Sliceable
from support.errors import InputError

# ---- Which weights are pruned together -----------------------------------------------------------------------
# The structure table: layer -> axis -> group. It drives the slicing of parameters, gradients, Adam moments and
# importance scores. The decoder is tied to the word embeddings, so it is sliced with them; its bias (V) is never
# pruned. The projections W_hidn and W_emb (distill.py) map to the teacher's hidden size, which does not change.

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
    """The table for one model, a Bert or a module that holds one as `student`: layer name -> axis -> group."""
    table = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Sliceable):
            number = re.search(r"\.layer\.(\d+)\.", name)
            row = STRUCTURE[re.sub(r"\.layer\.\d+\.", ".layer.*.", name.removeprefix("student."))]
            table[name] = {axis: group.replace("*", number[1]) if number else group for axis, group in row.items()}
    return table


def tensor_axes(model: nn.Module) -> dict[str, dict[int, str]]:
    """The same table by tensor: parameter name -> dimension -> group. Parameters that are never pruned are absent."""
    table = {}
    for name, row in structure(model).items():
        layer = model.get_submodule(name)
        for axis, group in row.items():
            for tensor, dimension in layer.axes[axis].items():
                if getattr(layer, tensor) is not None:
                    table.setdefault(f"{name}.{tensor}", {})[dimension] = group
    return table


def teacher_indices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The lineage of an unpruned model: group -> (units,) int64, each unit's index in the teacher. Every prune slices
    it, so that it always says which of the teacher's units the student has kept."""
    parameters = dict(model.named_parameters())
    return {group: torch.arange(parameters[name].shape[dimension], device=parameters[name].device)
            for name, dimensions in tensor_axes(model).items() for dimension, group in dimensions.items()}


# ---- How important each unit is ------------------------------------------------------------------------------


def sum_per_unit(model: nn.Module, score: Callable[[nn.Parameter], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Sum the scores of all weights of each unit: group -> (units,).

    `score` returns a tensor of its parameter's shape, or None to skip the parameter. A weight of a matrix counts for
    the unit of its row and for the unit of its column.
    """
    parameters = dict(model.named_parameters())
    sums: dict[str, torch.Tensor] = {}
    for name, dimensions in tensor_axes(model).items():
        values = score(parameters[name])
        if values is None:
            continue
        for dimension, group in dimensions.items():
            total = values.sum(1 - dimension) if values.dim() == 2 else values  # (units,)
            sums[group] = sums[group] + total if group in sums else total
    return sums


@torch.no_grad()
def accumulate_sensitivity(average: dict[str, torch.Tensor], model: nn.Module, decay: float):
    """Update the moving average of the sensitivities, in place. It is empty before the first step.

    The sensitivity of a weight is |theta * dL/dtheta|, a first-order estimate of how much the loss would change without
    it; that of a unit is the L1 norm over its weights, so the absolute value comes before the sum (HomoDistil, section
    3.2). Call this with complete gradients, before clipping, while the weights are those the gradients belong to.
    """
    sums = sum_per_unit(model, lambda p: None if p.grad is None else (p * p.grad).abs_())
    for group, new in sums.items():
        average[group] = average[group].mul_(decay).add_(new, alpha=1 - decay) if group in average else new


@torch.no_grad()
def unit_importance(criterion: str, model: nn.Module, sensitivity: dict[str, torch.Tensor], seed: int):
    """group -> importance (units,): the averaged sensitivity or, for comparison, the L1 norm of the weights
    ("magnitude") or noise ("random")."""
    if criterion == "sensitivity":
        return sensitivity
    magnitude = sum_per_unit(model, torch.abs)
    if criterion == "magnitude":
        return magnitude
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.rand(len(m), generator=generator).to(m.device) for group, m in sorted(magnitude.items())}


# ---- How many units the schedule keeps -----------------------------------------------------------------------


class Shape(NamedTuple):
    hidden_size: int  # D
    intermediate_size: int  # F
    num_heads: int  # H
    head_size: int  # K

    @classmethod
    def of(cls, config: BertConfig) -> "Shape":
        return cls(config.hidden_size, config.intermediate_size, config.num_attention_heads, config.attention_head_size)


def possible_heads(hidden_size: int, config: BertConfig) -> list[int]:
    """The numbers of heads for a student of `hidden_size`, largest first, down to half of the teacher's. They divide
    the hidden size, because `transformers` requires H * K = D, into heads no wider than the teacher's."""
    teacher_heads = config.num_attention_heads
    return [heads for heads in range(teacher_heads, (teacher_heads - 1) // 2, -1)
            if hidden_size % heads == 0 and hidden_size // heads <= config.attention_head_size]


def target_shape(config: BertConfig, hidden_size: int, intermediate_size: int | None = None,
                 heads: int | None = None) -> Shape:
    """The student's final shape for a teacher `config`. F is in proportion to D and H is the largest possible number,
    unless they are given. Raises InputError for a shape that is not below the teacher's or has no possible heads."""
    if not 0 < hidden_size < config.hidden_size:
        raise InputError(f"target width {hidden_size} must be from 1 to {config.hidden_size - 1}, below the teacher's "
                         f"{config.hidden_size}")
    if intermediate_size is None:
        intermediate_size = max(1, round(config.intermediate_size * hidden_size / config.hidden_size))
    if not 0 < intermediate_size <= config.intermediate_size:
        raise InputError(f"target intermediate width {intermediate_size} must be from 1 to the teacher's "
                         f"{config.intermediate_size}")
    if heads is None:
        heads = max(possible_heads(hidden_size, config), default=None)
        if heads is None:
            usable = [width for width in range(1, config.hidden_size) if possible_heads(width, config)]
            nearest = sorted(sorted(usable, key=lambda width: abs(width - hidden_size))[:2])
            raise InputError(f"target width {hidden_size} cannot be divided into {-(-config.num_attention_heads // 2)} "
                             f"to {config.num_attention_heads} heads of at most {config.attention_head_size} "
                             f"dimensions: use width {' or '.join(map(str, nearest))}, or set --target-heads")
    elif not 0 < heads <= config.num_attention_heads:
        raise InputError(f"target heads {heads} must be from 1 to the teacher's {config.num_attention_heads}")
    elif hidden_size % heads or hidden_size // heads > config.attention_head_size:
        raise InputError(f"target heads {heads} do not divide width {hidden_size} into equal heads of at most "
                         f"{config.attention_head_size} dimensions, the teacher's")
    return Shape(hidden_size, intermediate_size, heads, hidden_size // heads)


def fraction_to_prune(step: float, start: float, end: float, power: float = 3) -> float:
    """The fraction of the pruning that is still to be done at `step`: 1 before t_i = `start`, 0 from t_f = `end`, and
    (1 - (t - t_i) / (t_f - t_i))^power between them."""
    if step >= end:
        return 0.0
    if step < start:
        return 1.0
    return (1 - (step - start) / (end - start)) ** power


def scheduled_shape(step: float, start: float, end: float, teacher: Shape, target: Shape, granularity: int,
                    power: float = 3) -> Shape:
    """The shape after `step` steps of the cubic schedule (HomoDistil, section 3.2).

    Every width is r(t) = r_f + (1 - r_f) fraction_to_prune(t) of the teacher's, rounded to a multiple that keeps
    kernels fast: `granularity` hidden dimensions, 4 times as many feed-forward neurons, a quarter of it for the
    dimensions of a head. Whole heads are pruned first, for as long as the remaining heads can hold the width H*K.
    """
    fraction = fraction_to_prune(step, start, end, power)
    if fraction in (0, 1):
        return teacher if fraction else target

    def lerp(full: float, final: float) -> float:
        return final + (full - final) * fraction

    def round_to_multiple(size: float, multiple: int, full: int, final: int) -> int:
        return min(full, max(final, round(size / multiple) * multiple))

    hidden, intermediate = (lerp(teacher[i], target[i]) for i in (0, 1))
    inner = lerp(teacher.num_heads * teacher.head_size, target.num_heads * target.head_size)
    heads = max(target.num_heads, math.ceil(inner / teacher.head_size))
    head_size = round_to_multiple(inner / heads, max(1, granularity // 4), teacher.head_size, target.head_size)
    return Shape(round_to_multiple(hidden, granularity, teacher.hidden_size, target.hidden_size),
                 round_to_multiple(intermediate, 4 * granularity, teacher.intermediate_size, target.intermediate_size),
                 heads, head_size if heads == target.num_heads else teacher.head_size)


# ---- The pruning itself --------------------------------------------------------------------------------------


def topk_sorted(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` most important units in the last dimension, ascending."""
    return importance.topk(count).indices.sort().values


def choose_units(importance: dict[str, torch.Tensor], shape: Shape, new_shape: Shape) -> dict[str, torch.Tensor]:
    """The units to keep: group -> ascending indices. Groups that lose nothing are absent.

    Every group is ranked by itself, so that each matrix reaches its target width. Heads are ranked by all of their
    units in both attention groups, then the units within each kept head.
    """
    keep = {}
    for group, values in importance.items():
        kind, _, layer = group.partition(".")
        if kind == "hidden" and new_shape.hidden_size < shape.hidden_size:
            keep[group] = topk_sorted(values, new_shape.hidden_size)
        elif kind == "feed_forward" and new_shape.intermediate_size < shape.intermediate_size:
            keep[group] = topk_sorted(values, new_shape.intermediate_size)
        elif kind in ("query_key", "value_output") and new_shape[2:] != shape[2:]:
            by_head = values.view(shape.num_heads, shape.head_size)  # (H,K)
            partner = f"{'value_output' if kind == 'query_key' else 'query_key'}.{layer}"
            heads = topk_sorted((by_head + importance[partner].view_as(by_head)).sum(1), new_shape.num_heads)
            within = topk_sorted(by_head[heads], new_shape.head_size)  # (H_new,K_new)
            keep[group] = (heads[:, None] * shape.head_size + within).flatten()  # (H_new*K_new,)
    return keep


@torch.no_grad()
def prune_units(model: nn.Module, keep: dict[str, torch.Tensor], new_shape: Shape,
                optimizer: torch.optim.Optimizer | None = None, per_unit: tuple[dict[str, torch.Tensor], ...] = ()):
    """Slice a model to the units in `keep`, in place, and everything else that has an entry per unit.

    model: a Bert or a module that holds one as `student`. The optimizer keeps the moments of the kept weights.
    per_unit: dictionaries group -> (units,), such as sensitivities. No full-size tensor is referenced afterwards.
    """
    bert: Bert = getattr(model, "student", model)
    before = dict(model.named_parameters())
    for name, row in structure(model).items():
        for axis, group in row.items():
            if group in keep:
                model.get_submodule(name).slice_(axis, keep[group])
    after = dict(model.named_parameters())

    # Scores are q.k / sqrt(K). They may change by what was pruned, but not because the divisor changes.
    scale = (new_shape.head_size / bert.config.attention_head_size) ** 0.5
    for layer in bert.bert.layers:
        layer.num_heads = new_shape.num_heads
        layer.attention["self"].query.weight.mul_(scale)
        layer.attention["self"].query.bias.mul_(scale)
    bert.config.hidden_size, bert.config.intermediate_size = new_shape.hidden_size, new_shape.intermediate_size
    bert.config.num_attention_heads, bert.config.attention_head_size = new_shape.num_heads, new_shape.head_size

    for vectors in per_unit:
        for group in keep.keys() & vectors.keys():
            vectors[group] = vectors[group][keep[group]]
    if optimizer is not None:
        replaced = {before[name]: after[name] for name in after if after[name] is not before[name]}
        for param_group in optimizer.param_groups:
            param_group["params"] = [replaced.get(p, p) for p in param_group["params"]]
        slice_moments(model, optimizer, before, replaced, keep)


def slice_moments(model: nn.Module, optimizer: torch.optim.Optimizer, before: dict[str, nn.Parameter],
                  replaced: dict[nn.Parameter, nn.Parameter], keep: dict[str, torch.Tensor]):
    """Slice the Adam moments of every parameter in `replaced` (old -> new) like the parameter itself."""
    for name, dimensions in tensor_axes(model).items():
        old = before[name]
        if old in replaced and old in optimizer.state:
            state = optimizer.state.pop(old)
            for key, value in state.items():
                if value.shape == old.shape:  # exp_avg and exp_avg_sq; `step` is a scalar
                    for dimension, group in dimensions.items():
                        value = value.index_select(dimension, keep[group]) if group in keep else value
                    state[key] = value
            optimizer.state[replaced[old]] = state
