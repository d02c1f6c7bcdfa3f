"""Model folders: exchanged with `transformers`, read in every format in use, refused if damaged; and tokenizers."""

import json
import os
import shutil
import time
import unicodedata

import pytest
import torch
import transformers
from conftest import VOCAB
from reference import CLOSE, random_inputs, reference_bert
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from model import Bert, BertConfig
from support.checkpoint import (
    SPECIAL_TOKENS,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
    save_tokenizer,
)

# ---- Exchange with transformers ------------------------------------------------------------------------------


def open_in_transformers(auto, folder):
    """The model that `transformers` loads from the folder, and the names of the tensors that it does not use."""
    bert, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    return bert.eval(), info["unexpected_keys"]


def test_saved_model_loads_in_transformers_and_back_with_the_same_outputs(checkpoint, tmp_path):
    bert = load_model(checkpoint).eval()
    ids, types, mask = random_inputs(bert.config)
    mine = bert(ids, torch.arange(ids.numel()), types, mask)

    theirs, unused = open_in_transformers(transformers.AutoModelForMaskedLM, checkpoint)
    assert all("pooler" in name for name in unused)
    assert type(theirs).__name__ == "BertForMaskedLM"
    logits = theirs(ids, attention_mask=mask, token_type_ids=types).logits
    torch.testing.assert_close(mine.logits, logits.flatten(0, 1), **CLOSE)

    encoder, unused = open_in_transformers(transformers.AutoModel, checkpoint)
    assert all(name.startswith("cls.") for name in unused)
    out = encoder(ids, attention_mask=mask, token_type_ids=types)
    torch.testing.assert_close(mine.hidden[-1], out.last_hidden_state, **CLOSE)
    torch.testing.assert_close(bert.pooled(mine.hidden[-1]), out.pooler_output, **CLOSE)

    theirs.save_pretrained(tmp_path)  # a BertForMaskedLM of transformers has no pooler
    again = load_model(tmp_path).eval()
    assert again.bert.pooler is None
    torch.testing.assert_close(again(ids, torch.arange(ids.numel()), types, mask).logits, mine.logits, **CLOSE)


def test_model_without_head_loads_completely_in_transformers(tmp_path):
    torch.manual_seed(0)
    bert = Bert(BertConfig(90, 24, 2, 3, 40), head=False).eval()
    save_model(bert, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    encoder, unused = open_in_transformers(transformers.AutoModel, tmp_path)
    assert not unused
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(bert(ids).hidden[-1], encoder(ids).last_hidden_state, **CLOSE)
    again = load_model(tmp_path).eval()
    assert again.cls is None and again(ids, torch.tensor([0])).logits is None


def test_model_can_be_saved_over_the_files_it_was_loaded_from(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    bert = load_model(folder)
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.mul_(2)
    save_model(bert, folder)
    after = load_model(folder).state_dict()
    assert all(torch.equal(after[name], 2 * tensor) for name, tensor in before.items())


def test_hidden_size_that_is_no_multiple_of_the_heads_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    bert = Bert(BertConfig(50, 22, 2, 4, 30, attention_head_size=7)).eval()  # between two prunes: D = 22, H*K = 28
    save_model(bert, tmp_path)
    again = load_model(tmp_path).eval()
    assert again.config == bert.config
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(bert(ids, torch.arange(20)).logits, again(ids, torch.arange(20)).logits)


def test_all_loaded_parameters_are_trainable(checkpoint):
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in load_model(checkpoint).parameters())


# ---- Checkpoints of every kind -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained():
    """A BertForPreTraining of transformers, and its tensors."""
    bert = reference_bert(1)
    return bert, {name: tensor.clone().contiguous() for name, tensor in bert.state_dict().items()}


def with_old_names(tensors):
    """The names in the first BERT checkpoints, where LayerNorm has a gamma and a beta."""
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()}


def write_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")


