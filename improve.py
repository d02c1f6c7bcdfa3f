"""Two additions that make a cut less harmful, each behind a flag [both ours; the published method needs neither].

Aligned heads (--align-heads): before training, the dimensions of every head are turned so that the first few of them do
most of its work. What the model computes stays the same, and the cuts of query-key and value-output dimensions find
dimensions that are worth little.

Compensated cuts (--compensate): units that go are partly linear functions of units that stay. Right before a cut, a
least-squares fit on text finds that part and folds it into the weights that read them.

Shape letters as in model.py. T is a number of tokens; x~ = [x, 1] is a vector extended by a one, which takes biases in.
"""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from data import Batch, Rows
from model import Bert, LayerNorm, Linear, ResidualOutput

# Tokens for every unit that a fit explains others with. Too few, and it learns their accidents; twice as many cost
# twice the time and gain little.
TOKENS_PER_UNIT = 8
# Of the mean square of a unit, added to the diagonal of every fit. It draws the fit towards the plain cut.
RIDGE = 1e-3
# Weight of a token that is not masked. All of them count about as much as the masked ones, where predictions are made.
UNMASKED = 0.2


def fit_batches(rows: Rows, units: int, seed: int, step: int, batch_size: int, micro: int, device) -> Iterator[Batch]:
    """Micro-batches of the training rows from those of `step` on, TOKENS_PER_UNIT tokens for each of `units`.

    Rows that come next rather than those just seen: there are always enough, and a resumed run takes the same.
    """
    wanted = math.ceil(TOKENS_PER_UNIT * units / rows.seq_length)
    for later in itertools.count(step):
        for begin in range(0, batch_size, micro):
            end = min(begin + micro, batch_size, begin + wanted)
            yield rows.training_batch(seed, later, batch_size, begin, end).to(device)
            wanted -= end - begin
            if not wanted:
                return


# ---- Aligned heads -------------------------------------------------------------------------------------------


@torch.no_grad()
def align_heads(bert: Bert, batches: Iterable[Batch]):
    """Turn every head's dimensions, in place, onto the singular directions of its two products, strongest first.

    The scores of a head are x~ (W~q^T W~k) x~^T and its output is (W_o W~v) x~^T: any invertible K x K matrix may stand
    between the two factors, with its inverse. Of all choices this takes the one that makes the K dimensions of queries
    and keys, or values and columns of W_o, uncorrelated and of falling size on the layer's inputs in `batches`. Where
    these inputs are few or lie in a plane, the directions are worse but the model still computes the same.
    """
    layers = bert.bert.layers
    moments = [0.0] * len(layers)  # C = sum over the tokens of x~^T x~ of each layer's input
    training = bert.training
    bert.eval()
    for batch in batches:
        output = bert(batch.input_ids)
        for i, x in enumerate([output.embedding, *output.hidden[:-1]]):
            x = extended(x).double()  # (T,D+1)
            moments[i] = moments[i] + x.T @ x
    bert.train(training)
    for layer, moment in zip(layers, moments, strict=True):
        moment = moment / moment[-1, -1]  # the last entry has counted the tokens
        attention, dense = layer.attention["self"], layer.attention["output"].dense
        inputs = attention.query, attention.key, attention.value
        q, k, v = (torch.cat([m.weight, m.bias[:, None]], 1).double().unflatten(0, (layer.heads, -1)) for m in inputs)
        o = dense.weight.double().unflatten(1, (layer.heads, -1)).transpose(0, 1)  # (H,D,K); q, k, v (H,K,D+1)
        turn_q, turn_k = balancing_turns(q @ moment @ q.mT, k @ moment @ k.mT)
        turn_v, turn_o = balancing_turns(v @ moment @ v.mT, o.mT @ o)
        for linear, turned in zip(inputs, (turn_q @ q, turn_k @ k, turn_v @ v), strict=True):
            linear.weight.copy_(turned[..., :-1].flatten(0, 1))
            linear.bias.copy_(turned[..., -1].flatten())
        dense.weight.copy_((o @ turn_o.mT).transpose(0, 1).flatten(1))


def extended(x):
    """(...,D) -> (T,D+1), with a one behind every vector."""
    return F.pad(x.flatten(0, -2), (0, 1), value=1.0)


