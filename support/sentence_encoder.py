"""Sentence encoders: the modules that follow the BERT in a SentenceTransformer, read from a teacher, written for a
student.

    encoder = SentenceEncoder.read(folder, bert.config)  # None if the folder has no modules.json
    vectors = encoder.vectors(bert, sentences)           # (N,E)

Shape letters as in model.py, and N: sentences, E: size of a sentence vector.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from data import MaskedRows
from model import Bert, BertConfig
from support.checkpoint import read_tensors
from support.errors import InputError
from support.files import read_json

SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer_config.json")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")  # classes in torch.nn
POOLING = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
BATCH, SHORTEST = 64, 5  # sentences at a time, tokens of a sentence
RIDGE = 1e-4  # times the mean diagonal of x^T x


@dataclasses.dataclass
class Dense:
    """y = activation(x weight^T + bias)."""

    weight: torch.Tensor  # (out,in)
    bias: torch.Tensor  # (out,)
    activation: str = "Identity"

    def __call__(self, x):
        return getattr(nn, self.activation)()(F.linear(x, self.weight.to(x), self.bias.to(x)))


@dataclasses.dataclass
class SentenceEncoder:
    """Pooling, then perhaps Dense layers and scaling to length 1; and the settings that a student keeps."""

    pooling: str  # "cls" or "mean"
    pooling_config: dict
    dense: list[Dense]
    normalize: bool
    max_length: int  # tokens
    settings: dict[str, dict]  # file name -> content

    @classmethod
    def read(cls, folder: Path, config: BertConfig) -> "SentenceEncoder | None":
        """The modules behind the BERT in `folder`, or None if it is no SentenceTransformer. Raises InputError for
        modules that we cannot compute."""
        table = folder / "modules.json"
        if not table.is_file():
            return None
        try:
            modules = [(str(entry["type"]).rpartition(".")[2], str(entry["path"]))
                       for entry in json.loads(table.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{table} is not a list of modules with path and type") from None
        layout, name = " ".join(f"{kind}:{path}" for kind, path in modules), r"\w[\w.-]*"
        if not re.fullmatch(f"Transformer: Pooling:{name}( Dense:{name})*( Normalize:{name})?", layout):
            raise InputError(f"{table}: {layout!r} is not supported, only Transformer in the folder itself, then "
                             "Pooling, any number of Dense, and Normalize in folders beside modules.json")
        pooling_config = read_json(folder / modules[1][1] / "config.json")
        dense, size = [], config.hidden_size
        for kind, path in modules:
            if kind == "Dense":
                dense.append(read_dense(folder / path, size))
                size = len(dense[-1].bias)
        settings = {name: read_json(folder / name) for name in SETTINGS if (folder / name).is_file()}
        limits = [settings.get("sentence_bert_config.json", {}).get("max_seq_length"),
                  settings.pop("tokenizer_config.json", {}).get("model_max_length")]
        limits = [limit for limit in limits if type(limit) in (int, float) and limit >= 1]  # the first counts
        return cls(pooling_mode(pooling_config, folder / modules[1][1]), pooling_config, dense,
                   modules[-1][0] == "Normalize", int(min([*limits[:1], config.max_position_embeddings])), settings)

    @torch.no_grad()
    def pooled(self, bert: Bert, sentences: list[np.ndarray]):
        """Pooled vectors (N,D) of sentences, which are arrays of token ids with [CLS] and [SEP]."""
        device, parts = next(bert.parameters()).device, []
        for start in range(0, len(sentences), BATCH):
            rows = [torch.from_numpy(ids) for ids in sentences[start : start + BATCH]]
            ids = nn.utils.rnn.pad_sequence(rows, True, bert.config.pad_token_id).to(device)  # (B,S)
            lengths = torch.tensor([len(row) for row in rows], device=device)  # (B,)
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # (B,S)
            hidden = bert.eval()(ids, attention_mask=mask).hidden[-1].float()  # (B,S,D)
            parts.append(self.pool(hidden, mask))
        return torch.cat(parts)

    def vectors(self, bert: Bert, sentences: list[np.ndarray]):
        """Sentence vectors (N,E)."""
        return self.after_pooling(self.pooled(bert, sentences))

    def pool(self, hidden, mask):
        """Hidden states (B,S,D) -> pooled vectors (B,D). mask (B,S): 1 for a token, 0 for padding."""
        mask = mask[..., None].to(hidden)  # (B,S,1)
        mean = (hidden * mask).sum(1) / mask.sum(1)  # (B,D)
        return hidden[:, 0] if self.pooling == "cls" else mean

    def distance(self, student, teacher):
        """L_pool: the mean squared distance of pooled vectors of length 1, which is 2 - 2 cosine, from hidden states
        (B,S,D) without padding."""
        mask = torch.ones(teacher.shape[:2], device=teacher.device)  # (B,S)
        s, t = (F.normalize(self.pool(hidden.float(), mask), dim=1) for hidden in (student, teacher))
        return (s - t).square().sum(1).mean()

    def after_pooling(self, vectors):
        """The modules behind the pooling: pooled vectors (N,D) -> sentence vectors (N,E)."""
        for layer in self.dense:
            vectors = layer(vectors)
        return F.normalize(vectors, dim=1) if self.normalize else vectors

    def composed(self, weight, bias) -> "SentenceEncoder":
        """The encoder of a student from whose pooled vectors x the teacher's are predicted as x weight^T + bias: this
        map is folded into the first Dense or, if there is none, becomes one. weight (D_t,D_s), bias (D_t,)."""
        weight, bias = weight.detach().float().cpu(), bias.detach().float().cpu()
        first = self.dense[0] if self.dense else Dense(torch.eye(len(weight)), torch.zeros(len(weight)))
        first = Dense(first.weight @ weight, first.weight @ bias + first.bias, first.activation)
        return dataclasses.replace(self, dense=[first, *self.dense[1:]])

    def fitted(self, student: Bert, teacher: Bert, sentences: list[np.ndarray]) -> "SentenceEncoder":
        """The encoder of a student in the teacher's vector space, by least squares from the student's pooled vectors of
        the sentences to the teacher's."""
        x = F.pad(self.pooled(student, sentences).double(), (0, 1), value=1.0)  # (N,D_s+1)
        gram = x.T @ x
        gram.diagonal()[:-1].add_(RIDGE * gram.diagonal()[:-1].mean())  # fewer sentences than dimensions still fit
        solution = torch.linalg.solve(gram, x.T @ self.pooled(teacher, sentences).double())  # (D_s+1,D_t)
        return self.composed(solution[:-1].T, solution[-1])

    def save(self, folder: Path, hidden_size: int):
        """Write the modules beside a student of `hidden_size` in `folder`."""
        pooling = {key: value for key, value in self.pooling_config.items() if not key.endswith("embedding_dimension")}
        pooling["word_embedding_dimension"] = hidden_size  # the name that all versions of the library read
        modules = [("Pooling", pooling), *(("Dense", layer) for layer in self.dense), ("Normalize", {})]
        table = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        for i, (kind, config) in enumerate(modules if self.normalize else modules[:-1], start=1):
            path = folder / f"{i}_{kind}"
            table.append({"idx": i, "name": str(i), "path": path.name, "type": f"sentence_transformers.models.{kind}"})
            path.mkdir()
            if isinstance(config, Dense):
                tensors = {"linear.weight": config.weight.contiguous(), "linear.bias": config.bias}
                (path / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
                activation = getattr(nn, config.activation)
                config = {"in_features": config.weight.shape[1], "out_features": len(config.bias), "bias": True,
                          "activation_function": f"{activation.__module__}.{activation.__name__}"}
            (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name, content in {"modules.json": table, **self.settings}.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def pooling_mode(config: dict, folder: Path) -> str:
    """The key of POOLING in a Pooling's config. Raises InputError for other modes and for several at a time."""
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    for mode, flag in POOLING.items():
        if config.get("pooling_mode", flags) in (mode, [mode], [flag]):  # a flag until version 5, a word from 6 on
            return mode
    raise InputError(f"{folder / 'config.json'}: this pooling is not supported, only {' or '.join(POOLING)}")


def read_dense(folder: Path, size: int) -> Dense:
    """The Dense layer in `folder`, whose input must have `size` dimensions. Raises InputError."""
    config, tensors = read_json(folder / "config.json"), read_tensors(folder)
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]  # Tanh is the library's default
    ports = [config.get(f"module_{end}_name") or "sentence_embedding" for end in ("input", "output")]
    if activation not in ACTIVATIONS or config.get("use_residual") or ports != ["sentence_embedding"] * 2:
        raise InputError(f"{folder / 'config.json'}: only a Dense of sentence_embedding without residual is supported, "
                         f"with one of {', '.join(ACTIVATIONS)}")
    weight = tensors.pop("linear.weight", torch.zeros(0))
    bias = tensors.pop("linear.bias", torch.zeros(weight.shape[:1]))
    finite = weight.isfinite().all() and bias.isfinite().all()
    if tensors or not finite or bias.dim() != 1 or weight.shape != (len(bias), size):
        raise InputError(f"{folder} needs a finite linear.weight of {size} columns, perhaps a linear.bias, and no more")
    return Dense(weight, bias, activation)


def sentences_of(rows: MaskedRows, count: int, tokenizer: Tokenizer) -> list[np.ndarray]:
    """At most `count` different sentences from rows that are spread over the text, as token ids with [CLS] and [SEP],
    the shortest first. Rows are split after the marks; the first and the last part, which may be incomplete, are
    dropped unless there are no others."""
    marks, sentences = [tokenizer.token_to_id(mark) for mark in ".?!。？！।" if tokenizer.token_to_id(mark)], {}
    for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int):
        parts = np.split(rows.text[i], np.flatnonzero(np.isin(rows.text[i], marks)) + 1)
        for part in parts[1:-1] or parts:
            if len(part) >= SHORTEST:
                sentences[part.tobytes()] = np.concatenate([[rows.cls], part, [rows.sep]])
    sentences = list(sentences.values())
    chosen = np.linspace(0, len(sentences) - 1, min(count, len(sentences))).astype(int)
    return sorted((sentences[i] for i in chosen), key=len)  # batches of similar lengths need little padding
