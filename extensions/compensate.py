"""Compensated pruning (--compensate) [ours, not in the paper].

Pruned units are partly linear functions of the kept ones. Right before a prune, a least-squares fit on training text
finds that part and folds it into the weights that read the units, so that the prune does less harm.

Shape letters as in model.py. T is a number of tokens; x~ = [x, 1] is a vector with a 1 appended, which absorbs biases;
x has n units before the prune and k after it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from data import Batch
from extensions.align_heads import extended
from model import Bert, LayerNorm, Linear

UNMASKED_STEPS = 16  # a fit takes unmasked rows from so many steps, because all rows of a step have one length
TOKENS_PER_UNIT = 8  # tokens per unit in a fit; fewer overfit, twice as many cost twice the time and gain little
RIDGE = 1e-3  # of the mean of the diagonal, added to every fit's diagonal; it draws the fit to the plain prune
UNMASKED_WEIGHT = 0.2  # weight of an unmasked token: 0.2 x 85 % is about the 15 % that are masked


def fit_batches(session, units: int, step: int) -> Iterator[Batch]:
    """Micro-batches of the training rows from those of `step` on, TOKENS_PER_UNIT tokens for each of `units`.

    Upcoming rows are always available in any number, and a resumed run takes the same ones.
    """
    args, rows = session.args, session.rows
    wanted = math.ceil(TOKENS_PER_UNIT * units / args.seq_length)  # rows
    steps = 1 if session.teacher.cls is not None else UNMASKED_STEPS
    per_step = min(args.batch_size, math.ceil(wanted / steps))
    while wanted > 0:
        for begin in range(0, min(per_step, wanted), args.micro_batch_size):
            end = min(begin + args.micro_batch_size, per_step, wanted)
            yield rows.training_batch(args.seed, step, args.batch_size, begin, end).to(session.device)
        step, wanted = step + 1, wanted - per_step


class Place:
    """A place in the forward pass where units x (T,n) are read by `readers`, and the weighted sums over the tokens for
    the least-squares fit there. x_k (T,k) are the kept units; those of a LayerNorm are normalised among themselves.
    gram = x~_k^T w x~_k (k+1,k+1); cross = x~_k^T w x (k+1,n), with the tokens' weights on the diagonal of w."""

    def __init__(self, module: nn.Module, keep: torch.Tensor, readers: Sequence[Linear] = ()):
        self.module, self.keep, self.readers = module, keep, readers
        self.gram, self.cross = 0.0, 0.0
        self.weight = 1.0  # of the tokens of the next batch: (T,1) or a number

    def add(self, module: nn.Module, inputs, output):
        """Forward hook. For a LayerNorm the units x are its output, for a ResidualOutput the input of its matrix. In
        the latter, LayerNorm(residual + W x + b), tokens are weighted by the LayerNorm's 1/variance: otherwise the
        few tokens with very large sums, [CLS] above all, would dominate the fit."""
        keep, weight = self.keep, self.weight
        if isinstance(module, LayerNorm):
            x = output
            x_k = F.layer_norm(inputs[0][..., keep], keep.shape, module.weight[keep], module.bias[keep], module.eps)
        else:
            x, residual = inputs
            x_k = x[..., keep]
            variance = (residual + module.dense(x)).flatten(0, -2).var(1, keepdim=True)  # (T,1)
            weight = weight / (variance + module.LayerNorm.eps)
        x_k = extended(x_k)  # (T,k+1)
        weighted = (x_k * weight).T
        self.gram = self.gram + (weighted @ x_k).double()
        self.cross = self.cross + (weighted @ x.flatten(0, -2)).double()

    def fit(self, constant: bool = True) -> torch.Tensor:
        """A and c of x ≈ x_k A + c as one matrix (k+1,n), or A alone (k,n) if not `constant`."""
        rows = len(self.gram) if constant else len(self.keep)
        gram, cross = self.gram[:rows, :rows], self.cross[:rows]
        plain = torch.zeros_like(cross)  # the ridge draws to it: kept units as they are, others zero
        plain[range(len(self.keep)), self.keep] = 1.0
        ridge = RIDGE * gram.diagonal()[:len(self.keep)].mean().clamp(min=1e-12) * torch.eye(rows).to(gram)
        return plain + torch.linalg.solve(gram + ridge, cross - gram @ plain)

    def means_and_covariances(self) -> tuple[torch.Tensor, ...]:
        """Of x (n) and x_k (k) the means, and the covariances of x_k with x (k,n) and with itself (k,k)."""
        count = self.gram[-1, -1]
        mean, mean_k = self.cross[-1] / count, self.gram[-1, :-1] / count
        return (mean, mean_k, self.cross[:-1] / count - torch.outer(mean_k, mean),
                self.gram[:-1, :-1] / count - torch.outer(mean_k, mean_k))