def write_legacy_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_safetensors(folder, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def assert_loads_as(theirs, folder):
    ids, types, mask = random_inputs(theirs.config)
    got = load_model(folder).eval()(ids, torch.arange(ids.numel()), types, mask).logits
    expected = theirs(ids, attention_mask=mask, token_type_ids=types).prediction_logits
    torch.testing.assert_close(got, expected.flatten(0, 1), **CLOSE)


@pytest.mark.parametrize("write", [write_bin, write_legacy_bin, write_safetensors])
@pytest.mark.parametrize("rename", [dict, with_old_names])
def test_all_file_formats_load_with_new_and_old_names(pretrained, tmp_path, write, rename):
    theirs, tensors = pretrained
    theirs.config.save_pretrained(tmp_path)
    write(tmp_path, rename(tensors))
    assert_loads_as(theirs, tmp_path)


def names_of_bert_base_uncased(layers: int) -> list[str]:
    """The names in that checkpoint's pytorch_model.bin, and the buffer of positions of later checkpoints."""
    names = [f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    names += ["bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta", "bert.embeddings.position_ids"]
    for i in range(layers):
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                     "intermediate.dense", "output.dense"):
            names += [f"bert.encoder.layer.{i}.{part}.weight", f"bert.encoder.layer.{i}.{part}.bias"]
        for part in ("attention.output", "output"):
            names += [f"bert.encoder.layer.{i}.{part}.LayerNorm.gamma", f"bert.encoder.layer.{i}.{part}.LayerNorm.beta"]
    names += ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.predictions.bias"]
    names += [f"cls.predictions.transform.{kind}" for kind in
              ("dense.weight", "dense.bias", "LayerNorm.gamma", "LayerNorm.beta")]
    return [*names, "cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.seq_relationship.weight",
            "cls.seq_relationship.bias"]


def test_checkpoint_with_the_names_of_bert_base_uncased_loads(pretrained, tmp_path):
    theirs, tensors = pretrained
    layers, hidden_size = theirs.config.num_hidden_layers, theirs.config.hidden_size
    known = with_old_names(tensors) | {"bert.embeddings.position_ids": torch.arange(40)[None],
                                       "cls.seq_relationship.weight": torch.zeros(2, hidden_size),
                                       "cls.seq_relationship.bias": torch.zeros(2)}
    names = names_of_bert_base_uncased(layers)
    assert len(names) == len(set(names)) == 16 * layers + 17
    theirs.config.save_pretrained(tmp_path)
    write_bin(tmp_path, {name: known[name] for name in names})
    bert = load_model(tmp_path).eval()
    assert not any("seq_relationship" in name or "decoder" in name for name in bert.state_dict())
    ids, *_ = random_inputs(theirs.config)
    out = bert(ids, torch.arange(ids.numel()))
    torch.testing.assert_close(out.logits, theirs(ids).prediction_logits.flatten(0, 1), **CLOSE)
    torch.testing.assert_close(bert.pooled(out.hidden[-1]), theirs.bert(ids).pooler_output, **CLOSE)


@pytest.mark.parametrize("dropped", [".decoder.", "cls.predictions.bias"])
def test_checkpoint_with_only_one_of_the_two_names_of_a_tied_tensor_loads(pretrained, tmp_path, dropped):
    theirs, tensors = pretrained
    theirs.config.save_pretrained(tmp_path)
    write_safetensors(tmp_path, {name: t for name, t in tensors.items() if dropped not in name})
    assert_loads_as(theirs, tmp_path)


@pytest.mark.parametrize("pooler", [True, False])
def test_encoder_without_name_prefix_and_head_loads(pretrained, tmp_path, pooler):
    theirs, tensors = pretrained
    theirs.config.save_pretrained(tmp_path)
    write_safetensors(tmp_path, {name[5:]: t for name, t in tensors.items()
                                 if name.startswith("bert.") and (pooler or "pooler" not in name)})
    bert = load_model(tmp_path).eval()
    assert bert.cls is None and (bert.bert.pooler is not None) == pooler
    ids, *_ = random_inputs(theirs.config)
    torch.testing.assert_close(bert(ids).hidden[-1], theirs.bert(ids).last_hidden_state, **CLOSE)


def test_half_precision_checkpoint_loads_in_float32(pretrained, tmp_path):
    theirs, tensors = pretrained
    theirs.config.save_pretrained(tmp_path)
    write_safetensors(tmp_path, {name: tensor.half() for name, tensor in tensors.items()})
    loaded = load_model(tmp_path).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(tensor, tensors[name].half().float()) for name, tensor in loaded.items())


