"""A BERT encoder with explicit widths, its pooler and its masked-LM head, all of it in this single file.

This is the model of Devlin et al. (2019), written so that it can become narrower while it is trained. Every weight
sits in one of three layers, Linear, Embedding and LayerNorm, and each of them can be sliced along a named axis in
place. The inner width of attention (H * K) does not depend on the hidden width D, because between two cuts D need
not be a multiple of H. Modules carry the names of the standard checkpoints, so a state dict is a checkpoint.

One alphabet of shape letters in every file:
    B batch   S sequence   D hidden width   H heads   K width of one head   F feed-forward width
    V vocabulary   L layers   M masked positions in the batch
"""

import collections
import dataclasses
import json
import logging
import os
import pickle
import re
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class InputError(Exception):
    """A mistake in what the user gave. Its message is one line that says what is wrong and what to do about it."""


# ---- Configuration: the standard config.json -----------------------------------------------------------------


@dataclasses.dataclass
class BertConfig:
    """The shape of a BERT. Field names are those of the standard config.json; `attention_head_size` (K) is D // H
    there and is written only where it is not, that is between two cuts."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    attention_head_size: int = 0  # 0: D // H
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
        """H * K, the width of queries, keys and values side by side."""
        return self.num_attention_heads * self.attention_head_size

    @classmethod
    def load(cls, folder: Path) -> "BertConfig":
        """Read `folder/config.json`. Raises InputError for anything that is not a BERT this file can compute."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        for key, expected in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False),
                              ("tie_word_embeddings", True)):
            if raw.get(key) not in (None, expected):
                raise InputError(f"{path}: {key} is {raw[key]!r}; only {expected!r} is supported: give a plain BERT")
        values = {}
        for field in dataclasses.fields(cls):
            name, value = field.name, raw.get(field.name)
            if value is None:
                value = field.default
            if value is dataclasses.MISSING:
                raise InputError(f"{path}: {name} is missing; this is not the config.json of a BERT")
            least = 0 if name in ("attention_head_size", "pad_token_id") else 1
            most = 1000 if name == "num_hidden_layers" else 10**6  # beyond any BERT; a damaged file must not hang us
            if field.type is int and not (type(value) is int and least <= value <= most):
                raise InputError(f"{path}: {name} is {value!r}; it must be a whole number from {least} to {most}")
            if field.type is float and not (type(value) in (int, float) and 0 <= value < 1):
                raise InputError(f"{path}: {name} is {value!r}; it must be a number from 0 to below 1")
            if field.type is str and value not in list(ACTIVATIONS):
                raise InputError(f"{path}: {name} {value!r} is unknown; known are {', '.join(ACTIVATIONS)}")
            values[name] = field.type(value)
        if not values["attention_head_size"] and values["hidden_size"] % values["num_attention_heads"]:
            raise InputError(f"{path}: hidden_size is not a multiple of num_attention_heads")
        return cls(**values)

    def save(self, folder: Path, architecture: str):
        """Write `folder/config.json` in the standard form."""
        raw = {"architectures": [architecture], "model_type": "bert", "position_embedding_type": "absolute"}
        raw |= dataclasses.asdict(self) | {"dtype": "float32"}
        if self.inner_size == self.hidden_size:
            del raw["attention_head_size"]
        (Path(folder) / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


# ---- The three layers with explicit widths -------------------------------------------------------------------


class Sliceable(nn.Module):
    """A layer whose tensors can be sliced along a named axis. `axes`: axis name -> {tensor name: dimension}."""

    axes: dict[str, dict[str, int]] = {}

    def slice_(self, axis: str, keep: torch.Tensor):
        """Keep the units `keep` (int64 indices) of `axis`, in that order, and free the rest.

        Each tensor becomes a new Parameter rather than new data in the old one: autograd remembers the shape of a
        parameter for as long as any graph that used it is alive, so a loss kept by a caller, or
        DistributedDataParallel, would make the next backward pass fail.
        """
        for name, dimension in self.axes[axis].items():
            old = getattr(self, name)
            if old is not None:
                new = nn.Parameter(old.detach().index_select(dimension, keep), requires_grad=old.requires_grad)
                new.grad = None if old.grad is None else old.grad.index_select(dimension, keep)
                setattr(self, name, new)


class Linear(Sliceable):
    """y = x W^T + b, with W (out, in)."""

    axes = {"out": {"weight": 0, "bias": 0}, "in": {"weight": 1}}

    def __init__(self, in_width: int, out_width: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.bias = nn.Parameter(torch.zeros(out_width)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Embedding(Sliceable):
    """A table of `rows` vectors, W (rows, width)."""

    axes = {"width": {"weight": 1}}

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids):
        return F.embedding(ids, self.weight)


class LayerNorm(Sliceable):
    """Normalisation over the last axis, with mean and variance over the units that are left."""

    axes = {"width": {"weight": 0, "bias": 0}}

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
    """Query, key and value projections. Their H*K output rows lie head by head: row h*K + k is unit k of head h."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.query = Linear(config.hidden_size, config.inner_size)
        self.key = Linear(config.hidden_size, config.inner_size)
        self.value = Linear(config.hidden_size, config.inner_size)

    def forward(self, x):
        return self.query(x), self.key(x), self.value(x)  # each (B,S,H*K)


class ResidualOutput(nn.Module):
    """LayerNorm(x + W y + b): how both halves of a layer return to the residual stream."""

    def __init__(self, in_width: int, config: BertConfig):
        super().__init__()
        self.dense = Linear(in_width, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, y, x):
        return self.LayerNorm(x + F.dropout(self.dense(y), self.dropout, self.training))


class Layer(nn.Module):
    """One transformer layer. `heads` (H) stands here, where queries, keys and values are split."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.activation = ACTIVATIONS[config.hidden_act]
        self.attention = nn.ModuleDict({
            "self": SelfAttention(config),
            "output": ResidualOutput(config.inner_size, config),
        })
        self.intermediate = nn.ModuleDict({"dense": Linear(config.hidden_size, config.intermediate_size)})
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, x, mask=None, want_scores=False):
        """x (B,S,D), mask (B,1,1,S) True where a token may be looked at -> output (B,S,D) and the head-averaged scores
        (B,S,S) or None."""
        q, k, v = self.attention["self"](x)  # (B,S,H*K)
        scores = mean_attention_scores(q, k, self.heads) if want_scores else None
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B,H,S,K)
        dropout = self.attention_dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        context = context.transpose(1, 2).flatten(2)  # (B,S,H*K)
        x = self.attention["output"](context, x)
        return self.output(self.activation(self.intermediate["dense"](x)), x), scores


