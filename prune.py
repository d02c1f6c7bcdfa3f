"""Pruning the width of a BERT while it is trained (HomoDistil: Liang et al., ICLR 2023, section 3 and algorithm 1).

The four parts are, in order: which weights are pruned together, how important each unit is, how many units the
schedule keeps, and the pruning itself. Shape letters as in model.py.

A *unit* is one neuron: a hidden dimension, a feed-forward neuron, or a dimension of a head. A *group* is a set of
units. All axes of weights that belong to it are sliced by the same indices. The groups, by key:
    hidden             D units; one group for the whole model, because of the residual stream
    feed_forward.l     F units of layer l
    query_key.l        H*K units of layer l, ordered by head: rows of W_q and of W_k
    value_output.l     H*K units of layer l, ordered by head: rows of W_v, columns of W_o
A whole head is pruned by pruning all of its units in the last two groups of its layer.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from model import Bert, BertConfig

# ---- Which weights are pruned together -----------------------------------------------------------------------
# The structure table: module -> the group of each axis of its weight, (out, in) for a Linear and (rows, width) for an
# Embedding; None is an axis that is never pruned. A bias has the first axis of its weight. The table drives the sums of
# importance, and the slicing of parameters, Adam moments and statistics. The decoder is tied to the word embeddings, so
# it is sliced with them; its bias (V) is never pruned. The projections W_hidn and W_emb (distill.py) map to the
# teacher's hidden size, which does not change.

STRUCTURE = {
    "bert.embeddings.word_embeddings": (None, "hidden"),
    "bert.embeddings.position_embeddings": (None, "hidden"),
    "bert.embeddings.token_type_embeddings": (None, "hidden"),
    "bert.embeddings.LayerNorm": ("hidden",),
    "bert.encoder.layer.*.attention.self.query": ("query_key.*", "hidden"),
    "bert.encoder.layer.*.attention.self.key": ("query_key.*", "hidden"),
    "bert.encoder.layer.*.attention.self.value": ("value_output.*", "hidden"),
    "bert.encoder.layer.*.attention.output.dense": ("hidden", "value_output.*"),
    "bert.encoder.layer.*.attention.output.LayerNorm": ("hidden",),
    "bert.encoder.layer.*.intermediate.dense": ("feed_forward.*", "hidden"),
    "bert.encoder.layer.*.output.dense": ("hidden", "feed_forward.*"),
    "bert.encoder.layer.*.output.LayerNorm": ("hidden",),
    "bert.pooler.dense": ("hidden", "hidden"),
    "cls.predictions.transform.dense": ("hidden", "hidden"),
    "cls.predictions.transform.LayerNorm": ("hidden",),
    "cls.predictions": (None,),
    "hidden_projections.*": (None, "hidden"),
    "embedding_projection": (None, "hidden"),
}


def tensor_axes(model: nn.Module) -> dict[str, dict[int, str]]:
    """The table for one model, a Bert or a module that holds one as `student`: parameter name -> axis -> group.
    Parameters that are never pruned are absent."""
    table = {}
    for name, parameter in model.named_parameters():
        module = name.removeprefix("student.").rpartition(".")[0]
        number = re.search(r"\.(\d+)\b", module)  # the layer's number
        groups = STRUCTURE[re.sub(r"\.\d+\b", ".*", module)]
        for axis, group in enumerate(groups[:parameter.dim()]):
            if group is not None:
                table.setdefault(name, {})[axis] = group.replace("*", number[1]) if number else group
    return table


def teacher_indices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The lineage before any prune: group -> (units,) int64, the teacher's index of every unit. Each prune slices it
    along with the weights. With --align-heads the teacher is the aligned one."""
    parameters = dict(model.named_parameters())
    return {group: torch.arange(parameters[name].shape[axis], device=parameters[name].device)
            for name, axes in tensor_axes(model).items() for axis, group in axes.items()}


# ---- How important each unit is ------------------------------------------------------------------------------

PLATON_DECAY = 0.85  # of both averages of "platon", in every step; its authors' scripts average every tenth step