def balancing_turns(a, b):
    """For the second moments a, b (H,K,K) of two factors P, Q (T,K): M, N (H,K,K) with M^T N = 1, so that
    (P M^T) (Q N^T)^T = P Q^T, and M a M^T = N b N^T = diag(s), s falling.

    With a = A A^T and b = B B^T (Cholesky) and A^T B = U s V^T: M = s^1/2 U^T A^-1, N = s^1/2 V^T B^-1. The small ridge
    keeps dimensions that do nothing invertible; M^T N = 1 holds whatever a and b are.
    """
    def root(moment):
        ridge = (1e-9 * moment.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-12)  # (H,)
        return torch.linalg.cholesky(moment + ridge[:, None, None] * torch.eye(moment.shape[1]).to(moment))

    root_a, root_b = root(a), root(b)
    u, s, vh = torch.linalg.svd(root_a.mT @ root_b)
    return tuple(s.sqrt()[..., None] * torch.linalg.solve_triangular(factor, directions, upper=False, left=False)
                 for factor, directions in ((root_a, u.mT), (root_b, vh)))


# ---- Compensated cuts ----------------------------------------------------------------------------------------


class Moments:
    """Weighted sums over the tokens at one place where units are read: x (T,n) all units as they are, x_k (T,k) those
    that stay, as they will be after the cut; `kept` x~_k^T x~_k (k+1,k+1), `cross` x~_k^T x (k+1,n)."""

    def __init__(self, keep: torch.Tensor):
        self.keep, self.kept, self.cross, self.weight = keep, 0.0, 0.0, 1.0  # weight of the next tokens, (T,1) or one

    def see_norm(self, norm: LayerNorm, inputs, output):
        """Forward hook of a LayerNorm: what it gives now, and what it will give on the dimensions that stay."""
        keep = self.keep
        x_k = F.layer_norm(inputs[0][..., keep], keep.shape, norm.weight[keep], norm.bias[keep], norm.eps)
        x_k = extended(x_k)
        weighted = (x_k * self.weight).T
        self.kept = self.kept + (weighted @ x_k).double()
        self.cross = self.cross + (weighted @ output.flatten(0, -2)).double()

    def see_residual(self, residual: ResidualOutput, inputs, output):
        """Forward hook of LayerNorm(x + W y + b): the units y. The weight follows the LayerNorm, which divides by each
        token's deviation; without that the few tokens with huge sums, [CLS] above all, would decide the fit."""
        y, x = inputs
        variance = (x + residual.dense(y)).flatten(0, -2).var(1, keepdim=True)  # (T,1)
        y = extended(y)
        keep = F.pad(self.keep, (0, 1), value=y.shape[1] - 1)  # and the one
        sums = ((y[:, keep] * (self.weight / (variance + residual.LayerNorm.eps))).T @ y).double()  # (k+1,n+1)
        self.kept, self.cross = self.kept + sums[:, keep], self.cross + sums[:, :-1]

    def fit(self, constant: bool = True):
        """A and c of x ~= x_k A + c, as one matrix (k+1,n); without c it is (k,n)."""
        rows = len(self.kept) - (not constant)
        kept, cross = self.kept[:rows, :rows], self.cross[:rows]
        plain = torch.zeros_like(cross)  # the plain cut: what stays speaks for itself, what goes is zero
        plain[range(len(self.keep)), self.keep] = 1.0
        ridge = RIDGE * kept.diagonal()[:len(self.keep)].mean() * torch.eye(rows).to(kept)
        return plain + torch.linalg.solve(kept + ridge, cross - kept @ plain)


