"""The BERT of model.py against transformers, its checkpoints in every form that is in use, and damaged ones."""

import gc
import http.server
import json
import shutil
import socket
import threading
import time
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import model
from model import Bert, BertConfig, Embedding, LayerNorm, Linear

CLOSE = dict(rtol=0, atol=1e-4)

# ------------------------------------------------------------------------------------------ equal to transformers


def random_config(seed: int) -> dict:
    """The settings of a small BERT, in the names of config.json; the width of a head is 3 to 9, never 64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads = draw(1, 5)
    return dict(
        vocab_size=draw(40, 200), hidden_size=heads * draw(3, 9), num_hidden_layers=draw(1, 3),
        num_attention_heads=heads, intermediate_size=draw(10, 70), max_position_embeddings=draw(20, 40),
        type_vocab_size=draw(2, 3), hidden_act=("gelu", "gelu_new", "relu", "silu")[seed % 4],
        layer_norm_eps=(1e-12, 1e-5)[seed % 2])


def reference(seed: int, kind=transformers.BertForPreTraining, **changes):
    """A transformers BERT whose every parameter, biases and LayerNorms too, is far from its initial value."""
    config = transformers.BertConfig(**random_config(seed) | changes, attn_implementation="eager")
    torch.manual_seed(seed)
    bert = kind(config).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return bert


def inputs(config, seed: int = 0):
    """Ids, token types and a padding mask (B,S) with rows of different lengths, one of them full."""
    torch.manual_seed(seed)
    b, s = 3, 17
    ids = torch.randint(config.vocab_size, (b, s))
    types = torch.randint(config.type_vocab_size, (b, s))
    mask = (torch.arange(s) < torch.tensor([[s], [9], [2]])).long()
    return ids, types, mask


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_logits_hidden_states_and_scores_equal_transformers(tmp_path, seed, padding):
    theirs = reference(seed)
    theirs.save_pretrained(tmp_path)
    ours = model.load_model(tmp_path).eval()
    ids, types, mask = inputs(theirs.config, seed)
    mask = mask if padding else None
    queries, keys = [], []
    for layer in theirs.bert.encoder.layer:
        layer.attention.self.query.register_forward_hook(lambda module, args, result: queries.append(result))
        layer.attention.self.key.register_forward_hook(lambda module, args, result: keys.append(result))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True,
                          output_attentions=True)
        positions = torch.randperm(ids.numel())[:11]
        got = ours(ids, positions, types, mask, want_scores=True)
        pooled = theirs.bert.pooler(expected.hidden_states[-1])

    torch.testing.assert_close(got.logits, expected.prediction_logits.flatten(0, 1)[positions], **CLOSE)
    torch.testing.assert_close(got.embedding, expected.hidden_states[0], **CLOSE)
    assert len(got.hidden) == len(got.scores) == theirs.config.num_hidden_layers
    for mine, other in zip(got.hidden, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    torch.testing.assert_close(ours.pooled(got.hidden[-1]), pooled, **CLOSE)

    heads = theirs.config.num_attention_heads
    for mine, q, k, attention in zip(got.scores, queries, keys, expected.attentions, strict=True):
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))  # (B,H,S,K)
        per_head = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B,H,S,S)
        torch.testing.assert_close(mine, per_head.mean(1), **CLOSE)
        if not padding:  # and the scores are those that their softmax saw
            torch.testing.assert_close(per_head.softmax(-1), attention, **CLOSE)


def test_what_was_not_asked_for_is_not_computed(checkpoint):
    bert = model.load_model(checkpoint).eval()
    ids = torch.arange(20).reshape(2, 10)
    out = bert(ids)
    assert out.logits is None and out.scores == []
    assert bert(ids, torch.tensor([3])).logits.shape == (1, bert.config.vocab_size)


def test_token_type_zero_is_the_default(checkpoint):
    bert = model.load_model(checkpoint).eval()
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(bert(ids).hidden[-1], bert(ids, None, torch.zeros_like(ids)).hidden[-1])
    assert not torch.allclose(bert(ids).hidden[-1], bert(ids, None, torch.ones_like(ids)).hidden[-1])


def test_padding_is_not_looked_at(checkpoint):
    bert = model.load_model(checkpoint).eval()
    ids, mask = torch.arange(20).reshape(2, 10), torch.ones(2, 10)
    mask[:, 7:] = 0
    other = ids.clone()
    other[:, 7:] = 60
    torch.testing.assert_close(bert(ids, attention_mask=mask).hidden[-1][:, :7],
                               bert(other, attention_mask=mask).hidden[-1][:, :7])
    assert not torch.allclose(bert(ids).hidden[-1][:, :7], bert(other).hidden[-1][:, :7])


def test_the_tied_decoder_is_counted_once():
    theirs = reference(2, transformers.BertForMaskedLM)
    ours = Bert(BertConfig(**random_config(2)), pooler=False)
    assert ours.parameter_count() == theirs.num_parameters()


def test_fresh_weights_are_drawn_as_berts_are():
    torch.manual_seed(0)
    bert = Bert(BertConfig(500, 64, 1, 4, 256))
    for name, parameter in bert.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 10_000:
            assert abs(parameter.std().item() - 0.02) < 0.001, name
        elif parameter.dim() == 1:
            assert (parameter == name.endswith("LayerNorm.weight")).all(), name


def test_set_dropout_changes_the_model_and_not_its_config(checkpoint):
    bert, ids = model.load_model(checkpoint), torch.arange(20).reshape(2, 10)
    still = bert.eval()(ids).hidden[-1]
    bert.train().set_dropout(0, 0)
    assert torch.equal(bert(ids).hidden[-1], still)
    for dropout in ((0.5, 0.0), (0.0, 0.5)):
        bert.set_dropout(*dropout)
        assert not torch.allclose(bert(ids).hidden[-1], still)
    assert bert.config.hidden_dropout_prob == bert.config.attention_probs_dropout_prob == 0.1


# ----------------------------------------------------------------------------------- out to transformers and back


def opened(auto, folder):
    """The model that transformers makes of the folder, and what it reports as missing or not expected."""
    bert, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    return bert.eval(), info["unexpected_keys"]


def test_a_saved_model_opens_in_transformers_and_here_with_the_same_logits(checkpoint, tmp_path):
    bert = model.load_model(checkpoint).eval()
    ids, types, mask = inputs(bert.config)
    mine = bert(ids, torch.arange(ids.numel()), types, mask)

    theirs, unexpected = opened(transformers.AutoModelForMaskedLM, checkpoint)
    assert all("pooler" in name for name in unexpected)
    assert type(theirs).__name__ == "BertForMaskedLM"
    logits = theirs(ids, attention_mask=mask, token_type_ids=types).logits
    torch.testing.assert_close(mine.logits, logits.flatten(0, 1), **CLOSE)

    encoder, unexpected = opened(transformers.AutoModel, checkpoint)
    assert all(name.startswith("cls.") for name in unexpected)
    out = encoder(ids, attention_mask=mask, token_type_ids=types)
    torch.testing.assert_close(mine.hidden[-1], out.last_hidden_state, **CLOSE)
    torch.testing.assert_close(bert.pooled(mine.hidden[-1]), out.pooler_output, **CLOSE)

    theirs.save_pretrained(tmp_path)  # and what transformers saves of it opens here, without the pooler
    again = model.load_model(tmp_path).eval()
    assert again.bert.pooler is None
    torch.testing.assert_close(again(ids, torch.arange(ids.numel()), types, mask).logits, mine.logits, **CLOSE)


def test_a_model_without_head_opens_in_transformers_with_nothing_missing_or_unexpected(tmp_path):
    torch.manual_seed(0)
    bert = Bert(BertConfig(90, 24, 2, 3, 40), head=False).eval()
    model.save_model(bert, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    encoder, unexpected = opened(transformers.AutoModel, tmp_path)
    assert not unexpected
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(bert(ids).hidden[-1], encoder(ids).last_hidden_state, **CLOSE)
    again = model.load_model(tmp_path).eval()
    assert again.cls is None and again(ids, torch.tensor([0])).logits is None


def test_saving_over_the_files_a_model_came_from(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    bert = model.load_model(folder)
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.mul_(2)
    model.save_model(bert, folder)
    after = model.load_model(folder).state_dict()
    assert all(torch.equal(after[name], 2 * tensor) for name, tensor in before.items())


def test_a_width_that_is_no_multiple_of_the_heads_survives_on_disk(tmp_path):
    torch.manual_seed(0)
    bert = Bert(BertConfig(50, 22, 2, 4, 30, attention_head_size=7)).eval()  # between two cuts: D = 22, H * K = 28
    model.save_model(bert, tmp_path)
    again = model.load_model(tmp_path).eval()
    assert again.config == bert.config
    ids = torch.arange(20).reshape(2, 10)
    assert torch.equal(bert(ids, torch.arange(20)).logits, again(ids, torch.arange(20)).logits)


def test_the_real_teacher_equals_transformers(shared):
    ours = model.load_model(shared / "teacher").eval()
    theirs, _ = opened(transformers.AutoModelForMaskedLM, shared / "teacher")
    ids, _, mask = inputs(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, torch.arange(ids.numel()), None, mask).logits,
                                   theirs.float()(ids, attention_mask=mask).logits.flatten(0, 1), **CLOSE)


# -------------------------------------------------------------------------------------- checkpoints of every kind


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A pre-training BERT of transformers, its folder (config.json alone) and its tensors."""
    folder = tmp_path_factory.mktemp("original")
    bert = reference(1)
    bert.config.save_pretrained(folder)
    return bert, folder, {name: tensor.clone().contiguous() for name, tensor in bert.state_dict().items()}


