"""Models and data sets from the hub: what is in the hub's cache, and names that cannot be used.

tests/reliability/test_hub_reliability.py tries hubs that are unreachable, silent, or really answer.
"""

import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
from test_data import write_corpus

from support import corpus as corpora
from support.corpus import corpus_files, hub_texts, tokenise
from support.hub import find_model, hub_files


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """Use the cache of the fixture hub_snapshot. The hub itself is switched off in conftest.py."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_home" / "hub"))


# ---- Models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [[], ["tokenizer.json"], ["vocab.txt"]])
def test_model_in_the_cache_is_found_without_the_hub(hub_snapshot, checkpoint, removed):
    snapshot = shutil.copytree(checkpoint, hub_snapshot("model", "owner/bert"), dirs_exist_ok=True)
    for name in removed:  # one of the two tokenizer files is enough
        (snapshot / name).unlink()
    assert find_model("owner/bert") == snapshot


def test_the_needed_files_of_a_sentence_encoder_include_its_modules_and_its_card(monkeypatch, tmp_path):
    needed = ["model.safetensors", "vocab.txt", "config.json", "1_Pooling/config.json", "2_Dense/config.json",
              "2_Dense/model.safetensors", "tokenizer_config.json", "modules.json", "sentence_bert_config.json",
              "config_sentence_transformers.json", "README.md"]
    others = ["pytorch_model.bin", "onnx/model.onnx", "1_Pooling/train.py", "data.json", "openvino/config.json"]
    asked = []
    monkeypatch.setattr("support.hub.hub_files", lambda name, kind, wanted: (
        asked.extend(wanted([*needed, *others])), (tmp_path, []))[1])
    assert find_model("owner/encoder") == tmp_path
    assert sorted(asked) == sorted(needed)


@pytest.mark.parametrize("removed", [["config.json"], ["model.safetensors"], ["tokenizer.json", "vocab.txt"]])
def test_model_that_is_incomplete_in_the_cache_is_refused_without_the_hub(hub_snapshot, checkpoint, refused, removed):
    snapshot = shutil.copytree(checkpoint, hub_snapshot("model", "owner/bert"), dirs_exist_ok=True)
    for name in removed:
        (snapshot / name).unlink()
    with refused("owner/bert", "check the name and the network"):
        find_model("owner/bert")


def test_sharded_model_is_refused(hub_snapshot, checkpoint, refused):
    snapshot = shutil.copytree(checkpoint, hub_snapshot("model", "owner/shards"), dirs_exist_ok=True)
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00001.safetensors")
    (snapshot / "model.safetensors.index.json").write_text("{}")
    with refused("owner/shards"):
        find_model("owner/shards")


@pytest.mark.parametrize("name", [
    "no/such/folder", "../nowhere", "a b", "x" * 400, "a..b", "a--b", "x.git", "\0", "ä/ö"])
def test_name_of_neither_a_folder_nor_a_model_is_refused(name, refused):
    with refused(name):
        find_model(name)


def test_file_in_place_of_a_model_folder_is_refused(corpus, refused):
    with refused(str(corpus), "no such folder"):
        find_model(str(corpus))


def test_local_folder_is_used_as_it_is(checkpoint):
    assert find_model(str(checkpoint)) == checkpoint


# ---- Data sets -----------------------------------------------------------------------------------------------


def test_complete_configuration_of_a_data_set_in_the_cache_is_found_without_the_hub(hub_snapshot, documents, refused):
    snapshot = hub_snapshot("dataset", "owner/texts")
    for part, count in (("small", 1), ("small-raw", 2), ("half", 2)):
        (snapshot / part).mkdir()
        for i in range(count):
            write_corpus(snapshot / part / f"train-0000{i}-of-0000{count}.parquet", documents[i::count])
        write_corpus(snapshot / part / "test-00000-of-00001.parquet", ["never"])
    (snapshot / "half" / "train-00001-of-00002.parquet").unlink()  # was not downloaded
    def cached(corpus):
        return [file.download() for file in corpus_files([corpus])]

    assert cached("hub:owner/texts:small") == [snapshot / "small" / "train-00000-of-00001.parquet"]
    assert cached("hub:owner/texts:small-raw") == [
        snapshot / "small-raw" / f"train-0000{i}-of-00002.parquet" for i in range(2)]
    for corpus in ("hub:owner/texts:half", "hub:owner/texts", "hub:owner/others", "hub:"):
        with refused("hub"):
            corpus_files([corpus])


def test_completeness_is_checked_for_every_split_separately(hub_snapshot, refused):
    snapshot = hub_snapshot("dataset", "owner/task")
    for name in ("a/train-00000-of-00001", "a/validation-00000-of-00001", "b/test-00000-of-00002"):
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / f"{name}.parquet").write_bytes(b"rows")

    def files_in(folder):
        return hub_files("owner/task", "dataset", lambda names: [n for n in names if n.startswith(folder)])[1]

    assert len(files_in("a/")) == 2
    with refused("owner/task"):
        files_in("b/")


def test_configuration_of_a_data_set_is_chosen_by_its_exact_name(refused):
    names = ["README.md", "en/train-0.parquet", "en/test-0.parquet", "en-old/train-0.parquet", "en/train.csv"]
    assert hub_texts("hub:x", "en", names) == ["en/train-0.parquet"]
    for config in ("fr", ""):
        with refused("hub:x", f"{config!r}", "en", "en-old"):
            hub_texts("hub:x", config, names)
    with refused("hub:x", "none"):
        hub_texts("hub:x", "", ["x.csv"])
    with refused("hub:x", "'en'"):  # which has no training text
        hub_texts("hub:x", "en", names[2:3])


def test_only_configuration_of_a_data_set_needs_no_name():
    assert hub_texts("hub:x", "", ["data/train-1.parquet", "data/train-0.parquet"]) == [
        "data/train-0.parquet", "data/train-1.parquet"]
    assert hub_texts("hub:x", "", ["train.parquet", "dataset_infos.json"]) == ["train.parquet"]
    assert hub_texts("hub:x", "", ["README.md", "texts/b.txt", "texts/a.txt.gz"]) == ["texts/a.txt.gz", "texts/b.txt"]


def test_names_of_the_large_web_corpora_are_understood():
    fineweb = ["README.md", *(f"sample/{size}/00{i}_00000.parquet" for size in ("10BT", "100BT") for i in range(2)),
               "data/CC-MAIN-2024-10/train-00000-of-00014.parquet"]
    assert hub_texts("hub:x", "sample-10BT", fineweb) == fineweb[1:3] == hub_texts("hub:x", "sample/10BT", fineweb)
    assert hub_texts("hub:x", "data/CC-MAIN-2024-10", fineweb) == fineweb[5:]
    c4 = [f"{folder}/c4-{split}.0000{i}-of-01024.json.gz" for folder in ("en", "en.noblocklist")
          for split in ("train", "validation") for i in range(2)]
    assert hub_texts("hub:x", "en", c4) == c4[:2]


def test_only_the_needed_files_of_a_data_set_are_downloaded(hub_snapshot, documents, tokenizer, tmp_path, monkeypatch,
                                                            refused):
    snapshot = hub_snapshot("dataset", "owner/texts")
    names = [f"sample/10BT/00{i}.jsonl" for i in range(3)]
    trees = snapshot.parents[1] / "trees"  # where the library keeps the names of all files
    trees.mkdir()
    (trees / f"{snapshot.name}.json").write_text(json.dumps(
        {"format_version": 1, "files": {name: {"size": 1, "blob_id": ""} for name in ["README.md", *names]}}))
    (snapshot / "sample" / "10BT").mkdir(parents=True)
    write_corpus(snapshot / names[0], documents[:60])  # the others have not been downloaded
    assert [file.name for file in corpus_files(["hub:owner/texts:sample-10BT"])] == names
    monkeypatch.setattr(corpora, "TOKENISE_AT_ONCE", 1000)

    def tokens(limit):
        return tokenise(["hub:owner/texts:sample-10BT"], tokenizer, tmp_path / "cache", limit=limit)

    few, more = tokens(100), tokens(1000)
    assert 100 <= len(few.train) < 600 < 1000 <= len(more.train) < 1500 and few.key != more.key
    with refused("did not deliver sample/10BT/001.jsonl", "rerun the same command"):
        tokens(10**6)
    write_corpus(snapshot / names[1], documents[60:])
    write_corpus(snapshot / names[2], documents)
    written = next((tmp_path / "cache").glob("*.unfinished"))
    assert json.loads((written / "meta.json").read_text())["train"] > 1000  # is not tokenised again
    assert len(tokens(10**6).train) > 2 * len(more.train)
    shutil.rmtree(snapshot / "sample")
    assert np.array_equal(tokens(100).train, few.train)  # from the cache of tokens