@torch.no_grad()
def compensate(distiller: nn.Module, keep: dict[str, torch.Tensor], batches: Iterable[Batch]):
    """Prepare a Distiller (distill.py) for `prune.cut` with the same `keep`: change its weights in place, at full
    width, so that the units that stay speak for those that go. Adam's moments are only sliced, as in a plain cut.

    Wherever units are read, x ~= x_k A + c is fitted, and a reader W x + b becomes (W A^T) x_k + (W c + b). All fits
    come from one pass over `batches` without autocast; take `fit_batches`. Query-key dimensions are left alone: their
    readers are each other.
    """
    bert: Bert = distiller.student
    head = None if bert.cls is None else bert.cls["predictions"]
    norm = bert.bert.embeddings.LayerNorm
    places: list[tuple[nn.Module, str, list[Linear]]] = []  # what sees the units, their set, what reads them there
    for i, layer in enumerate(bert.bert.layers):
        attention, output = layer.attention["self"], layer.attention["output"]
        places += [(norm, "hidden", [attention.query, attention.key, attention.value]),
                   (output, f"value_output.{i}", [output.dense]),
                   (output.LayerNorm, "hidden", [layer.intermediate["dense"]]),
                   (layer.output, f"feed_forward.{i}", [layer.output.dense])]
        norm = layer.output.LayerNorm
    last = [] if head is None else [head.transform["dense"]]
    places.append((norm, "hidden", last if bert.bert.pooler is None else [*last, bert.bert.pooler["dense"]]))
    places = [place for place in places if place[1] in keep]
    seen = {module: Moments(keep[units]) for module, units, _ in places}
    hooks = [module.register_forward_hook(moments.see_norm if isinstance(module, LayerNorm) else moments.see_residual)
             for module, moments in seen.items()]
    if head is not None and "hidden" in keep:
        decoded = Moments(keep["hidden"])
        hooks.append(head.transform["LayerNorm"].register_forward_hook(decoded.see_norm))
    training = bert.training
    bert.eval()
    for batch in batches:
        weight = torch.full((batch.input_ids.numel(), 1), UNMASKED, device=batch.input_ids.device)
        for moments in seen.values():
            moments.weight = weight.index_fill(0, batch.positions, 1.0)
        bert(batch.input_ids, batch.positions)
    bert.train(training)
    for hook in hooks:
        hook.remove()

    for module, units, readers in places:
        if isinstance(module, LayerNorm):
            rescale(module, seen[module])
        fit = seen[module].fit()
        for reader in readers:
            reader.bias += reader.weight.double() @ fit[-1]
            replace_columns(reader, keep[units], fit[:-1])
    if "hidden" not in keep:
        return
    if head is not None:
        refit_decoder(bert, decoded)
    # Neither projection has a bias, so their fits have no c. One W_hidn reads the outputs of all layers.
    embedding, together = seen[bert.bert.embeddings.LayerNorm], Moments(keep["hidden"])
    for layer in bert.bert.layers:
        together.kept = together.kept + seen[layer.output.LayerNorm].kept
        together.cross = together.cross + seen[layer.output.LayerNorm].cross
    replace_columns(distiller.embedding_projection, keep["hidden"], embedding.fit(constant=False))
    replace_columns(distiller.hidden_projection, keep["hidden"], together.fit(constant=False))


def replace_columns(reader: Linear, keep: torch.Tensor, a: torch.Tensor):
    """W (out,n) -> W A^T in the columns that stay, A (k,n)."""
    reader.weight[:, keep] = (reader.weight.double() @ a.T).to(reader.weight)


def rescale(norm: LayerNorm, m: Moments):
    """A LayerNorm over fewer dimensions stretches and shifts them. Undo what one factor and a new bias can undo, since
    the residual stream goes on without passing any matrix; `m` then tells of the outputs after that."""
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
    """The decoder is the word embeddings E, which cannot change for one reader. What is free before and behind it, the
    scales g of the transform's LayerNorm and the decoder's bias, is fitted to the logits: E_k diag(g) x_k + b ~= E x.

    Least squares over g: (E_k^T E_k * cov(x_k, x_k)) g = diag(E_k^T E cov(x, x_k)), * elementwise.
    """
    words, keep = bert.bert.embeddings.word_embeddings.weight.double(), m.keep
    norm, count = bert.cls["predictions"].transform["LayerNorm"], m.kept[-1, -1]
    mean, mean_k = m.cross[-1] / count, m.kept[-1, :-1] / count
    covariance_k = m.kept[:-1, :-1] / count - torch.outer(mean_k, mean_k)  # (k,k)
    covariance = m.cross[:-1] / count - torch.outer(mean_k, mean)  # (k,D)
    products = words[:, keep].T @ words  # (k,D)
    left, right = products[:, keep] * covariance_k, (products * covariance).sum(1)
    ridge = RIDGE * left.diagonal().mean() * torch.eye(len(keep)).to(left)
    scale = 1 + torch.linalg.solve(left + ridge, right - left.sum(1))
    for tensor in (norm.weight, norm.bias):
        tensor[keep] *= scale.to(tensor)
    bert.cls["predictions"].bias += words @ mean - words[:, keep] @ (scale * mean_k)