@torch.no_grad()
def compensate(distiller: nn.Module, keep: dict[str, torch.Tensor], batches: Iterable[Batch]):
    """Prepare a Distiller for `prune.prune_units` with the same `keep`: change its weights in place, still at the old
    shape, so that the kept units take over as much of the pruned ones' work as they can. Adam's moments do not change.

    Wherever units are read, x ≈ x_k A + c is fitted, and a reader W x + b becomes (W A^T) x_k + (W c + b). All fits
    come from one pass over `batches`, without autocast. Query-key dimensions are left alone: as long as heads are
    aligned, these are orthogonal, so that a fit would be the plain prune.
    """
    bert: Bert = distiller.student
    places = read_places(distiller, keep)
    decoder = []  # the LayerNorm before the decoder, which sees masked positions only
    if bert.cls is not None and "hidden" in keep:
        decoder = [Place(bert.cls["predictions"].transform["LayerNorm"], keep["hidden"])]
    hooks = [place.module.register_forward_hook(place.add) for place in [*places, *decoder]]
    training = bert.training
    bert.eval()
    for batch in batches:
        weight = torch.full((batch.input_ids.numel(), 1), UNMASKED_WEIGHT, device=batch.input_ids.device)
        weight.index_fill_(0, batch.positions, 1.0)  # (T,1)
        for place in places:
            place.weight = weight
        bert(batch.input_ids, batch.positions)
    bert.train(training)
    for hook in hooks:
        hook.remove()
    for place in places:
        if isinstance(place.module, LayerNorm):
            rescale(place)
        fit = place.fit()
        for linear in place.readers:
            a, c = fit[:-1], fit[-1]  # (k,n), (n,)
            if linear.bias is None:  # a projection; its fit has no c
                a = place.fit(constant=False)
            else:
                linear.bias += linear.weight.double() @ c
            linear.weight[:, place.keep] = (linear.weight.double() @ a.T).to(linear.weight)  # (out,k)
    for place in decoder:
        refit_decoder(bert, place)


def read_places(distiller: nn.Module, keep: dict[str, torch.Tensor]) -> list[Place]:
    """All places where units of the groups in `keep` are read by Linears, in forward order. The projections read the
    same hidden units as the layer or head that follows."""
    bert: Bert = distiller.student
    norm, projection = bert.bert.embeddings.LayerNorm, distiller.embedding_projection
    places = []  # (module, group, readers)
    for i, layer in enumerate(bert.bert.layers):
        attention, output = layer.attention["self"], layer.attention["output"]
        places += [(norm, "hidden", [attention.query, attention.key, attention.value, projection]),
                   (output, f"value_output.{i}", [output.dense]),
                   (output.LayerNorm, "hidden", [layer.intermediate["dense"]]),
                   (layer.output, f"feed_forward.{i}", [layer.output.dense])]
        norm, projection = layer.output.LayerNorm, distiller.hidden_projections[i]
    last = [projection] if bert.cls is None else [projection, bert.cls["predictions"].transform["dense"]]
    places.append((norm, "hidden", last if bert.bert.pooler is None else [*last, bert.bert.pooler["dense"]]))
    return [Place(module, keep[group], readers) for module, group, readers in places if group in keep]


def rescale(place: Place):
    """Normalising over fewer dimensions scales and shifts the outputs of a LayerNorm. Correct that by one factor and a
    new bias (k,). The readers could absorb more, but the residual stream takes the outputs as they are."""
    norm, keep = place.module, place.keep
    mean, mean_k, covariance, covariance_k = place.means_and_covariances()
    scale = covariance[:, keep].trace() / covariance_k.trace().clamp(min=1e-12)
    shift = mean[keep] - scale * mean_k
    norm.weight[keep] *= scale.to(norm.weight)
    norm.bias[keep] = (norm.bias[keep] * scale + shift).to(norm.bias)
    change = torch.diag(F.pad(scale.expand(len(keep)), (0, 1), value=1.0))
    change[-1, :-1] = shift
    place.gram, place.cross = change.T @ place.gram @ change, change.T @ place.cross  # the sums for the new outputs


def refit_decoder(bert: Bert, place: Place):
    """Compensate the decoder. It is tied to the word embeddings E, so only the scale g of the LayerNorm before it and
    a change b of its own bias can be fitted to the logits: E_k diag(g) x_k + b ≈ E x.

    The normal equations for g are (E_k^T E_k * cov(x_k, x_k)) g = diag(E_k^T E cov(x, x_k)), with * elementwise.
    """
    words, norm, keep = bert.bert.embeddings.word_embeddings.weight.double(), place.module, place.keep
    mean, mean_k, covariance, covariance_k = place.means_and_covariances()
    gram = words[:, keep].T @ words  # (k,D)
    left, right = gram[:, keep] * covariance_k, (gram * covariance).sum(1)
    ridge = RIDGE * left.diagonal().mean().clamp(min=1e-12) * torch.eye(len(keep)).to(left)
    scale = 1 + torch.linalg.solve(left + ridge, right - left.sum(1))
    for tensor in (norm.weight, norm.bias):
        tensor[keep] *= scale.to(tensor)
    bert.cls["predictions"].bias += words @ mean - words[:, keep] @ (scale * mean_k)