# ---- Bad weights ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the good checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "folder")


class Payload:
    """Unpickling it creates a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code_is_refused_and_not_run(folder, tmp_path, refused, zipped):
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "it_ran"
    file = folder / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(2), "x": Payload(marker)}, file, _use_new_zipfile_serialization=zipped)
    with refused("pytorch_model.bin", "code", "not opened"):
        load_model(folder)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # so the file was a real threat


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_refused(folder, refused, name, content):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with refused(str(folder)):
        load_model(folder)


@pytest.mark.parametrize("name, write", [("model.safetensors", write_safetensors), ("pytorch_model.bin", write_bin)])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(folder, refused, name, write, fraction):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder, tensors)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(fraction * len(content))])
    with refused(name):
        load_model(folder)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {1: torch.zeros(2)}, {"epoch": 3}, torch.zeros(2), None])
def test_torch_file_without_named_tensors_is_refused(folder, refused, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with refused(str(folder)):
        load_model(folder)


@pytest.mark.parametrize("head", ["classifier", "qa_outputs"])
def test_the_head_of_a_fine_tuned_checkpoint_is_dropped_with_one_line(folder, capsys, head):
    good = load_file(folder / "model.safetensors")
    write_safetensors(folder, good | {f"{head}.weight": torch.zeros(2, 32), f"{head}.bias": torch.zeros(2)})
    bert = load_model(folder)
    assert capsys.readouterr().out == (
        f"{folder}: not part of this model and dropped: bert.{head}.bias, bert.{head}.weight\n")
    assert not [name for name, _ in bert.named_parameters() if head in name]


def test_missing_unexpected_and_misshapen_tensors_are_named(folder, refused):
    good = load_file(folder / "model.safetensors")
    key, query = (f"bert.encoder.layer.1.attention.self.{part}.weight" for part in ("key", "query"))
    transform = "cls.predictions.transform.dense.weight"  # a head of which a part is missing is not "no head"
    for missing in (key, transform):
        write_safetensors(folder, {name: tensor for name, tensor in good.items() if name != missing})
        with refused("Missing", missing):
            load_model(folder)
    for unexpected in ("bert.encoder.layer.2.output.dense.bias", "score.weight"):
        write_safetensors(folder, good | {unexpected: torch.zeros(3)})
        with refused("Unexpected", unexpected):
            load_model(folder)
    write_safetensors(folder, good | {query: torch.zeros(32, 31)})
    with refused(f"size mismatch for {query}", "[32, 31]", "[32, 32]"):
        load_model(folder)


def test_many_problems_are_reported_in_one_short_line(folder, refused):
    write_safetensors(folder, {f"x{i}": torch.zeros(1) for i in range(500)})
    with refused("Missing", "bert.embeddings.word_embeddings.weight") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 1000


def test_weights_that_are_not_finite_are_refused(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.bias"][3] = float("nan")
    write_safetensors(folder, tensors)
    with refused(str(folder), "damaged", "finite", "cls.predictions.bias"):
        load_model(folder)


def test_decoder_that_is_not_tied_is_refused(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    words = tensors["bert.embeddings.word_embeddings.weight"]
    write_safetensors(folder, tensors | {"cls.predictions.decoder.weight": words + 1})
    with refused("cls.predictions.decoder.weight", "differs from the word embeddings"):
        load_model(folder)
    write_safetensors(folder, tensors | {"cls.predictions.decoder.weight": words})
    assert load_model(folder).cls is not None


def test_folder_without_weights_or_config_is_refused(folder, refused):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")  # sharded checkpoints are not supported
    with refused("no model.safetensors and no pytorch_model.bin"):
        load_model(folder)
    (folder / "config.json").unlink()
    with refused("config.json cannot be read", "No such file"):
        load_model(folder)


# ---- Bad config.json -----------------------------------------------------------------------------------------


def change_config(folder, **changes):
    path = folder / "config.json"
    raw = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "absent"}
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("changes", [
    dict(model_type="roberta"), dict(model_type=["bert"]), dict(position_embedding_type="relative_key"),
    dict(is_decoder=True), dict(tie_word_embeddings=False), dict(hidden_act="mish"), dict(hidden_act=["gelu"]),
    dict(hidden_size="absent"), dict(vocab_size="absent"), dict(num_attention_heads=3), dict(num_attention_heads=0),
    dict(hidden_size=0), dict(hidden_size=-32), dict(hidden_size=32.0), dict(hidden_size="32"),
    dict(num_hidden_layers=True), dict(num_hidden_layers=10**6), dict(vocab_size=10**30),
    dict(intermediate_size=10**9), dict(attention_head_size=2**40), dict(max_position_embeddings=0),
    dict(pad_token_id=10**5),
    dict(layer_norm_eps=float("nan")), dict(layer_norm_eps=float("inf")), dict(layer_norm_eps=-1e-5),
    dict(layer_norm_eps="1e-12"), dict(hidden_dropout_prob=1), dict(attention_probs_dropout_prob=True),
    dict(initializer_range=10**400),
], ids=str)
def test_config_of_another_model_is_refused_by_field_without_delay(folder, refused, changes):
    change_config(folder, **changes)
    start = time.monotonic()
    with refused("config.json", next(iter(changes))):
        load_model(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '"bert"', "[" * 100_000, "\xff", '{"hidden_size": ' + "9" * 5000])
def test_config_that_is_not_a_json_object_is_refused(folder, refused, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with refused("config.json"):
        load_model(folder)


@pytest.mark.parametrize("changes, field, value", [
    (dict(layer_norm_eps=0), "layer_norm_eps", 0.0), (dict(hidden_dropout_prob=0), "hidden_dropout_prob", 0.0),
    (dict(pad_token_id=None), "pad_token_id", 0), (dict(layer_norm_eps="absent"), "layer_norm_eps", 1e-12),
    (dict(hidden_act="absent"), "hidden_act", "gelu"), (dict(model_type="absent"), "vocab_size", len(VOCAB)),
    (dict(gradient_checkpointing=False, use_cache=True), "vocab_size", len(VOCAB))], ids=str)
def test_incomplete_config_is_completed_and_still_loads_in_transformers(folder, tmp_path, changes, field, value):
    change_config(folder, **changes)
    bert = load_model(folder)
    loaded = getattr(bert.config, field)
    assert loaded == value and type(loaded) is type(value)
    (tmp_path / "again").mkdir()
    save_model(bert, tmp_path / "again")
    assert load_model(tmp_path / "again").config == bert.config
    open_in_transformers(transformers.AutoModelForMaskedLM, tmp_path / "again")


# ---- Tokenizer -----------------------------------------------------------------------------------------------


TEXTS = ["The King's bridge, in 1984: [MASK]", "Élan, naïve, Ärger, ÇA, ﬁn, ǅ, İstanbul", "中文 and 日本語です 한국어",
         "tab\there\u00a0non-breaking\u2028line\u200bzero", "שלום עולם مرحبا", "x" * 150 + " unaffable!!! ...", "",
         "don't [SEP] stop", "e\u0301 combined", "emoji 🙂🙃 price €5 ½"]


def write_vocabulary(folder, words, **settings):
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_tokenizer_from_vocab_txt_equals_the_original_one_and_is_saved_for_transformers(
        tmp_path, lowercase, strip_accents, chinese):
    words = [*VOCAB, *"éäêaec中日文本İTKBÉ", *(f"##{c}" for c in "éäêlanrge中文日本語k"), "\u2028", "İ", "\x85"]
    rules = dict(do_lower_case=lowercase, strip_accents=strip_accents, tokenize_chinese_chars=chinese)
    folder = write_vocabulary(tmp_path, words, **rules)
    ours = load_tokenizer(folder, len(words))
    original = BertTokenizerLegacy(str(folder / "vocab.txt"), **rules)  # the published code in plain Python
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS):  # the original composes letters first
        assert ours.encode(text, add_special_tokens=False).tokens == original.tokenize(text), text
    save_tokenizer(ours, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).ids


def test_any_wordpiece_tokenizer_is_saved_for_transformers_as_it_is(checkpoint, tmp_path):
    """Rules that differ from BERT's. A BertTokenizer of transformers would not keep them."""
    ours = load_tokenizer(checkpoint, 1000)
    ours.normalizer, ours.pre_tokenizer = normalizers.BertNormalizer(clean_text=False), pre_tokenizers.WhitespaceSplit()
    save_tokenizer(ours, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "the king's old.bridge", "the\u200bking"]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids


