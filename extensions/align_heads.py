"""Aligned heads (--align-heads): an exact change of basis in every head before training [ours, not in the paper].

The first few dimensions of each aligned head carry most of its work. The model computes the same as before, but pruning
query-key and value-output dimensions then does less harm.

Shape letters as in model.py. T is a number of tokens; x~ = [x, 1] is a vector with a 1 appended, and W~ = [W, b].
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from data import Batch
from model import Bert


@torch.no_grad()
def align_heads(bert: Bert, batches: Iterable[Batch]):
    """Change the basis of every head, in place, to the singular directions of its two matmuls, strongest first.

    The scores of a head are x~ (W~q^T W~k) x~^T, and its values reach the output as x~ (W_o W~v)^T: any invertible
    K x K matrix and its inverse can be inserted between the two factors without changing the output. This takes the one
    that makes the K dimensions of queries and keys, or of values and columns of W_o, orthogonal and of decreasing size
    on the layer's inputs in `batches`. Few or degenerate inputs give worse directions, but never change what the model
    computes.
    """
    layers = bert.bert.layers
    moments = [0.0] * len(layers)  # sum over the tokens of x~^T x~, for each layer's input (D+1,D+1)
    training = bert.training
    bert.eval()
    for batch in batches:
        output = bert(batch.input_ids)
        for i, x in enumerate([output.embedding, *output.hidden[:-1]]):  # (B,S,D)
            x = extended(x).double()  # (T,D+1)
            moments[i] = moments[i] + x.T @ x
    bert.train(training)
    for layer, moment in zip(layers, moments, strict=True):
        moment = moment / moment[-1, -1]  # the last entry is the number of tokens
        attention, dense = layer.attention["self"], layer.attention["output"].dense
        inputs = attention.query, attention.key, attention.value
        q, k, v = (torch.cat([linear.weight, linear.bias[:, None]], 1).double() for linear in inputs)  # (H*K,D+1)
        q, k, v = (t.unflatten(0, (layer.num_heads, -1)) for t in (q, k, v))  # (H,K,D+1)
        o = dense.weight.double().unflatten(1, (layer.num_heads, -1)).transpose(0, 1)  # (H,D,K)
        basis_q, basis_k = balancing_transforms(q @ moment @ q.mT, k @ moment @ k.mT)
        basis_v, basis_o = balancing_transforms(v @ moment @ v.mT, o.mT @ o)
        for linear, aligned in zip(inputs, (basis_q @ q, basis_k @ k, basis_v @ v), strict=True):
            linear.weight.copy_(aligned[..., :-1].flatten(0, 1))
            linear.bias.copy_(aligned[..., -1].flatten())
        dense.weight.copy_((o @ basis_o.mT).transpose(0, 1).flatten(1))


def extended(x):
    """x (...,D) -> x~ (T,D+1): every vector with a 1 appended."""
    return F.pad(x.flatten(0, -2), (0, 1), value=1.0)


def balancing_transforms(a, b):
    """Two transforms X, Y (H,K,K) for factors P, Q (..., K) whose second moments are a, b (H,K,K).

    X^T Y = I, so (P X^T) (Q Y^T)^T = P Q^T; and X a X^T = Y b Y^T = diag(s) with s descending. With the Cholesky
    factors a = A A^T, b = B B^T and the SVD A^T B = U s V^T they are X = s^1/2 U^T A^-1 and Y = s^1/2 V^T B^-1. The
    small ridge keeps matrices of unused dimensions invertible; X^T Y = I holds for any a and b.
    """
    def root(moment):
        ridge = (1e-9 * moment.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-12)  # (H,)
        return torch.linalg.cholesky(moment + ridge[:, None, None] * torch.eye(moment.shape[1]).to(moment))

    root_a, root_b = root(a), root(b)
    u, s, vh = torch.linalg.svd(root_a.mT @ root_b)
    return tuple(s.sqrt()[..., None] * torch.linalg.solve_triangular(factor, directions, upper=False, left=False)
                 for factor, directions in ((root_a, u.mT), (root_b, vh)))
