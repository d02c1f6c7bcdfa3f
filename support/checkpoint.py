"""Model folders in the standard format of `transformers`: config.json, weights and tokenizer, in and out."""

import dataclasses
import json
import re
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, normalizers, processors

from model import ACTIVATIONS, Bert, BertConfig
from support.errors import InputError, one_line
from support.files import WEIGHT_FILES, read_json, weight_file

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's names; others come from tokenizer_config.json
BERT_TOKENS = {token.strip("[]").lower(): token for token in SPECIAL_TOKENS}  # {"pad": "[PAD]", ...}

# Tensors in checkpoints that are not weights of model.py: a buffer, and the heads of other tasks.
UNUSED = r"bert\.embeddings\.position_ids|cls\.seq_relationship\.|bert\.(classifier|qa_outputs)\."


def load_config(folder: Path) -> BertConfig:
    """Read `folder/config.json`. Raises InputError for anything but a BERT that model.py can compute."""
    path = Path(folder) / "config.json"
    raw = {name: value for name, value in read_json(path).items() if value is not None}
    for key, expected in (("model_type", "bert"), ("position_embedding_type", "absolute"), ("is_decoder", False),
                          ("tie_word_embeddings", True)):
        if raw.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {raw[key]!r}; only {expected!r} is supported")
    values = {}
    for field in dataclasses.fields(BertConfig):
        value = raw.get(field.name, field.default)
        if field.type is int:
            least = 0 if field.default == 0 else 1
            most = 1000 if field.name == "num_hidden_layers" else 10**6  # else a damaged file could hang us
            if field.name == "pad_token_id":  # the last field
                most = values["vocab_size"] - 1
            valid = type(value) is int and least <= value <= most
        elif field.type is float:
            valid = type(value) in (int, float) and 0 <= value < 1
        else:
            valid = value in list(ACTIVATIONS)
        if not valid:
            raise InputError(f"{path}: {field.name} is missing or not valid for a BERT: {raw.get(field.name)!r}")
        values[field.name] = field.type(value)
    if not values["attention_head_size"] and values["hidden_size"] % values["num_attention_heads"]:
        raise InputError(f"{path}: hidden_size is not a multiple of num_attention_heads")
    return BertConfig(**values)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in float32, from the first of WEIGHT_FILES that exists; no code in it is executed.
    Raises InputError."""
    path = weight_file(Path(folder))
    if path is None:
        raise InputError(f"{folder} contains no {' and no '.join(WEIGHT_FILES)}")
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor.float() for name, tensor in tensors.items()}
    except Exception as error:  # anything from SafetensorError to UnicodeDecodeError; torch's would need many lines
        raise InputError(f"{path} is damaged, or contains code or other objects beside tensors, and was not opened "
                         f"({type(error).__name__})") from None


def standard_name(name: str) -> str:
    """The current name of a tensor from any generation of BERT checkpoints."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    name = name.replace("cls.predictions.decoder.bias", "cls.predictions.bias")
    return name if name.startswith(("bert.", "cls.")) else f"bert.{name}"


def load_model(folder: Path) -> Bert:
    """Load a BERT, with pooler and masked-LM head if the checkpoint has them. Raises InputError, which names tensors
    that are missing, unexpected or of the wrong shape."""
    config = load_config(folder)
    tensors = {standard_name(name): tensor for name, tensor in read_tensors(folder).items()}
    if unused := sorted(name for name in tensors if re.match(UNUSED, name)):
        print(f"{folder}: not part of this model and dropped: {', '.join(unused)}")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unused}
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    if decoder is not None and not torch.equal(decoder, tensors.get("bert.embeddings.word_embeddings.weight", decoder)):
        raise InputError(f"{folder}: cls.predictions.decoder.weight differs from the word embeddings; tie it to them")
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"{folder} is damaged: not all numbers are finite in {', '.join(broken[:8])}")
    with torch.device("meta"):  # takes no time: every tensor is assigned below
        model = Bert(config, pooler="bert.pooler.dense.weight" in tensors,
                     head=any(name.startswith("cls.predictions.") for name in tensors))
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder} does not fit its config.json: {one_line(error)}") from None
    return model


