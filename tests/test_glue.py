"""Reading GLUE from TSV files and from the hub (support/glue.py)."""

import pytest
from conftest import WORDS
from made_up_tasks import LABELS, ORIGINAL, STSB, write_glue, write_squad

from support import glue
from support.batches import Example
from support.glue import TASKS, find_data, read_task, read_tsv, split_names

RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
RTE_ROW = "0\ta\tb\tentailment\n"


@pytest.mark.parametrize("key", ORIGINAL)
def test_every_task_is_read_in_its_original_format(key, tmp_path):
    splits = read_task(key, write_glue(key, tmp_path / "task"))
    assert set(splits) == set(split_names(key))
    expected = [1.25, 4.5] if key == "stsb" else list(range(len(LABELS[key])))
    train = splits["train"]
    assert [example.label for example in train[: len(expected)]] == expected and len(train) == 24
    assert train[1].texts[0].startswith(f"{WORDS[1]} {WORDS[1]} ") and len(train[1].texts) == len(TASKS[key].columns)
    for split in splits:
        if split.startswith("test"):
            assert [example.name for example in splits[split]] == list("01234")


def test_classes_are_numbered_as_on_the_hub():
    assert {key: list(task.labels) for key, task in TASKS.items() if task.kind == "classification"} == LABELS