def sum_per_unit(bert: Bert, scores: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sum the scores of all weights of each unit: group -> (units,).

    scores: (name, tensor of the parameter's shape) of each trained parameter. A weight of a matrix counts for the unit
    of its row and for the unit of its column. The projections do not count: they are not part of the student.
    """
    axes = tensor_axes(bert)
    sums: dict[str, torch.Tensor] = {}
    for name, values in scores:
        for axis, group in axes.get(name, {}).items():
            total = values.sum(1 - axis) if values.dim() == 2 else values  # (units,)
            sums[group] = sums[group] + total if group in sums else total
    return sums


@torch.no_grad()
def accumulate_importance(criterion: str, statistics: dict[str, dict[str, torch.Tensor]], bert: Bert, decay: float):
    """Update the moving averages behind the criterion, in place. They are empty before the first step.

    The sensitivity of a weight is |theta * dL/dtheta|, a first-order estimate of how much the loss would change without
    it; that of a unit is the L1 norm over its weights, so the absolute value comes before the sum (HomoDistil, section
    3.2). Call this with complete gradients, before they are clipped and before the optimizer changes the weights.

    "sensitivity" averages per unit with `decay`, starting at the first value. "platon" (Zhang et al., ICML 2022)
    averages per weight, with decay 0.85 and starting at zero, the sensitivity and its distance from that average, which
    is the uncertainty.
    """
    if criterion == "sensitivity":
        average = statistics.setdefault("sensitivity", {})
        scores = ((name, (p * p.grad).abs_()) for name, p in bert.named_parameters() if p.grad is not None)
        for group, new in sum_per_unit(bert, scores).items():
            average[group] = average[group].mul_(decay).add_(new, alpha=1 - decay) if group in average else new
    elif criterion == "platon":
        mean, uncertainty = (statistics.setdefault(name, {}) for name in ("mean", "uncertainty"))
        for name, p in bert.named_parameters():
            if p.grad is not None:
                if name not in mean:
                    mean[name], uncertainty[name] = torch.zeros_like(p), torch.zeros_like(p)
                sensitivity = (p * p.grad).abs_()
                mean[name].lerp_(sensitivity, 1 - PLATON_DECAY)
                uncertainty[name].lerp_((sensitivity - mean[name]).abs_(), 1 - PLATON_DECAY)


@torch.no_grad()
def unit_importance(criterion: str, statistics: dict[str, dict[str, torch.Tensor]], bert: Bert, seed: int):
    """group -> importance (units,): the averaged sensitivity; PLATON's sensitivity times uncertainty; or, for
    comparison, the L1 norm of the weights ("magnitude") or noise ("random")."""
    if criterion == "sensitivity":
        return statistics["sensitivity"]
    if criterion == "platon":
        return sum_per_unit(bert, ((name, mean * statistics["uncertainty"][name])
                                   for name, mean in statistics["mean"].items()))
    magnitude = sum_per_unit(bert, ((name, p.abs()) for name, p in bert.named_parameters() if p.requires_grad))
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
    """The shape after `step` steps of the schedule, which is cubic if power is 3 (HomoDistil, section 3.2).

    Every width goes from the teacher's to the target's: target + (teacher - target) * fraction_to_prune(t). The number
    of pruned units is rounded to a multiple of `granularity` for D and K (attention kernels want K to be a multiple of
    8) and of 4 times that for F; if fewer are to be pruned in all, all go in one step. H*K shrinks by whole heads
    first: K stays the teacher's until H is the target's.
    """
    fraction = fraction_to_prune(step, start, end, power)
    if fraction == 0:
        return target

    def lerp(full: float, final: float) -> float:
        return final + (full - final) * fraction

    def round_to_multiple(size: float, multiple: int, full: int, final: int) -> int:
        multiple = max(1, min(multiple, full - final))
        return max(final, full - round((full - size) / multiple) * multiple)

    hidden = lerp(teacher.hidden_size, target.hidden_size)
    intermediate = lerp(teacher.intermediate_size, target.intermediate_size)
    inner = lerp(teacher.num_heads * teacher.head_size, target.num_heads * target.head_size)
    heads, head_size = max(target.num_heads, math.ceil(inner / teacher.head_size)), teacher.head_size
    if heads == target.num_heads:
        head_size = round_to_multiple(inner / heads, granularity, teacher.head_size, target.head_size)
    return Shape(round_to_multiple(hidden, granularity, teacher.hidden_size, target.hidden_size),
                 round_to_multiple(intermediate, 4 * granularity, teacher.intermediate_size, target.intermediate_size),
                 heads, head_size)


# ---- The pruning itself --------------------------------------------------------------------------------------


def topk_sorted(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` most important units in the last dimension, ascending."""
    return importance.topk(count).indices.sort().values


def choose_units(importance: dict[str, torch.Tensor], shape: Shape, new_shape: Shape) -> dict[str, torch.Tensor]:
    """The units to keep: group -> ascending indices. Groups that lose nothing are absent.

    Every group is ranked by itself, so that each matrix reaches its target width. Heads are the exception: they are
    ranked by all of their units in both attention groups, and then the units of each kept head in each group.
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
            both = importance[f"query_key.{layer}"] + importance[f"value_output.{layer}"]
            heads = topk_sorted(both.view_as(by_head).sum(1), new_shape.num_heads)
            within = topk_sorted(by_head[heads], new_shape.head_size)  # (H_new,K_new)
            keep[group] = (heads[:, None] * shape.head_size + within).flatten()  # (H_new*K_new,)
    return keep


@torch.no_grad()
def prune_units(model: nn.Module, keep: dict[str, torch.Tensor], new_shape: Shape,
                optimizer: torch.optim.Optimizer | None = None, tensors: tuple[dict[str, torch.Tensor], ...] = ()):
    """Keep only the units in `keep`, in place: in the model, in Adam's moments and in the dictionaries `tensors`.

    model: a Bert or a module that holds one as `student`; its config gets the new shape. tensors: by group (lineage,
    sensitivities) or by the Bert's parameter names (PLATON's averages). No full-size tensor is kept.
    """
    bert: Bert = getattr(model, "student", model)
    axes = tensor_axes(model) | tensor_axes(bert) | {group: {0: group} for group in keep}

    def sliced(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for axis, group in axes.get(name, {}).items():
            tensor = tensor.index_select(axis, keep[group]) if group in keep else tensor
        return tensor

    # Every tensor becomes a new Parameter without a gradient. New data for the old one would break graphs that still
    # hold its shape, such as that of a loss kept by a caller or of DistributedDataParallel.
    replacement = {}
    for name, old in list(model.named_parameters()):
        module, _, kind = name.rpartition(".")  # kind: "weight" or "bias"
        new = replacement[old] = nn.Parameter(sliced(name, old.detach()), requires_grad=old.requires_grad)
        setattr(model.get_submodule(module), kind, new)
        if optimizer is not None and old in optimizer.state:
            state = optimizer.state.pop(old)
            state |= {key: sliced(name, state[key]) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[new] = state
    if optimizer is not None:
        for param_group in optimizer.param_groups:
            param_group["params"] = [replacement[p] for p in param_group["params"]]
    for values in tensors:
        values |= {name: sliced(name, tensor) for name, tensor in values.items()}

    # Scores are q.k / sqrt(K). They may change by what was pruned, but not because the divisor changes. The gradient
    # with respect to the rescaled W_q is larger by the inverse factor, so Adam's moments are rescaled, too.
    scale = (new_shape.head_size / bert.config.attention_head_size) ** 0.5
    for layer in bert.bert.layers:
        layer.num_heads = new_shape.num_heads
        query = layer.attention["self"].query
        for parameter in (query.weight, query.bias):
            parameter.mul_(scale)
            if optimizer is not None and parameter in optimizer.state:
                optimizer.state[parameter]["exp_avg"].mul_(1 / scale)
                optimizer.state[parameter]["exp_avg_sq"].mul_(1 / scale**2)
    bert.config.hidden_size, bert.config.intermediate_size = new_shape.hidden_size, new_shape.intermediate_size
    bert.config.num_attention_heads, bert.config.attention_head_size = new_shape.num_heads, new_shape.head_size