def save_model(model: Bert, folder: Path, dtype: torch.dtype = torch.float32, **more):
    """Write config.json and model.safetensors with the standard names into an existing folder. dtype: of the file.
    more: entries of config.json besides or instead of the usual ones."""
    config = model.config
    raw = {"architectures": ["BertModel" if model.cls is None else "BertForMaskedLM"], "model_type": "bert",
           "position_embedding_type": "absolute", **dataclasses.asdict(config), "dtype": "float32", **more}
    if config.inner_size == config.hidden_size:
        del raw["attention_head_size"]
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in `folder`, from tokenizer.json, or WordPiece from vocab.txt. Its attribute `special` maps the
    roles cls, sep, mask, pad and unk to the names of the special tokens. Raises InputError."""
    path, settings = Path(folder) / "tokenizer.json", {}
    for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):  # the last has precedence
        if (Path(folder) / name).is_file():
            settings |= {key: value for key, value in read_json(Path(folder) / name).items() if value is not None}
    if not path.is_file():
        path, kind = Path(folder) / "vocab.txt", settings.get("tokenizer_class", "BertTokenizer")
        if kind not in ("BertTokenizer", "BertTokenizerFast"):
            raise InputError(f"{path} alone does not define a {kind}; a tokenizer.json is needed beside it")
    special = {}
    for role, token in BERT_TOKENS.items():
        token = settings.get(f"{role}_token", token)
        special[role] = str(token.get("content") if isinstance(token, dict) else token)
    try:
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(path))
        else:
            # Not splitlines(), which also splits at U+2028, an entry of some vocabularies
            words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            tokenizer = wordpiece_tokenizer(
                {word: i for i, word in enumerate(words)}, settings.get("do_lower_case", True),
                settings.get("strip_accents"), settings.get("tokenize_chinese_chars", True), special)
        tokenizer.encode("\U0002a6a5")  # an unknown character, for which the vocabulary may lack a token
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise InputError(f"{path} is not a tokenizer: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.special = special
    if missing := [token for token in tokenizer.special.values() if tokenizer.token_to_id(token) is None]:
        raise InputError(f"{path}: {', '.join(missing)} not in the vocabulary; tokenizer_config.json must name the "
                         "special tokens, unless they are BERT's")
    if not tokenizer.num_special_tokens_to_add(is_pair=True):  # then the template of rows and pairs is BERT's
        ends = ((tokenizer.special[role], tokenizer.token_to_id(tokenizer.special[role])) for role in ("sep", "cls"))
        tokenizer.post_processor = processors.BertProcessing(*ends)
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(f"{path}: token id {largest} is outside the model's vocabulary of {vocab_size}; "
                         "tokenizer and weights do not belong together")
    return tokenizer


def wordpiece_tokenizer(vocab: dict[str, int], lowercase=True, strip_accents=None, split_chinese=True,
                        special=BERT_TOKENS) -> Tokenizer:
    """BERT's tokenizer for a vocabulary: clean text, split at spaces and punctuation, longest pieces first."""
    tokenizer = BertWordPieceTokenizer(vocab or None, lowercase=lowercase, strip_accents=strip_accents,
                                       handle_chinese_chars=split_chinese,
                                       **{f"{role}_token": token for role, token in special.items()})
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.special = special
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int):
    """Write tokenizer.json, tokenizer_config.json and, for WordPiece, vocab.txt (if no id is missing) as the
    AutoTokenizer of `transformers` expects them."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    vocab, rules = tokenizer.get_vocab(), tokenizer.normalizer
    # A word's line number is its id, so no id may be missing.
    if isinstance(tokenizer.model, models.WordPiece) and max(vocab.values()) < len(vocab):
        lines = (f"{word}\n" for word in sorted(vocab, key=vocab.get))
        (folder / "vocab.txt").write_text("".join(lines), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
                "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings |= {f"{role}_token": token for role, token in tokenizer.special.items()}
    if isinstance(rules, normalizers.BertNormalizer):  # for those who open it as a BertTokenizer
        settings |= {"do_lower_case": rules.lowercase, "strip_accents": rules.strip_accents,
                     "tokenize_chinese_chars": rules.handle_chinese_chars}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