def old_names(tensors):
    """The names of the first BERTs: LayerNorm has a gamma and a beta."""
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()}


def write_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")


def write_legacy_bin(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_safetensors(folder, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def write_sharded(folder, tensors, stem, suffix, save):
    names = sorted(tensors)
    index = {}
    for i in range(3):
        file = f"{stem}-0000{i + 1}-of-00003.{suffix}"
        save({name: tensors[name].clone() for name in names[i::3]}, folder / file)
        index |= dict.fromkeys(names[i::3], file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_sharded_safetensors(folder, tensors):
    write_sharded(folder, tensors, "model", "safetensors", save_file)


def write_sharded_bin(folder, tensors):
    write_sharded(folder, tensors, "pytorch_model", "bin", torch.save)


@pytest.mark.parametrize("write", [write_bin, write_legacy_bin, write_safetensors, write_sharded_safetensors,
                                   write_sharded_bin])
@pytest.mark.parametrize("rename", [dict, old_names])
def test_every_file_format_in_new_and_old_names(original, tmp_path, write, rename):
    theirs, folder, tensors = original
    shutil.copy(folder / "config.json", tmp_path)
    write(tmp_path, rename(tensors))
    ids, types, mask = inputs(theirs.config)
    got = model.load_model(tmp_path).eval()(ids, torch.arange(ids.numel()), types, mask).logits
    expected = theirs(ids, attention_mask=mask, token_type_ids=types).prediction_logits
    torch.testing.assert_close(got, expected.flatten(0, 1), **CLOSE)


def test_shards_as_transformers_itself_writes_them(tmp_path):
    theirs = reference(1)
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (tmp_path / "model.safetensors").exists()
    ids, *_ = inputs(theirs.config)
    got = model.load_model(tmp_path).eval()(ids, torch.arange(ids.numel())).logits
    torch.testing.assert_close(got, theirs(ids).prediction_logits.flatten(0, 1), **CLOSE)


def names_of_bert_base_uncased(layers: int) -> list[str]:
    """The tensors of that checkpoint's pytorch_model.bin, name by name, and the old buffer of positions."""
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


def test_the_exact_names_of_bert_base_uncased(original, tmp_path):
    theirs, folder, tensors = original
    layers, width = theirs.config.num_hidden_layers, theirs.config.hidden_size
    known = old_names(tensors) | {"bert.embeddings.position_ids": torch.arange(40)[None],
                                  "cls.seq_relationship.weight": torch.zeros(2, width),
                                  "cls.seq_relationship.bias": torch.zeros(2)}
    names = names_of_bert_base_uncased(layers)
    assert len(names) == len(set(names)) == 16 * layers + 17
    shutil.copy(folder / "config.json", tmp_path)
    write_bin(tmp_path, {name: known[name] for name in names})
    bert = model.load_model(tmp_path).eval()
    assert not any("seq_relationship" in name or "decoder" in name for name in bert.state_dict())
    ids, *_ = inputs(theirs.config)
    out = bert(ids, torch.arange(ids.numel()))
    torch.testing.assert_close(out.logits, theirs(ids).prediction_logits.flatten(0, 1), **CLOSE)
    torch.testing.assert_close(bert.pooled(out.hidden[-1]), theirs.bert(ids).pooler_output, **CLOSE)


def test_a_checkpoint_without_explicit_decoder(original, tmp_path):
    theirs, folder, tensors = original
    shutil.copy(folder / "config.json", tmp_path)
    write_safetensors(tmp_path, {name: t for name, t in tensors.items() if ".decoder." not in name})
    ids, *_ = inputs(theirs.config)
    got = model.load_model(tmp_path).eval()(ids, torch.arange(ids.numel())).logits
    torch.testing.assert_close(got, theirs(ids).prediction_logits.flatten(0, 1), **CLOSE)


@pytest.mark.parametrize("pooler", [True, False])
def test_a_sentence_encoder_without_prefix_and_head(original, tmp_path, pooler):
    theirs, folder, tensors = original
    shutil.copy(folder / "config.json", tmp_path)
    write_safetensors(tmp_path, {name[5:]: t for name, t in tensors.items()
                                 if name.startswith("bert.") and (pooler or "pooler" not in name)})
    bert = model.load_model(tmp_path).eval()
    assert bert.cls is None and (bert.bert.pooler is not None) == pooler
    ids, *_ = inputs(theirs.config)
    torch.testing.assert_close(bert(ids).hidden[-1], theirs.bert(ids).last_hidden_state, **CLOSE)


def test_half_precision_files_are_computed_in_single(original, tmp_path):
    theirs, folder, tensors = original
    shutil.copy(folder / "config.json", tmp_path)
    write_safetensors(tmp_path, {name: tensor.half() for name, tensor in tensors.items()})
    loaded = model.load_model(tmp_path).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(torch.equal(tensor, tensors[name].half().float()) for name, tensor in loaded.items())


def test_every_loaded_parameter_can_learn(checkpoint):
    bert = model.load_model(checkpoint)
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in bert.parameters())


# --------------------------------------------------------------------------------------------------- bad weights


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the good checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "folder")


class Payload:
    """Pickles to a call that makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(folder, tmp_path, refused, zipped):
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "it_ran"
    file = folder / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(2), "x": Payload(marker)}, file, _use_new_zipfile_serialization=zipped)
    with refused("pytorch_model.bin", "code", "not opened"):
        model.load_model(folder)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # so the file was a real threat


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights(folder, refused, name, content):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with refused(str(folder)):
        model.load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_weights(folder, refused, name, share):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    {"model.safetensors": write_safetensors, "pytorch_model.bin": write_bin}[name](folder, tensors)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with refused(name):
        model.load_model(folder)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {1: torch.zeros(2)}, {"epoch": 3}, torch.zeros(2), None])
def test_a_torch_file_that_holds_something_else(folder, refused, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with refused(str(folder)):
        model.load_model(folder)


def test_tensors_that_are_missing_unexpected_or_of_the_wrong_shape_are_named(folder, refused):
    good = load_file(folder / "model.safetensors")
    key, query = (f"bert.encoder.layer.1.attention.self.{part}.weight" for part in ("key", "query"))
    write_safetensors(folder, {name: tensor for name, tensor in good.items() if name != key})
    with refused(f"{key} is missing"):
        model.load_model(folder)
    write_safetensors(folder, good | {"bert.encoder.layer.2.output.dense.bias": torch.zeros(3)})
    with refused("bert.encoder.layer.2.output.dense.bias is unexpected"):
        model.load_model(folder)
    write_safetensors(folder, good | {query: torch.zeros(32, 31)})
    with refused(f"{query} has shape (32, 31), not (32, 32)"):
        model.load_model(folder)
    write_safetensors(folder, good | {"classifier.weight": torch.zeros(2, 32)})
    with refused("classifier.weight is unexpected"):
        model.load_model(folder)
    transform = "cls.predictions.transform.dense.weight"  # half a head is not a checkpoint without one
    write_safetensors(folder, {name: tensor for name, tensor in good.items() if name != transform})
    with refused(f"{transform} is missing"):
        model.load_model(folder)


def test_many_problems_are_still_one_short_line(folder, refused):
    write_safetensors(folder, {f"x{i}": torch.zeros(1) for i in range(500)})
    with refused("bert.embeddings.word_embeddings.weight is missing", "more") as caught:
        model.load_model(folder)
    assert len(str(caught.value)) < 2000


def test_a_decoder_of_its_own_is_refused(folder, refused):
    tensors = load_file(folder / "model.safetensors")
    words = tensors["bert.embeddings.word_embeddings.weight"]
    write_safetensors(folder, tensors | {"cls.predictions.decoder.weight": words + 1})
    with refused("cls.predictions.decoder.weight", "not the word embeddings"):
        model.load_model(folder)
    write_safetensors(folder, tensors | {"cls.predictions.decoder.weight": words})
    assert model.load_model(folder).cls is not None


@pytest.mark.parametrize("absolute", [True, False])
def test_an_index_that_points_outside_its_folder(folder, tmp_path, refused, absolute):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    file = str(outside) if absolute else "../outside.safetensors"
    assert (folder / file).is_file()
    index = {"weight_map": dict.fromkeys(load_file(outside), file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("index.json", "outside.safetensors", "not a file in this folder"):
        model.load_model(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', "[",
                                  '{"weight_map": {"a": "none.safetensors"}}', "[]", '{"weight_map": {"a": ".."}}'])
def test_a_damaged_index(folder, refused, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with refused("model.safetensors.index.json"):
        model.load_model(folder)


def test_a_folder_without_weights_or_config(folder, tmp_path, refused):
    (folder / "model.safetensors").unlink()
    with refused("no model.safetensors and no pytorch_model.bin"):
        model.load_model(folder)
    (folder / "config.json").unlink()
    with refused("config.json does not exist"):
        model.load_model(folder)


# ---------------------------------------------------------------------------------------------------- bad configs


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
    dict(layer_norm_eps=float("nan")), dict(layer_norm_eps=float("inf")), dict(layer_norm_eps=-1e-5),
    dict(layer_norm_eps="1e-12"), dict(hidden_dropout_prob=1), dict(attention_probs_dropout_prob=True),
    dict(initializer_range=10**400),
], ids=str)
def test_a_config_that_is_not_a_bert_is_refused_and_the_field_named(folder, refused, changes):
    change_config(folder, **changes)
    start = time.monotonic()
    with refused("config.json", next(iter(changes))):
        model.load_model(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '"bert"', "[" * 100_000, "\xff", '{"hidden_size": ' + "9" * 5000])
def test_a_config_that_is_no_json_object(folder, refused, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with refused("config.json"):
        model.load_model(folder)


@pytest.mark.parametrize("changes, field, value", [
    (dict(layer_norm_eps=0), "layer_norm_eps", 0.0), (dict(hidden_dropout_prob=0), "hidden_dropout_prob", 0.0),
    (dict(pad_token_id=None), "pad_token_id", 0), (dict(layer_norm_eps="absent"), "layer_norm_eps", 1e-12),
    (dict(hidden_act="absent"), "hidden_act", "gelu"), (dict(model_type="absent"), "vocab_size", None),
    (dict(gradient_checkpointing=False, use_cache=True), "vocab_size", None)], ids=str)
def test_a_config_that_leaves_out_or_rounds_something_is_taken(folder, tmp_path, changes, field, value):
    change_config(folder, **changes)
    bert = model.load_model(folder)
    if value is not None:
        loaded = getattr(bert.config, field)
        assert loaded == value and type(loaded) is type(value)
    (tmp_path / "again").mkdir()
    model.save_model(bert, tmp_path / "again")
    assert model.load_model(tmp_path / "again").config == bert.config
    opened(transformers.AutoModelForMaskedLM, tmp_path / "again")


# -------------------------------------------------------------------------------------------------------- the hub


FIND = """
import time
import model
start = time.monotonic()
for name in NAMES:
    try:
        print(model.find_model(name))
    except model.InputError as error:
        print("refused", error)
print(time.monotonic() - start)
"""


def find(python, *names, **options):
    """What find_model says of each name, the seconds that all took, and everything else that was printed."""
    result = python(f"NAMES = {names!r}\n{FIND}", **options)
    assert result.returncode == 0, result.stderr
    *answers, seconds = result.stdout.splitlines()
    return answers, float(seconds), result.stderr


def test_a_hub_out_of_reach_is_said_quickly_in_one_line(python):
    (answer,), seconds, errors = find(python, "some-owner/some-bert")
    assert answer.startswith("refused some-owner/some-bert") and "check the name and the network" in answer
    assert seconds < 10 and errors == ""


def test_a_hub_that_never_answers_is_given_up_within_ten_seconds(python):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts connections, nobody answers
        (answer,), seconds, errors = find(python, "some-bert", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert answer.startswith("refused some-bert") and "check the name and the network" in answer
    assert 1 < seconds < 10 and errors == ""


def test_a_model_in_the_hubs_cache_needs_no_hub(python, hub_snapshot, checkpoint):
    names = ("owner/whole", "owner/words", "owner/torn", "owner/shards")
    whole, words, torn, shards = (
        shutil.copytree(checkpoint, hub_snapshot("model", name), dirs_exist_ok=True) for name in names)
    (words / "tokenizer.json").unlink()  # vocab.txt is enough
    (torn / "tokenizer.json").unlink()
    (torn / "vocab.txt").unlink()
    (shards / "model.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    (shards / "model.safetensors.index.json").write_text("{}")
    answers, _, errors = find(python, *names)
    assert answers[:2] == [str(whole), str(words)] and errors == ""
    assert answers[2].startswith("refused owner/torn") and answers[3].startswith("refused owner/shards")


def test_a_model_on_the_hub_is_downloaded_once_and_only_what_is_needed(python, checkpoint, tmp_path):
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()} | {
        "pytorch_model.bin": b"not asked for", "README.md": b"not asked for"}
    revision = "89abcdef0123456789abcdef0123456789abcdef"
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        """As much of the hub as one model needs."""

        def do_GET(self, body=True):
            path = self.path.split("?")[0]
            name = path.rsplit("/", 1)[1]
            if "/tree/" in path:
                content = json.dumps([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
                                      for name in sorted(files)]).encode()
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in sorted(files)]
                content = json.dumps({"id": "owner/bert", "sha": revision, "siblings": siblings}).encode()
            elif path == f"/owner/bert/resolve/{revision}/{name}" and name in files:
                content = files[name]
                asked.append(name)
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{len(content)}-{name}"')
            self.send_header("X-Repo-Commit", revision)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        (answer,), *_ = find(python, "owner/bert", endpoint=endpoint)
        server.shutdown()
    assert not answer.startswith("refused"), answer
    assert set(asked) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    found = model.Path(answer)
    assert (found / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert model.load_model(found).config.hidden_size == 32
    assert find(python, "owner/bert")[0] == [answer]  # and now without the hub


@pytest.mark.parametrize("name", [
    "no/such/folder", "../nowhere", "a b", "x" * 400, "a..b", "a--b", "x.git", "\0", "ä/ö"])
def test_names_that_are_neither_folder_nor_model(name, refused):
    with refused(name):
        model.find_model(name)


def test_a_file_is_not_a_model(corpus, refused):
    with refused("is a file"):
        model.find_model(str(corpus))


def test_a_local_folder_is_used_as_it_is(checkpoint):
    assert model.find_model(str(checkpoint)) == checkpoint


# ------------------------------------------------------------------------------------------------------- slicing


LAYERS = {
    "linear out": (lambda: Linear(7, 9), "out", 9), "linear in": (lambda: Linear(7, 9), "in", 7),
    "linear without bias": (lambda: Linear(7, 9, bias=False), "out", 9),
    "embedding": (lambda: Embedding(11, 8), "width", 8), "norm": (lambda: LayerNorm(8, 1e-5), "width", 8)}


@pytest.fixture(params=LAYERS)
def layer_axis_width(request):
    make, axis, width = LAYERS[request.param]
    layer = make()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer, axis, width


def use(layer):
    """One forward pass over whatever width the layer has now."""
    if isinstance(layer, Embedding):
        return layer(torch.arange(11))
    return layer(torch.linspace(-1, 2, 3 * layer.weight.shape[-1]).reshape(3, -1))


def test_slicing_keeps_the_right_rows_in_the_given_order(layer_axis_width):
    layer, axis, width = layer_axis_width
    keep = torch.tensor([5, 0, 3])
    use(layer).square().sum().backward()
    before = {name: (parameter.detach(), parameter.grad) for name, parameter in layer.named_parameters()}
    layer.slice_(axis, keep)
    for name, old in before.items():
        dimension = layer.axes[axis].get(name)
        new = getattr(layer, name)
        if dimension is not None:
            assert old[0].shape[dimension] == width
            old = [torch.stack([t.select(dimension, i) for i in keep.tolist()], dimension) for t in old]
        assert isinstance(new, torch.nn.Parameter) and new.requires_grad
        assert torch.equal(new, old[0]) and torch.equal(new.grad, old[1])


def test_slicing_frees_the_memory(layer_axis_width):
    layer, axis, _ = layer_axis_width
    use(layer).square().sum().backward()
    old = [weakref.ref(getattr(layer, name)) for name in layer.axes[axis] if getattr(layer, name) is not None]
    layer.slice_(axis, torch.tensor([5, 0, 3]))
    gc.collect()
    assert all(reference() is None for reference in old)
    for parameter in layer.parameters():
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()


def test_slicing_works_while_the_graph_of_an_old_loss_is_alive(layer_axis_width):
    layer, axis, _ = layer_axis_width
    old_loss = use(layer).square().sum()
    layer.slice_(axis, torch.tensor([5, 0, 3]))
    use(layer).square().sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())
    assert old_loss.requires_grad
    old_loss.backward()  # the graph of the old widths is whole, too


def test_a_frozen_parameter_stays_frozen(layer_axis_width):
    layer, axis, _ = layer_axis_width
    layer.requires_grad_(False)
    layer.slice_(axis, torch.tensor([1, 2]))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_sliced_model_equals_one_whose_neurons_are_zero(checkpoint):
    bert = model.load_model(checkpoint).eval()
    ids = torch.arange(20).reshape(2, 10)
    keep = torch.arange(0, 64, 3)
    gone = torch.ones(64, dtype=torch.bool)
    gone[keep] = False
    with torch.no_grad():
        for layer in bert.bert.layers:
            layer.output.dense.weight[:, gone] = 0
    expected = bert(ids, torch.arange(20)).logits
    for layer in bert.bert.layers:
        layer.intermediate["dense"].slice_("out", keep)
        layer.output.dense.slice_("in", keep)
    torch.testing.assert_close(bert(ids, torch.arange(20)).logits, expected)


# ----------------------------------------------------------------------------------------------------- tokenizer


def test_the_saved_tokenizer_opens_in_transformers(checkpoint, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = "The King's bridge, in 1984: [MASK] Élan zebra"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    pair = theirs("old river", "new sea")
    assert pair["token_type_ids"] == tokenizer.encode("old river", "new sea").type_ids
    assert theirs.mask_token_id == tokenizer.token_to_id("[MASK]") and theirs.pad_token == "[PAD]"
    assert theirs.model_max_length == 64 and len(theirs) == tokenizer.get_vocab_size()
    assert data.load_tokenizer(checkpoint, len(theirs)).to_str() == tokenizer.to_str()