def mean_attention_scores(q, k, heads: int):
    """Scaled scores before the softmax, averaged over the heads: mean_h q_h k_h^T / sqrt(K) = Q K^T / (H sqrt(K)).

    q, k (B,S,H*K) -> (B,S,S). One product with the heads side by side; a (B,H,S,S) tensor never exists.
    """
    head_size = q.shape[-1] // heads
    return q @ k.transpose(1, 2) / (heads * head_size**0.5)


class Encoder(nn.Module):
    """Embeddings, L layers and, where the checkpoint has one, the pooler."""

    def __init__(self, config: BertConfig, pooler: bool):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.pooler = nn.ModuleDict({"dense": Linear(config.hidden_size, config.hidden_size)}) if pooler else None

    @property
    def layers(self):
        return self.encoder["layer"]


class MaskedLMHead(nn.Module):
    """Transform, then the decoder: the word embeddings themselves, one tensor used twice, and a bias (V)."""

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
    """What the losses need. `scores` is empty unless asked for; `logits` is None without positions or head."""

    embedding: torch.Tensor  # (B,S,D)
    hidden: list[torch.Tensor]  # L times (B,S,D)
    scores: list[torch.Tensor]  # L times (B,S,S), before the softmax, averaged over the heads
    logits: torch.Tensor | None  # (M,V)