def test_quotes_and_unusual_line_separators_are_plain_text(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes('sentence\tlabel\r\n"he said\t1\r\nso " it\x85is\u2028here ""\t0\r\n\t1'.encode())
    assert [example[:2] for example in read_tsv(path, "sst2", labelled=True)] == [
        (('"he said',), 1), (('so " it\x85is\u2028here ""',), 0), (("",), 1)]


def test_cola_has_no_header_and_mrpc_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("gj04\t1\t\tFirst line.\nks08\t0\t*\tLine second the.\n")
    assert [example[:2] for example in read_tsv(path, "cola", labelled=True)] == [
        (("First line.",), 1), (("Line second the.",), 0)]
    for mark in ("", "\ufeff"):
        path.write_text(f"{mark}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\ta \"b\tc\n", encoding="utf-8")
        assert read_tsv(path, "mrpc", labelled=True) == [Example(('a "b', "c"), 1, "1")]


def test_torn_rows_of_qqp_are_dropped_and_counted(tmp_path, capsys):
    path = tmp_path / "train.tsv"
    header = ORIGINAL["qqp"][0]
    path.write_text(f"{header}\n1\t2\t3\t\"is this\nover\t4\n5\t6\t7\ta\tb\t1\n")
    assert read_tsv(path, "qqp", labelled=True) == [Example(("a", "b"), 1, "5")]
    assert "dropped 2 rows with missing fields" in capsys.readouterr().out


def write_parquet(key: str, root) -> list[str]:
    """Parquet files with the names and columns of the hub. Returns all file names of the repository."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {}
    if TASKS[key].kind == "span":
        for split in ("train", "validation"):
            answers = [{"text": ["x"], "answer_start": [4]}] * 2
            answers += [{"text": [], "answer_start": []}] * (key == "squad_v2")
            n = len(answers)
            tables[f"{'plain_text' if key == 'squad' else key}/{split}-00000-of-00001.parquet"] = {
                "id": [f"q{i}" for i in range(n)], "title": ["t"] * n, "context": ["the x of"] * n,
                "question": ["is it"] * n, "answers": answers}
    else:
        names = {"mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}.get(key, TASKS[key].columns)
        for split in split_names(key):
            labels = [-1, -1] if split.startswith("test") else [1, 0]
            tables[f"{key}/{split.replace('dev', 'validation')}-00000-of-00001.parquet"] = {
                **{name: [f"{name} 0", f"{name} 1"] for name in names}, "label": labels, "idx": [10, 11]}
        tables[f"{key}_other/train-00000-of-00001.parquet"] = {"x": [0]}
    for name, columns in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / name)
    return ["README.md", *tables]


@pytest.mark.parametrize("key", TASKS)
def test_every_task_is_read_from_the_hub(key, tmp_path, monkeypatch, refused):
    names = write_parquet(key, tmp_path)
    requested = []

    def hub_files(name, kind, wanted):
        requested.append((name, kind))
        return tmp_path, wanted(names)

    monkeypatch.setattr(glue, "hub_files", hub_files)
    splits = read_task(key, None)
    assert set(splits) == set(split_names(key))
    if TASKS[key].kind == "span":
        assert requested == [(f"rajpurkar/{key}", "dataset")]
        assert splits["dev"][0] == Example(("is it", "the x of"), [("x", 4)], "q0")
        assert [len(question.label) for question in splits["dev"]] == ([1, 1, 0] if key == "squad_v2" else [1, 1])
    else:
        assert requested == [("nyu-mll/glue", "dataset")]
        assert [(example.label, example.name) for example in splits["train"]] == [(1, "10"), (0, "11")]
        assert all(value.endswith(" 1") for value in splits["train"][1].texts)
        assert len(splits["train"][1].texts) == len(TASKS[key].columns)
    del names[2:]  # the repository lacks a split
    with refused("no parquet file"):
        read_task(key, None)


def test_parquet_with_other_columns_is_an_error(tmp_path, monkeypatch, refused):
    write_parquet("squad", tmp_path)
    names = [f"cola/{path.name}" for path in (tmp_path / "plain_text").iterdir()]
    names += [name.replace("train", "test") for name in names if "train" in name]
    (tmp_path / "plain_text").rename(tmp_path / "cola")
    monkeypatch.setattr(glue, "hub_files", lambda name, kind, wanted: (tmp_path, wanted(names)))
    with refused("train of CoLA", "label"):
        read_task("cola", None)


def test_real_data_has_the_published_sizes(shared):
    sizes = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "rte": (2490, 277), "stsb": (5749, 1500)}
    for key, folder in find_data(str(shared / "data"), list(sizes), skip_missing=False).items():
        splits = read_task(key, folder)
        assert (len(splits["train"]), len(splits["dev"])) == sizes[key]


def test_folders_are_found_by_the_title_of_the_task(tmp_path, capsys, refused):
    rte, squad = write_glue("rte", tmp_path / "glue" / "RTE"), write_squad(tmp_path / "SQuAD")
    assert find_data(str(tmp_path), ["rte", "squad"], skip_missing=False) == {"rte": rte, "squad": squad}
    assert find_data(str(rte), ["rte"], skip_missing=False) == {"rte": rte}
    assert find_data(None, ["rte"], skip_missing=False) == {"rte": None}  # the hub
    assert find_data(str(tmp_path), ["rte", "cola"], skip_missing=True) == {"rte": rte}
    assert "Skipping cola: " in capsys.readouterr().out
    with refused("holds no CoLA/train.tsv"):
        find_data(str(tmp_path), ["rte", "cola"], skip_missing=False)
    with refused("none of the tasks"):
        find_data(str(tmp_path), ["qqp", "cola"], skip_missing=True)
    with refused("--data", "missing holds no RTE/train.tsv"):
        find_data(str(tmp_path / "missing"), ["rte"], skip_missing=False)


@pytest.mark.parametrize("key, file, content, words", [
    ("rte", "dev.tsv", None, ["holds no dev.tsv"]),
    ("rte", "train.tsv", None, ["holds no train.tsv"]),
    ("rte", "train.tsv", "", ["train.tsv, line 1", "no column"]),
    ("rte", "train.tsv", RTE_HEADER, ["no rows"]),
    ("rte", "dev.tsv", RTE_HEADER + RTE_ROW + "1\ta\tentailment\n", ["dev.tsv, line 3", "3 columns instead of 4"]),
    ("rte", "dev.tsv", RTE_HEADER + "1\ta\tb\tc\tentailment\n", ["line 2", "5 columns instead of 4"]),
    ("rte", "dev.tsv", RTE_HEADER + RTE_ROW + "\n" + RTE_ROW, ["line 3", "1 columns"]),
    ("rte", "dev.tsv", RTE_HEADER + "0\ta\tb\tmaybe\n", ["line 2", "'maybe'", "entailment or not_entailment"]),
    ("rte", "dev.tsv", RTE_HEADER + "0\ta\tb\t0\n", ["line 2", "'0'"]),
    ("rte", "test.tsv", "index\tsentence1\n0\ta\n", ["test.tsv", "sentence2"]),
    ("rte", "dev.tsv", (RTE_HEADER + RTE_ROW).encode() + b"0\t\xff\tb\tentailment\n", ["line 3", "utf-8"]),
    ("wnli", "train.tsv", RTE_HEADER + RTE_ROW, ["'entailment'", "WNLI"]),
    ("cola", "train.tsv", RTE_HEADER + RTE_ROW, ["line 1", "'sentence1'", "CoLA"]),
    ("cola", "train.tsv", "sentence\tlabel\n", ["line 1", "2 columns instead of 4"]),
    ("sst2", "train.tsv", RTE_HEADER + RTE_ROW, ["'sentence'", "SST-2"]),
    ("stsb", "train.tsv", f"{STSB}\tscore\n" + "x\t" * 9 + "5.5\n", ["line 2", "'5.5'", "0 to 5"]),
    ("stsb", "train.tsv", f"{STSB}\tscore\n" + "x\t" * 9 + "nan\n", ["'nan'"]),
    ("qqp", "train.tsv", ORIGINAL["qqp"][0] + "\n1\t2\n", ["no rows"]),
    ("mnli", "dev_mismatched.tsv", None, ["dev_mismatched"]),
])
def test_bad_files_are_named_with_their_line(key, file, content, words, tmp_path, refused):
    folder = write_glue(key, tmp_path / "task")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(*words):
        read_task(key, folder)
