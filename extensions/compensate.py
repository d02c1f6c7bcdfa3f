"""Compensated pruning (--compensate) [ours, not in the paper].

Pruned units are partly linear functions of the kept ones. Right before a prune, a least-squares fit on training text
finds that part and folds it into the weights that read the units, so that the prune does less harm.

Shape letters as in model.py. T is a number of tokens; x~ = [x, 1] is a vector with a 1 appended, which absorbs biases.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import Batch
from extensions.align_heads import extended
from model import Bert, LayerNorm, Linear, ResidualOutput

TOKENS_PER_UNIT = 8  # tokens per unit in a fit; fewer overfit, twice as many cost twice the time and gain little
RIDGE = 1e-3  # times a unit's mean square, added to the diagonal of every fit; it draws the fit to the plain prune
UNMASKED_WEIGHT = 0.2  # weight of an unmasked token; all of them together count about as much as the masked ones


def fit_batches(session, units: int, step: int) -> Iterator[Batch]:
    """Micro-batches of the training rows from those of `step` on, TOKENS_PER_UNIT tokens for each of `units`.

    Upcoming rows are always available in any number, and a resumed run takes the same ones.
    """
    args, rows = session.args, session.rows
    wanted = math.ceil(TOKENS_PER_UNIT * units / args.seq_length)  # rows
    for later in itertools.count(step):
        for begin in range(0, args.batch_size, session.micro_batch_size):
            end = min(begin + session.micro_batch_size, args.batch_size, begin + wanted)
            yield rows.training_batch(args.seed, later, args.batch_size, begin, end).to(session.device)
            wanted -= end - begin
            if not wanted:
                return


class Moments:
    """Weighted sums over the tokens for one least-squares fit. x (T,n) are all units; x_k (T,k) are the kept ones with
    the values they will have after the prune. kept = x~_k^T x~_k (k+1,k+1); cross = x~_k^T x (k+1,n)."""

    def __init__(self, keep: torch.Tensor):
        self.keep, self.kept, self.cross = keep, 0.0, 0.0
        self.weight = 1.0  # of the tokens of the next batch: (T,1) or a number

    def add_norm(self, norm: LayerNorm, inputs, output):
        """Forward hook of a LayerNorm: x is its output, x_k its output after the prune."""
        keep = self.keep
        x_k = F.layer_norm(inputs[0][..., keep], keep.shape, norm.weight[keep], norm.bias[keep], norm.eps)
        x_k = extended(x_k)
        weighted = (x_k * self.weight).T
        self.kept = self.kept + (weighted @ x_k).double()
        self.cross = self.cross + (weighted @ output.flatten(0, -2)).double()

    def add_residual(self, residual: ResidualOutput, inputs, output):
        """Forward hook of LayerNorm(x + W y + b), for the units y. Tokens are weighted by the LayerNorm's 1/variance:
        otherwise the few tokens with very large sums, [CLS] above all, would dominate the fit."""
        y, x = inputs
        variance = (x + residual.dense(y)).flatten(0, -2).var(1, keepdim=True)  # (T,1)
        y = extended(y)
        keep = F.pad(self.keep, (0, 1), value=y.shape[1] - 1)  # and the appended 1
        sums = ((y[:, keep] * (self.weight / (variance + residual.LayerNorm.eps))).T @ y).double()  # (k+1,n+1)
        self.kept, self.cross = self.kept + sums[:, keep], self.cross + sums[:, :-1]

    def fit(self, constant: bool = True):
        """A and c of x ~= x_k A + c as one matrix (k+1,n), or A alone (k,n) if not `constant`."""
        rows = len(self.kept) - (not constant)
        kept, cross = self.kept[:rows, :rows], self.cross[:rows]
        plain = torch.zeros_like(cross)  # the ridge draws to it: kept units as they are, others zero
        plain[range(len(self.keep)), self.keep] = 1.0
        ridge = RIDGE * kept.diagonal()[:len(self.keep)].mean() * torch.eye(rows).to(kept)
        return plain + torch.linalg.solve(kept + ridge, cross - kept @ plain)


@torch.no_grad()
def compensate(distiller: nn.Module, keep: dict[str, torch.Tensor], batches: Iterable[Batch]):
    """Prepare a Distiller for `prune.prune_units` with the same `keep`: change its weights in place, still at the old
    shape, so that the kept units also do what can be done of the pruned ones' work. Adam's moments are not changed.

    Wherever units are read, x ~= x_k A + c is fitted, and a reader W x + b becomes (W A^T) x_k + (W c + b). All fits
    come from one pass over `batches`, without autocast. Query-key dimensions are only read by each other, so there is
    nothing to fit for them.
    """
    bert: Bert = distiller.student
    readers = [place for place in read_places(bert) if place.group in keep]
    moments = collect_moments(bert, readers, keep, batches)
    for place in readers:
        if isinstance(place.module, LayerNorm):
            rescale(place.module, moments[place.module])
        fit = moments[place.module].fit()
        for linear in place.linears:
            linear.bias += linear.weight.double() @ fit[-1]
            replace_columns(linear, keep[place.group], fit[:-1])
    if "hidden" not in keep:
        return
    if bert.cls is not None:
        refit_decoder(bert, moments[bert.cls["predictions"].transform["LayerNorm"]])
    norms = [bert.bert.embeddings.LayerNorm, *(layer.output.LayerNorm for layer in bert.bert.layers)]
    projections = [distiller.embedding_projection, *distiller.hidden_projections]
    for norm, projection in zip(norms, projections, strict=True):  # no projection has a bias, so the fits have no c
        replace_columns(projection, keep["hidden"], moments[norm].fit(constant=False))


class Place(NamedTuple):
    """A place where units of a group are read."""

    module: nn.Module  # the LayerNorm or ResidualOutput whose forward pass shows the units
    group: str
    linears: list[Linear]  # what reads them


def read_places(bert: Bert) -> list[Place]:
    """All places where hidden, feed-forward and value-output units are read, in forward order."""
    norm, places = bert.bert.embeddings.LayerNorm, []
    for i, layer in enumerate(bert.bert.layers):
        attention, output = layer.attention["self"], layer.attention["output"]
        places += [Place(norm, "hidden", [attention.query, attention.key, attention.value]),
                   Place(output, f"value_output.{i}", [output.dense]),
                   Place(output.LayerNorm, "hidden", [layer.intermediate["dense"]]),
                   Place(layer.output, f"feed_forward.{i}", [layer.output.dense])]
        norm = layer.output.LayerNorm
    last = [] if bert.cls is None else [bert.cls["predictions"].transform["dense"]]
    return [*places, Place(norm, "hidden", last if bert.bert.pooler is None else [*last, bert.bert.pooler["dense"]])]


def collect_moments(bert: Bert, places: list[Place], keep: dict[str, torch.Tensor], batches: Iterable[Batch]):
    """The Moments of every place, and of the LayerNorm before the decoder, from one forward pass: module -> Moments."""
    moments = {place.module: Moments(keep[place.group]) for place in places}
    if bert.cls is not None and "hidden" in keep:
        moments[bert.cls["predictions"].transform["LayerNorm"]] = Moments(keep["hidden"])
    hooks = [module.register_forward_hook(m.add_norm if isinstance(module, LayerNorm) else m.add_residual)
             for module, m in moments.items()]
    training = bert.training
    bert.eval()
    for batch in batches:
        weight = torch.full((batch.input_ids.numel(), 1), UNMASKED_WEIGHT, device=batch.input_ids.device)
        for place in places:  # the LayerNorm before the decoder sees masked positions only
            moments[place.module].weight = weight.index_fill(0, batch.positions, 1.0)  # (T,1)
        bert(batch.input_ids, batch.positions)
    bert.train(training)
    for hook in hooks:
        hook.remove()
    return moments


def replace_columns(reader: Linear, keep: torch.Tensor, a: torch.Tensor):
    """Replace the kept columns of W (out,n) by W A^T, for A (k,n)."""
    reader.weight[:, keep] = (reader.weight.double() @ a.T).to(reader.weight)


def rescale(norm: LayerNorm, m: Moments):
    """Correct the LayerNorm for normalising over fewer dimensions, which scales and shifts its outputs, as far as one
    factor and a new bias can: no matrix that could absorb the change follows in the residual stream. Updates `m`."""
    count, keep = m.kept[-1, -1], m.keep
    mean, mean_k = m.cross[-1, keep] / count, m.kept[-1, :-1] / count
    covariance = m.cross[range(len(keep)), keep] / count - mean_k * mean
    variance = m.kept.diagonal()[:-1] / count - mean_k**2
    scale = covariance.sum() / variance.sum()
    shift = mean - scale * mean_k
    norm.weight[keep] *= scale.to(norm.weight)
    norm.bias[keep] = (norm.bias[keep] * scale + shift).to(norm.bias)
    change = torch.diag(F.pad(scale.expand(len(keep)), (0, 1), value=1.0))
    change[-1, :-1] = shift
    m.kept, m.cross = change.T @ m.kept @ change, change.T @ m.cross


def refit_decoder(bert: Bert, m: Moments):
    """Compensate the decoder. It is tied to the word embeddings E, so only the scale g of the LayerNorm before it and
    its bias can be fitted to the logits: E_k diag(g) x_k + b ~= E x.

    The normal equations for g are (E_k^T E_k * cov(x_k, x_k)) g = diag(E_k^T E cov(x, x_k)), with * elementwise.
    """
    words, keep = bert.bert.embeddings.word_embeddings.weight.double(), m.keep
    norm, count = bert.cls["predictions"].transform["LayerNorm"], m.kept[-1, -1]
    mean, mean_k = m.cross[-1] / count, m.kept[-1, :-1] / count
    covariance_k = m.kept[:-1, :-1] / count - torch.outer(mean_k, mean_k)  # (k,k)
    covariance = m.cross[:-1] / count - torch.outer(mean_k, mean)  # (k,D)
    gram = words[:, keep].T @ words  # (k,D)
    left, right = gram[:, keep] * covariance_k, (gram * covariance).sum(1)
    ridge = RIDGE * left.diagonal().mean() * torch.eye(len(keep)).to(left)
    scale = 1 + torch.linalg.solve(left + ridge, right - left.sum(1))
    for tensor in (norm.weight, norm.bias):
        tensor[keep] *= scale.to(tensor)
    bert.cls["predictions"].bias += words @ mean - words[:, keep] @ (scale * mean_k)
