"""BERT (Devlin et al., 2019) with explicit widths, so that it can be pruned while it is trained.

Every weight but the decoder bias sits in a Linear, an Embedding or a LayerNorm. These read their widths from their
weights, which prune.py slices. The inner width of attention (H*K) is independent of the hidden size D, because while a
model is being pruned D need not be a multiple of H. Modules are named as in `transformers`, so a state dict of this
model is a standard checkpoint; support/checkpoint.py loads and saves it.

Shape letters, the same in every file:
    B batch         S sequence     D hidden size   H heads   K head size   F intermediate (feed-forward) size
    V vocabulary    L layers       M masked positions in the batch
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "gelu": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "relu": F.relu,
    **dict.fromkeys(("silu", "swish"), F.silu),
}


@dataclasses.dataclass
class BertConfig:
    """The shape of a BERT, with the field names of the standard config.json.

    `attention_head_size` (K) defaults to D // H. It differs from that only while the model is being pruned.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    attention_head_size: int = 0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    def __post_init__(self):
        self.attention_head_size = self.attention_head_size or self.hidden_size // self.num_attention_heads

    @property
    def inner_size(self) -> int:
        """H*K, the width of queries, keys and values with the heads side by side."""
        return self.num_attention_heads * self.attention_head_size


# ---- The three layers whose weights are pruned ---------------------------------------------------------------


class Linear(nn.Module):
    """y = x W^T + b, with W (out, in)."""

    def __init__(self, in_size: int, out_size: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A lookup table, W (rows, width)."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class LayerNorm(nn.Module):
    """Normalisation over the last axis: after a prune, mean and variance are those of the kept units."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


# ---- The encoder ---------------------------------------------------------------------------------------------


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, input_ids, token_type_ids=None):
        positions = self.position_embeddings.weight[: input_ids.shape[1]]  # (S,D)
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]  # (D,)
        else:
            types = self.token_type_embeddings(token_type_ids)  # (B,S,D)
        x = self.word_embeddings(input_ids) + positions + types  # (B,S,D)
        return F.dropout(self.LayerNorm(x), self.dropout, self.training)


class SelfAttention(nn.Module):
    """Query, key and value projections. Their H*K output rows are ordered by head: row h*K + k is unit k of head h."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.query = Linear(config.hidden_size, config.inner_size)
        self.key = Linear(config.hidden_size, config.inner_size)
        self.value = Linear(config.hidden_size, config.inner_size)

    def forward(self, x):
        return self.query(x), self.key(x), self.value(x)  # each (B,S,H*K)


class ResidualOutput(nn.Module):
    """LayerNorm(residual + W x + b): adds what attention or the feed-forward block computed to the residual stream."""

    def __init__(self, in_size: int, config: BertConfig):
        super().__init__()
        self.dense = Linear(in_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x, residual):
        return self.LayerNorm(residual + F.dropout(self.dense(x), self.dropout, self.training))


class Layer(nn.Module):
    """One transformer layer. The number of heads H is kept here, where queries, keys and values are split."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob  # of attention
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention = nn.ModuleDict({
            "self": SelfAttention(config),
            "output": ResidualOutput(config.inner_size, config),
        })
        self.intermediate = nn.ModuleDict({"dense": Linear(config.hidden_size, config.intermediate_size)})
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, x, mask=None, want_scores=False):
        """x (B,S,D), mask (B,1,1,S) True where a token may be attended to -> output (B,S,D) and head-averaged scores
        (B,S,S), or None unless `want_scores`."""
        q, k, v = self.attention["self"](x)  # (B,S,H*K)
        scores = mean_attention_scores(q, k, self.num_heads) if want_scores else None
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B,H,S,K)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        context = context.transpose(1, 2).flatten(2)  # (B,S,H*K)
        x = self.attention["output"](context, x)
        return self.output(self.activation(self.intermediate["dense"](x)), x), scores


def mean_attention_scores(q, k, num_heads: int):
    """Scaled scores before the softmax, averaged over the heads: mean_h q_h k_h^T / sqrt(K) = Q K^T / (H sqrt(K)).

    q, k (B,S,H*K) -> (B,S,S). This is one matmul with the heads side by side; no (B,H,S,S) tensor is needed.
    """
    head_size = q.shape[-1] // num_heads
    return q @ k.transpose(1, 2) / (num_heads * head_size**0.5)


class Encoder(nn.Module):
    """Embeddings, L layers and an optional pooler."""

    def __init__(self, config: BertConfig, pooler: bool):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.pooler = nn.ModuleDict({"dense": Linear(config.hidden_size, config.hidden_size)}) if pooler else None

    @property
    def layers(self):
        return self.encoder["layer"]


class MaskedLMHead(nn.Module):
    """Transform, then the decoder, which is tied to the word embeddings: one tensor used twice, and a bias (V)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = nn.ModuleDict({
            "dense": Linear(config.hidden_size, config.hidden_size),
            "LayerNorm": LayerNorm(config.hidden_size, config.layer_norm_eps),
        })
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x, word_embeddings):
        """x (M,D), word_embeddings (V,D) -> logits (M,V)."""
        x = self.transform["LayerNorm"](self.activation(self.transform["dense"](x)))
        return F.linear(x, word_embeddings, self.bias)


@dataclasses.dataclass
class Output:
    """What the losses need. Each of `scores` is None unless requested; `logits` is None without positions or head."""

    embedding: torch.Tensor  # (B,S,D), after its LayerNorm
    hidden: list[torch.Tensor]  # L times (B,S,D)
    scores: list[torch.Tensor | None]  # L times (B,S,S): before the softmax, averaged over the heads
    logits: torch.Tensor | None  # (M,V)


class Bert(nn.Module):
    """A BERT with optional pooler and masked-LM head, initialised like BERT: normal, std `initializer_range`."""

    def __init__(self, config: BertConfig, pooler: bool = True, head: bool = True):
        super().__init__()
        self.config = config
        self.bert = Encoder(config, pooler)
        self.cls = nn.ModuleDict({"predictions": MaskedLMHead(config)}) if head else None
        for layer in self.modules():
            if isinstance(layer, (Linear, Embedding)):
                nn.init.normal_(layer.weight, std=config.initializer_range)

    def forward(self, input_ids, positions=None, token_type_ids=None, attention_mask=None, want_scores=False) -> Output:
        """input_ids, token_type_ids, attention_mask (B,S); attention_mask 1 for a token, 0 for padding.

        positions (M,) index the flattened (B*S) batch: vocabulary logits are computed at these positions only.
        """
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # (B,1,1,S)
        x = embedding = self.bert.embeddings(input_ids, token_type_ids)
        hidden, scores = [], []
        for layer in self.bert.layers:
            x, layer_scores = layer(x, mask, want_scores)
            hidden.append(x)
            scores.append(layer_scores)
        logits = None
        if self.cls is not None and positions is not None:
            masked = x.flatten(0, 1)[positions]  # (M,D)
            logits = self.cls["predictions"](masked, self.bert.embeddings.word_embeddings.weight)
        return Output(embedding, hidden, scores, logits)

    def pooled(self, x):
        """The pooler: tanh of a linear map of the first token. x (B,S,D) -> (B,D)."""
        return torch.tanh(self.bert.pooler["dense"](x[:, 0]))

    def set_dropout(self, probability: float):
        """Set all dropout probabilities used in training. The config keeps its own, which are exported."""
        for module in self.modules():
            if isinstance(module, (Embeddings, ResidualOutput, Layer)):
                module.dropout = probability

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