class Bert(nn.Module):
    """A BERT with or without pooler and masked-LM head, freshly initialised as BERT is: normal, `initializer_range`."""

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

        positions (M,) are indices into the flattened (B*S) batch: vocabulary logits are computed there alone.
        """
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # (B,1,1,S)
        x = embedding = self.bert.embeddings(input_ids, token_type_ids)
        hidden, scores = [], []
        for layer in self.bert.layers:
            x, layer_scores = layer(x, mask, want_scores)
            hidden.append(x)
            if want_scores:
                scores.append(layer_scores)
        logits = None
        if self.cls is not None and positions is not None:
            masked = x.flatten(0, 1)[positions]  # (M,D)
            logits = self.cls["predictions"](masked, self.bert.embeddings.word_embeddings.weight)
        return Output(embedding, hidden, scores, logits)

    def pooled(self, x):
        """Pooler: tanh of a linear map of the first token. x (B,S,D) -> (B,D)."""
        return torch.tanh(self.bert.pooler["dense"](x[:, 0]))

    def set_dropout(self, hidden: float, attention: float):
        """Dropout probabilities of a model in training mode; the config.json that is saved keeps its own."""
        for module in self.modules():
            if isinstance(module, (Embeddings, ResidualOutput)):
                module.dropout = hidden
            if isinstance(module, Layer):
                module.attention_dropout = attention

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


# ---- Checkpoints ---------------------------------------------------------------------------------------------

# Where weights may lie, best first
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_json(path: Path) -> dict:
    """The JSON object in `path`; InputError where there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a model folder holds config.json, weights and a tokenizer") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def find_model(name: str) -> Path:
    """The folder of a model: a local one, or that of a hub name in the hub's cache, downloaded where necessary.

    Only the files that are needed are fetched. Raises InputError, within 10 seconds where the hub is out of reach.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise InputError(f"{name} is a file; give the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise InputError(f"{name}: there is no such folder, and it is not the name of a model on the hub")

    def wanted(files: list[str]) -> list[str]:
        weights = [w for w in WEIGHTS if w in files][:1]
        others = [f for f in ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json") if f in files]
        if not weights or others[:1] != ["config.json"] or not {"vocab.txt", "tokenizer.json"} & set(others):
            raise InputError(f"{name} on the hub lacks config.json, a tokenizer or any of {', '.join(WEIGHTS)}")
        if weights[0].endswith(".index.json"):
            weights += [f for f in files if re.fullmatch(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)", f)]
        return weights + others

    return Path(hub_files(name, "model", wanted)[0])


def hub_files(name: str, kind: str, wanted) -> tuple[str, list[str]]:
    """The local snapshot folder of a hub repository and its files' names, from the hub's cache where they are in it.

    kind: "model" or "dataset". wanted: from all file names of the repository to those that are needed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "4")  # seconds without a byte, six times before it gives up
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retry messages are not for our users
    try:
        # Without patterns the library would miss the files that we never ask for
        folder = snapshot_download(name, repo_type=kind, local_files_only=True, allow_patterns=[])
        files = wanted([str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()])
        parts = collections.Counter(re.findall(r"(.*)-\d+-of-(\d+)\.", "\n".join(files)))  # (name, count) -> how many
        if all(present == int(count) for (_, count), present in parts.items()):
            return folder, files
    except (LocalEntryNotFoundError, HFValidationError, InputError):
        pass  # not in the cache, or only a part of it
    try:
        info = HfApi().repo_info(name, repo_type=kind, timeout=5)  # one request, no retries: quick to fail
        files = wanted([sibling.rfilename for sibling in info.siblings])
        return snapshot_download(name, repo_type=kind, allow_patterns=files), files
    except InputError:
        raise
    except RepositoryNotFoundError:
        raise InputError(f"{name}: there is no such folder here and no such public {kind} on the hub") from None
    except Exception as error:  # the hub's client raises its transport's own exceptions: all mean "not to be had"
        raise InputError(f"{name}: no such folder here, not in the hub's cache, and the hub did not deliver it "
                         f"({one_line(error)}); check the name and the network, or give a local path") from None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder in float32: safetensors or torch's own format, whole or sharded.

    Torch files are opened with `weights_only=True`, which refuses to run code. Raises InputError.
    """
    folder = Path(folder)
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise InputError(f"{folder} holds no model.safetensors and no pytorch_model.bin")
    files = [name]
    if name.endswith(".index.json"):
        shards = read_json(folder / name).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise InputError(f"{folder / name}: weight_map must give a file for each tensor")
        files = sorted(set(shards.values()))
        for file in files:
            if Path(file).name != file or not (folder / file).is_file():
                raise InputError(f"{folder / name}: {file!r} is not a file in this folder")
    tensors = {}
    for file in files:
        try:
            if file.endswith(".safetensors"):
                part = safetensors.torch.load_file(folder / file)
            else:
                part = torch.load(folder / file, map_location="cpu", weights_only=True)
            tensors |= {name: tensor.float() for name, tensor in part.items()}
        except pickle.UnpicklingError:  # the message of torch explains how to run the code nevertheless
            raise InputError(f"{folder / file} is damaged, or holds code beside tensors and was not opened") from None
        except Exception as error:  # anything from SafetensorError to UnicodeDecodeError; no dictionary of tensors
            raise InputError(f"{folder / file} is damaged or not a checkpoint: {one_line(error)}") from None
    return tensors


def standard_name(name: str) -> str:
    """The present-day name of a tensor from any generation of BERT checkpoints."""
    name = str(name).replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return name if name.startswith(("bert.", "cls.")) else f"bert.{name}"


def load_model(folder: Path) -> Bert:
    """Load a BERT, with pooler and masked-LM head where the checkpoint has them.

    Raises InputError naming every tensor that is missing, unexpected or of the wrong shape.
    """
    config = BertConfig.load(folder)
    tensors = {standard_name(name): tensor for name, tensor in read_tensors(folder).items()}
    ignored = r"bert\.embeddings\.position_ids|cls\.seq_relationship\..*"  # not weights of this model
    tensors = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(ignored, name)}
    bias, decoder = (tensors.pop(f"cls.predictions.decoder.{kind}", None) for kind in ("bias", "weight"))
    if bias is not None:
        tensors.setdefault("cls.predictions.bias", bias)
    if decoder is not None and not torch.equal(decoder, tensors.get("bert.embeddings.word_embeddings.weight", decoder)):
        raise InputError(f"{folder}: cls.predictions.decoder.weight is not the word embeddings; tie it to them")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{folder}: {', '.join(broken[:8])}: numbers that are not finite; the weights are damaged")
    with torch.device("meta"):  # no memory, no time: every tensor is assigned below
        model = Bert(config, pooler="bert.pooler.dense.weight" in tensors,
                     head=any(name.startswith("cls.predictions.") for name in tensors))
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    problems += [f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
                 for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise InputError(f"{folder} does not fit its config.json: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def save_model(model: Bert, folder: Path):
    """Write config.json and model.safetensors (float32) in the standard names into an existing folder."""
    model.config.save(folder, "BertModel" if model.cls is None else "BertForMaskedLM")
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    (Path(folder) / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