def test_vocab_txt_may_have_other_special_tokens(tmp_path):
    special = {role: f"<{role}>" for role in ("cls", "sep", "mask", "pad", "unk")}
    folder = write_vocabulary(tmp_path, [*special.values(), "old"], **{f"{r}_token": t for r, t in special.items()})
    tokenizer = load_tokenizer(folder, 6)
    assert tokenizer.encode("old x").tokens == ["<cls>", "old", "<unk>", "<sep>"] and tokenizer.special == special


def test_a_tokenizer_without_a_token_for_unknown_words_is_refused(tmp_path, refused):
    words = {word: i for i, word in enumerate(["[PAD]", "<unk>", "[CLS]", "[SEP]", "[MASK]", "old"])}
    Tokenizer(models.WordPiece(words, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    with refused("tokenizer.json", "[UNK]"):
        load_tokenizer(tmp_path, 6)


def test_a_vocabulary_with_a_gap_is_saved_without_vocab_txt(tmp_path):
    (tmp_path / "student").mkdir()
    words = [*VOCAB, "a", "a", "zebra"]  # the second "a" hides the first, whose id nothing has
    ours = load_tokenizer(write_vocabulary(tmp_path, words), len(words))
    save_tokenizer(ours, tmp_path / "student", 64)
    assert not (tmp_path / "student" / "vocab.txt").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert theirs("a zebra")["input_ids"] == ours.encode("a zebra").ids
    assert ours.token_to_id("zebra") == len(words) - 1


def test_vocabulary_of_bert_base_is_tokenized_as_in_transformers(shared, tmp_path):
    words = (shared / "data" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    ours = load_tokenizer(write_vocabulary(tmp_path, words), 30522)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert ours.encode("unaffable").tokens == ["[CLS]", "una", "##ffa", "##ble", "[SEP]"]


def test_saved_tokenizer_loads_in_transformers_with_its_settings(checkpoint, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = "The King's bridge, in 1984: [MASK] Élan zebra"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    pair = theirs("old river", "new sea")
    assert pair["token_type_ids"] == tokenizer.encode("old river", "new sea").type_ids
    assert theirs.mask_token_id == tokenizer.token_to_id("[MASK]") and theirs.pad_token == "[PAD]"
    assert theirs.model_max_length == 64 and len(theirs) == tokenizer.get_vocab_size()
    assert load_tokenizer(checkpoint, len(theirs)).to_str() == tokenizer.to_str()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_reported_as_an_error_of_the_system(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(tokenizer, tmp_path, 512)


def test_normalizer_other_than_berts_is_saved_for_transformers(tokenizer, tmp_path):
    mine = Tokenizer.from_str(tokenizer.to_str())
    mine.special = tokenizer.special
    mine.normalizer = normalizers.Sequence([normalizers.Replace("k", "q"), normalizers.Lowercase()])
    save_tokenizer(mine, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the king")["input_ids"] == mine.encode("the king").ids != tokenizer.encode("the king").ids
    assert theirs("old", "sea")["token_type_ids"] == mine.encode("old", "sea").type_ids == [0, 0, 0, 1, 1]


XLMR_TOKENS = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}


@pytest.mark.parametrize("names, kind", [
    ("tokenizer_config.json", "XLMRobertaTokenizer"), ("tokenizer_config.json", "PreTrainedTokenizerFast"),
    ("special_tokens_map.json", "PreTrainedTokenizerFast")])
def test_xlmr_tokenizer_of_a_bert_equals_that_of_transformers_and_is_saved_for_it(
        xlmr_checkpoint, tmp_path, names, kind):
    folder = shutil.copytree(xlmr_checkpoint, tmp_path / "teacher")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / names).write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": kind} | (settings if names == "tokenizer_config.json" else {})))
    ours = load_tokenizer(folder, load_config(folder).vocab_size)
    assert ours.special == XLMR_TOKENS
    student = tmp_path / "student"
    student.mkdir()
    shutil.copy(folder / "config.json", student)
    save_tokenizer(ours, student, 64)
    assert load_tokenizer(student, 1000).special == XLMR_TOKENS and not (student / "vocab.txt").exists()
    original, saved = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, student))
    for texts in (["the king <mask> zebra, 中 old"], ["the river", "a new sea"], [""]):
        assert ours.encode(*texts).ids == original(*texts)["input_ids"] == saved(*texts)["input_ids"]
    assert set(saved("the river", "a new sea")["token_type_ids"]) == {0}
    for role, token in XLMR_TOKENS.items():
        assert getattr(original, f"{role}_token") == getattr(saved, f"{role}_token") == token
        assert getattr(original, f"{role}_token_id") == getattr(saved, f"{role}_token_id")
    assert set(saved.all_special_ids) == set(original.all_special_ids)


def test_tokenizer_without_a_template_for_special_tokens_gets_that_of_bert(tokenizer, tmp_path):
    content = json.loads(tokenizer.to_str()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    pair = load_tokenizer(tmp_path, 1000).encode("old", "sea")
    assert pair.tokens == ["[CLS]", "old", "[SEP]", "sea", "[SEP]"] and pair.type_ids == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_vocab_txt_of_another_tokenizer_is_refused(checkpoint, tmp_path, refused, name):
    folder = write_vocabulary(tmp_path, VOCAB)
    (folder / name).write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with refused("vocab.txt alone", "BertJapaneseTokenizer", "tokenizer.json"):
        load_tokenizer(folder, 1000)
    shutil.copy(checkpoint / "tokenizer.json", folder)
    assert load_tokenizer(folder, 1000).special["cls"] == "[CLS]"
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text(json.dumps({"tokenizer_class": "BertTokenizerFast"}))
    assert load_tokenizer(folder, 1000).special["cls"] == "[CLS]"


def test_vocabulary_entries_that_are_line_separators_keep_the_ids_of_the_others(tmp_path):
    folder = write_vocabulary(tmp_path, [*SPECIAL_TOKENS, "\u2028", "\x85", "\x1c", "after"])
    assert load_tokenizer(folder, 9).token_to_id("after") == 8


def test_truncation_and_padding_of_tokenizer_json_are_disabled(checkpoint, tmp_path):
    limited = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    limited.enable_truncation(4)
    limited.enable_padding(length=9)
    limited.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 1000)
    assert len(tokenizer.encode("the king the king the king the king", add_special_tokens=False)) == 8
    assert len(tokenizer.encode("king", add_special_tokens=False)) == 1


def test_tokenizer_with_ids_outside_the_models_vocabulary_is_refused(checkpoint, refused):
    assert load_tokenizer(checkpoint, len(VOCAB)).get_vocab_size() == len(VOCAB)
    with refused(f"token id {len(VOCAB) - 1} is outside", f"vocabulary of {len(VOCAB) - 1}"):
        load_tokenizer(checkpoint, len(VOCAB) - 1)


def test_vocabulary_without_special_tokens_is_refused(tmp_path, refused):
    with refused("vocab.txt", "[PAD], [MASK] not in the vocabulary"):
        load_tokenizer(write_vocabulary(tmp_path, ["[CLS]", "[UNK]", "[SEP]", "a"]), 10)
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": {"content": 3}, "pad_token": {}}')
    with refused("vocab.txt", "None, 3 not in the vocabulary"):
        load_tokenizer(tmp_path, 10)
    with refused("vocab.txt", "cls_token not found in the vocabulary"):
        load_tokenizer(write_vocabulary(tmp_path, ["[PAD]", "[UNK]", "[SEP]", "a"]), 10)


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", b""), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff"), ("vocab.txt", b"\xff\xfe"),
    ("vocab.txt", b"")])
def test_damaged_tokenizer_is_refused(tmp_path, refused, name, content):
    (tmp_path / name).write_bytes(content)
    with refused(name):
        load_tokenizer(tmp_path, 100)


def test_folder_without_tokenizer_is_refused(tmp_path, refused):
    with refused("vocab.txt", "No such file"):
        load_tokenizer(tmp_path, 100)
