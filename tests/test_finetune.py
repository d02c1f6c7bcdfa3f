"""The tasks, batches, heads, metrics and files of finetune.py, against transformers, scikit-learn and scipy."""

import collections
import dataclasses
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import transformers
from conftest import ROOT, WORDS
from safetensors.torch import load_file

import data
import finetune
import model
from finetune import TASKS, Question, Rows, Table

CPU = torch.device("cpu")
ANSWERS = WORDS[-3:]  # what the made-up questions are about; the rest of the text does without these words
CLOSE = dict(rtol=0, atol=1e-5)
# Every task in its original form: header, row, labels in the order of their numbers, header and row of the test split.
MNLI = ("index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1")
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
ORIGINAL = {
    "cola": ("", "gj04\t{label}\t*\t{a}", ["0", "1"], "index\tsentence", "{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{label}", ["0", "1"], "index\tsentence", "{a}"),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1\t2\t{a}\t{b}", ["0", "1"],
             "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t2\t{a}\t{b}"),
    "stsb": (f"{STSB}\tscore", "0\tg\tf\t2012\t0\tn\tn\t{a}\t{b}\t{label}", ["1.250", "4.5"], STSB,
             "g\tf\t2012\t0\tn\tn\t{a}\t{b}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t1\t2\t{a}\t{b}\t{label}", ["0", "1"],
            "id\tquestion1\tquestion2", "{a}\t{b}"),
    "mnli": (f"{MNLI}\tgold_label", "0\t1\t2\tg\tp\tp\tp\tp\t{a}\t{b}\tneutral\t{label}",
             ["entailment", "neutral", "contradiction"], MNLI.removesuffix("\tlabel1"),
             "1\t2\tg\tp\tp\tp\tp\t{a}\t{b}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}", ["entailment", "not_entailment"],
             "index\tquestion\tsentence", "{a}\t{b}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}", ["entailment", "not_entailment"],
            "index\tsentence1\tsentence2", "{a}\t{b}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}", ["0", "1"],
             "index\tsentence1\tsentence2", "{a}\t{b}"),
}
# The order of nyu-mll/glue, written out once more.
LABELS = {
    "cola": ["unacceptable", "acceptable"], "sst2": ["negative", "positive"], "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"], "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"], "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}


def text(generator: random.Random, low=3, high=9) -> str:
    return " ".join(generator.choices(WORDS[:-3], k=generator.randint(low, high)))


def write_glue(key: str, folder: Path, train=24, dev=10, test=True) -> Path:
    """A task in its original form. The label can be told from the first word, so there is something to learn."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    header, row, labels, test_header, test_row = ORIGINAL[key]
    for split in finetune.split_names(key):
        lines = [test_header if split.startswith("test") else header] if header or split.startswith("test") else []
        for i in range({"tr": train, "de": dev, "te": 5}[split[:2]]):
            label = i % len(labels)
            a = f"{WORDS[label]} {WORDS[label]} {text(generator)}"
            values = dict(a=a, b=text(generator), label=labels[label])
            lines.append(f"{i}\t{test_row.format(**values)}" if split.startswith("test") else row.format(**values))
        if test or not split.startswith("test"):
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_squad(folder: Path, version="v1.1", paragraphs=6) -> Path:
    """Questions whose answer is the one word of ANSWERS in the paragraph; in 2.0 every second paragraph has none."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    for split in ("train", "dev"):
        made = []
        for i in range(paragraphs):
            answer, without = generator.choice(ANSWERS), version == "v2.0" and i % 2 == 1
            before = text(generator) + " "
            context = before + ("" if without else answer + " ") + text(generator)
            answers = [] if without else [{"text": answer, "answer_start": len(before)}]
            question = {"id": f"{split}{i}", "question": text(generator), "answers": answers, "is_impossible": without}
            made.append({"context": context, "qas": [question]})
        root = {"version": version, "data": [{"title": "t", "paragraphs": made}]}
        (folder / f"{split}-{version}.json").write_text(json.dumps(root))
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these lose more by sharing the work than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rte(tmp_path_factory) -> Path:
    return write_glue("rte", tmp_path_factory.mktemp("data") / "RTE")


@pytest.fixture
def start(checkpoint, rte, tmp_path):
    """Runs finetune.main with a small model and task, into tmp_path/out, unless the flags say otherwise."""

    def run(*flags, task="rte", source=rte, models=(checkpoint,)) -> int:
        argv = ["--model", *map(str, models), "--task", *task.split(), "--data", str(source), "--device", "cpu",
                "--output", str(tmp_path / "out")]
        return finetune.main(argv + list(map(str, flags)))

    return run


def results(tmp_path) -> list[dict]:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def settings(**changes) -> finetune.Settings:
    span = {"stride": 128, "n_best": 20, "max_answer_length": 30, "null_threshold": None}
    return finetune.Settings(**dict(data="d", weights="w", learning_rate=1e-3, batch_size=8, epochs=1, max_steps=None,
                                    max_length=32, warmup=0.1, weight_decay=0.01, dropout=None, bf16=False, span=span)
                             | changes)


# --------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn_and_scipy(seed):
    generator = np.random.default_rng(seed)
    predicted, true = generator.integers(0, 2, (2, 50))
    assert finetune.accuracy(predicted, true) == pytest.approx(sklearn.metrics.accuracy_score(true, predicted))
    assert finetune.f1(predicted, true) == pytest.approx(sklearn.metrics.f1_score(true, predicted))
    assert finetune.matthews(predicted, true) == pytest.approx(sklearn.metrics.matthews_corrcoef(true, predicted))
    scores = generator.normal(size=50).astype(np.float32)
    ties = generator.integers(0, 4, 50).astype(np.float32)  # equal values share a rank
    assert finetune.pearson(scores, ties) == pytest.approx(scipy.stats.pearsonr(scores, ties)[0], abs=1e-6)
    assert finetune.spearman(scores, ties) == pytest.approx(scipy.stats.spearmanr(scores, ties)[0], abs=1e-6)


def test_metrics_of_constant_predictions_are_zero_not_nan():
    true, zeros = np.array([0, 1, 1]), np.zeros(3)
    for name in ("f1", "matthews", "pearson", "spearman"):
        assert finetune.METRICS[name](zeros, true) == 0
    assert finetune.f1(zeros, zeros) == 0  # scikit-learn's value, with a warning
    assert finetune.pearson(np.full(3, 0.1), true) == 0  # whose mean, rounded, is not 0.1


@pytest.mark.parametrize("predicted, answers, exact, f1", [
    ("The Cat!", ["cat"], 1, 1),  # article, punctuation, case
    ("an apple a day", ["apple day"], 1, 1),
    ("theatre", ["atre"], 0, 0),  # an article inside a word stays
    ("", [], 1, 1),  # no answer, and none given
    ("", ["cat"], 0, 0),
    ("cat", [], 0, 0),
    ("", ["the", "..."], 1, 1),  # nothing is left of the answers
    ("", ["the", "cat"], 0, 0),  # an answer of which nothing is left does not count beside one of which something is
    ("red cat", ["blue dog", "big red cat"], 0, 0.8),  # the best of several
    ("cat cat", ["cat"], 0, 2 / 3),  # words are counted, not only found
    ("Zürich", ["zürich"], 1, 1),
    ("Zurich", ["Zürich"], 0, 0),  # accents count
    ("“cat”", ["cat"], 0, 0),  # only ASCII punctuation goes
    ("U.S.", ["us"], 1, 1),
    ("well-known", ["wellknown"], 1, 1),
    ("  a   b ", ["b"], 1, 1),
])
def test_squad_scores_on_corner_cases(predicted, answers, exact, f1):
    assert finetune.squad_scores(predicted, answers) == (exact, pytest.approx(f1))


# --------------------------------------------------------------------------------------------------- reading tasks


@pytest.mark.parametrize("key", ORIGINAL)
def test_every_task_is_read_in_its_original_form(key, tmp_path):
    splits = finetune.read_task(key, write_glue(key, tmp_path / "task"))
    assert set(splits) == set(finetune.split_names(key))
    wanted = [1.25, 4.5] if key == "stsb" else list(range(len(LABELS[key])))
    train = splits["train"]
    assert train.labels[: len(wanted)] == wanted and len(train.texts) == 24
    assert train.texts[1][0].startswith(f"{WORDS[1]} {WORDS[1]} ") and len(train.texts[1]) == len(TASKS[key].columns)
    for split in splits:
        if split.startswith("test"):
            assert splits[split].labels is None and splits[split].index == list("01234")


def test_label_order_is_that_of_the_hub():
    assert {key: list(task.labels) for key, task in TASKS.items() if task.kind == "classification"} == LABELS


def test_quotes_separators_and_line_ends_stay_text(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes('sentence\tlabel\r\n"he said\t1\r\nso " it\x85is\u2028here ""\t0\r\n\t1'.encode())
    table = finetune.read_tsv(path, "sst2", True)
    assert table.texts == [('"he said',), ('so " it\x85is\u2028here ""',), ("",)] and table.labels == [1, 0, 1]


def test_cola_has_no_header_and_mrpc_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("gj04\t1\t\tFirst line.\nks08\t0\t*\tLine second the.\n")
    table = finetune.read_tsv(path, "cola", True)
    assert table.texts == [("First line.",), ("Line second the.",)] and table.labels == [1, 0]
    for mark in ("", "\ufeff"):
        path.write_text(f"{mark}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\ta \"b\tc\n", encoding="utf-8")
        assert finetune.read_tsv(path, "mrpc", True).texts == [('a "b', "c")]


def test_torn_rows_of_qqp_are_left_out_and_counted(tmp_path, capsys):
    path = tmp_path / "train.tsv"
    header = ORIGINAL["qqp"][0]
    path.write_text(f"{header}\n1\t2\t3\t\"is this\nover\t4\n5\t6\t7\ta\tb\t1\n")
    table = finetune.read_tsv(path, "qqp", True)
    assert table.texts == [("a", "b")] and table.labels == [1]
    assert "2 rows with missing fields left out" in capsys.readouterr().out


def test_mrpc_as_microsoft_ships_it(tmp_path, capsys):
    folder = write_glue("mrpc", tmp_path / "MRPC", test=False)
    (folder / "train.tsv").rename(folder / "msr_paraphrase_train.txt")
    (folder / "dev.tsv").rename(folder / "msr_paraphrase_test.txt")
    splits = finetune.read_task("mrpc", folder)
    assert [len(splits[split].texts) for split in ("train", "dev")] == [24, 10] and len(splits) == 2
    assert "stands for dev" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("key, version", [("squad", "v1.1"), ("squad_v2", "v2.0")])
def test_squad_files_are_read_plain_and_gzipped(key, version, packed, tmp_path):
    folder = write_squad(tmp_path / "squad", version)
    for path in list(folder.iterdir()) if packed else []:
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    splits = finetune.read_task(key, folder)
    for split, questions in splits.items():
        assert [question.id for question in questions] == [f"{split}{i}" for i in range(6)]
        assert [len(question.answers) for question in questions] == ([1] * 6 if key == "squad" else [1, 0] * 3)
        for question in questions:
            assert all(question.context[start : start + len(text)] == text for text, start in question.answers)


def as_parquet(key: str, root: Path) -> list[str]:
    """Parquet files under the hub's names, and their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {}
    if TASKS[key].kind == "span":
        for split in ("train", "validation"):
            answers = [{"text": ["x"], "answer_start": [4]}] * 2
            answers += [{"text": [], "answer_start": []}] * (key == "squad_v2")
            n = len(answers)
            tables[f"plain_text/{split}-00000-of-00001.parquet"] = {
                "id": [f"q{i}" for i in range(n)], "title": ["t"] * n, "context": ["the x of"] * n,
                "question": ["is it"] * n, "answers": answers}
    else:
        names = {"mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}.get(key, TASKS[key].columns)
        parts = [part or "" for part in TASKS[key].parts]
        for split in ["train", *(f"{s}{part}" for s in ("validation", "test") for part in parts)]:
            labels = [-1, -1] if split.startswith("test") else [1, 0]
            tables[f"{key}/{split}-00000-of-00001.parquet"] = {
                **{name: [f"{name} 0", f"{name} 1"] for name in names}, "label": labels, "idx": [10, 11]}
        tables[f"{key}_other/train-00000-of-00001.parquet"] = {"x": [0]}
    for name, columns in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / name)
    return ["README.md", *tables]


@pytest.mark.parametrize("key", TASKS)
def test_every_task_is_read_from_the_hub(key, tmp_path, monkeypatch):
    names = as_parquet(key, tmp_path)
    asked = []

    def hub_files(name, kind, wanted):
        asked.append((name, kind))
        return str(tmp_path), wanted(names)

    monkeypatch.setattr(finetune, "hub_files", hub_files)
    splits = finetune.read_task(key, None)
    assert set(splits) == set(finetune.split_names(key))
    if TASKS[key].kind == "span":
        assert asked == [(f"rajpurkar/{key}", "dataset")]
        assert splits["dev"][0] == Question("q0", "is it", "the x of", [("x", 4)])
        assert len(splits["dev"]) == (3 if key == "squad_v2" else 2) == 2 + (splits["dev"][-1].answers == [])
    else:
        assert asked == [("nyu-mll/glue", "dataset")] and splits["train"].labels == [1, 0]
        assert all(value.endswith(" 1") for value in splits["train"].texts[1])
        assert splits[finetune.split_names(key)[-1]].labels is None
    with pytest.raises(model.InputError, match="no parquet file"):
        monkeypatch.setattr(finetune, "hub_files", lambda name, kind, wanted: (str(tmp_path), wanted(names[:2])))
        finetune.read_task(key, None)


def test_the_shared_data_has_the_published_sizes(shared):
    sizes = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "rte": (2490, 277), "stsb": (5749, 1500)}
    for key, folder in finetune.find_data(str(shared / "data"), list(sizes), skip=False).items():
        splits = finetune.read_task(key, folder)
        assert (len(splits["train"].texts), len(splits["dev"].texts)) == sizes[key]


def test_answers_of_real_text_are_cut_out_exactly(shared, checkpoint):
    """The labelled span, given the highest logits, gives the answer back, but for words that hold more than it."""
    path = finetune.find_split(shared / "data" / "squad", "squad", "dev")
    questions = finetune.read_squad(path, "squad")[::100]
    tokenizer = data.load_tokenizer(shared / "teacher", 30522)
    answers = spans_to_answers(questions, tokenizer, max_length=384, stride=128)
    right = [answers[question.id] == question.answers[0][0] for question in questions]
    assert len(right) > 100 and np.mean(right) > 0.97


# ------------------------------------------------------------------------------------------------ texts to batches


def spans_to_answers(questions: list[Question], tokenizer, max_length: int, stride: int) -> dict[str, str]:
    """What best_answers makes of logits that are sure of the labels of the training rows."""
    rows = finetune.encode_questions(questions, tokenizer, max_length, stride, training=True)
    logits = []
    for ids, (first, last) in zip(rows.ids, rows.labels, strict=True):
        scores = np.full((len(ids), 2), -5.0, np.float32)
        scores[first, 0] = scores[last, 1] = 5
        logits.append(scores)
    return finetune.best_answers(rows, logits, questions, n_best=20, most_tokens=30, null_threshold=None)


def one_question(context: str, answer: str | None, start: int | None = None, question="is it the") -> list[Question]:
    start = context.index(answer) if answer and start is None else start
    return [Question("q", question, context, [(answer, start)] if answer else [])]


@pytest.mark.parametrize("context, answer", [
    ("the Café in Zürich was naïve", "Café"),
    ("cafe\u0301 of old", "cafe\u0301"),  # the accent is a character of its own
    ("The 東京 city", "京"),  # every CJK character is a token
    ("it was 😀 in May", "May"),  # beyond the basic plane: one character, not two
    ("an\u00a0old  \t river", "river"),
    ("price (of $1.5) now", "1.5"),
    ("İstanbul is old", "old"),  # lower case is longer than the text
    ("the end", "end"),
])
def test_token_to_character_offsets_are_exact(context, answer, tokenizer):
    assert spans_to_answers(one_question(context, answer), tokenizer, 32, 16) == {"q": answer}


def test_windows_cover_the_context_and_label_whole_answers_only(tokenizer):
    context = " ".join(WORDS[:40])
    answer = " ".join(WORDS[18:22])  # four tokens, cut by some windows
    questions = one_question(context, answer, question="of")
    rows = finetune.encode_questions(questions, tokenizer, max_length=16, stride=5, training=True)
    room, tokens = 16 - 3 - 1, [tokenizer.token_to_id(word) for word in WORDS[:40]]
    labelled = 0
    starts = np.cumsum([0] + [len(word) + 1 for word in WORDS[:39]])  # first characters of the words
    begins = [int(np.searchsorted(starts, window[0, 0])) for window in rows.offsets]
    for ids, begin, label in zip(rows.ids, begins, rows.labels, strict=True):
        assert ids[3:-1].tolist() == tokens[begin : begin + room] and len(ids) <= 16
        whole = begin <= 18 and begin + room >= 22
        labelled += whole
        if whole:
            assert tokenizer.decode(ids[label[0] : label[1] + 1].tolist()) == answer
        else:
            assert label.tolist() == [0, 0]
    assert begins == list(range(0, 5 * len(begins), 5)) and begins[-1] + room >= 40 > begins[-2] + room
    assert 0 < labelled < len(rows.ids)
    assert spans_to_answers(questions, tokenizer, 16, 5) == {"q": answer}
    wide = finetune.encode_questions(questions, tokenizer, max_length=16, stride=99, training=False)
    assert np.concatenate(wide.offsets)[:, 0].tolist() == starts.tolist()  # nothing falls between two windows


def test_training_leaves_out_an_answer_that_is_not_there_and_says_so(tokenizer, capsys):
    questions = one_question("the old river", "old", start=5)
    assert len(finetune.encode_questions(questions, tokenizer, 32, 16, training=True).ids) == 0
    assert "1 questions left out" in capsys.readouterr().out
    assert len(finetune.encode_questions(questions, tokenizer, 32, 16, training=False).ids) == 1


def test_long_questions_leave_room_for_the_context(tokenizer):
    questions = one_question("the old river", "old", question="of " * 300)
    for max_length, most in ((16, 6), (384, 64)):
        (ids,) = finetune.encode_questions(questions, tokenizer, max_length, 128, training=True).ids
        assert (ids == tokenizer.token_to_id("of")).sum() == most


def test_best_answers_pairs_limits_and_threshold(tokenizer):
    questions = one_question("the old river of time", None)
    rows = finetune.encode_questions(questions, tokenizer, 32, 16, training=False)
    scores = np.zeros((len(rows.ids[0]), 2), np.float32)
    context = rows.first[0]
    scores[:context] = 9  # [CLS] and the question must not win
    scores[-1] = 9  # nor the last [SEP]
    scores[0] = 0
    scores[context + 1] = 2, 1  # old
    scores[context + 4] = 0, 4  # time
    scores[context + 3, 0] = 1.5  # of

    def answer(n_best=20, most_tokens=30, null_threshold=None):
        return finetune.best_answers(rows, [scores], questions, n_best, most_tokens, null_threshold)["q"]

    assert answer() == "old river of time"
    assert answer(most_tokens=2) == "of time"
    assert answer(most_tokens=1) == "time"
    assert answer(n_best=1) == "old river of time" and answer(n_best=1, most_tokens=2) == ""
    assert answer(null_threshold=-7) == "" and answer(null_threshold=-5) == "old river of time"
    scores[0] = 4
    assert answer(null_threshold=0) == "" and answer(null_threshold=3) == "old river of time"
    assert answer() == "old river of time"  # SQuAD 1.1 always answers
    scores[context:-1] = 0
    scores[context + 3, 0] = scores[context + 1, 1] = 5  # of ... old: out of order
    scores[context + 2] = 3  # river
    scores[context + 1, 0] = scores[context + 3, 1] = -9
    assert answer() == "river"  # 3 + 3, not 5 + 5


def test_the_lowest_null_score_of_all_windows_counts(tokenizer):
    questions = one_question(" ".join(WORDS[:20]), None)
    rows = finetune.encode_questions(questions, tokenizer, max_length=16, stride=10, training=False)
    assert len(rows.ids) == 2
    for low in (0, 1):  # [CLS] wins in one window and loses in the other one, the best span scores 1
        logits = [np.full((len(ids), 2), 0.5, np.float32) for ids in rows.ids]
        logits[low][0], logits[1 - low][0] = -4, 4
        assert finetune.best_answers(rows, logits, questions, 20, 30, 0.0)["q"] != ""
        assert finetune.best_answers(rows, logits, questions, 20, 30, -9.5)["q"] == ""


@pytest.mark.parametrize("pair", [False, True])
def test_rows_equal_those_of_transformers(pair, checkpoint, tokenizer):
    generator = random.Random(1)
    texts = [tuple(text(generator, 1, 30 if pair else 60) for _ in range(1 + pair)) for _ in range(100)]
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    rows = finetune.encode_table(Table(texts, [0] * 100, []), "rte", tokenizer, 32)
    longest = max(len(ids) for ids in rows.ids)
    assert longest == 32
    for values, ids, first in zip(texts, rows.ids, rows.first, strict=True):
        reference = theirs(*values, truncation=True, max_length=32)
        assert len(ids) == len(reference["input_ids"])
        types = (np.arange(len(ids)) >= first).astype(int).tolist()
        if len(ids) < 32:  # of two texts of the same length either one may lose a token more
            assert ids.tolist() == reference["input_ids"] and types == reference["token_type_ids"]
        else:
            assert abs(sum(types) - sum(reference["token_type_ids"])) <= 1


def test_bucketing_gives_every_row_exactly_once_with_little_padding():
    lengths = np.random.default_rng(0).geometric(0.05, 3001) + 2
    batches = finetune.training_batches(lengths, 16, seed=1, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(3001))
    assert max(map(len, batches)) == 16
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded / lengths.sum() < 1.1
    assert sum(lengths[i : i + 16].max() * 16 for i in range(0, 3001, 16)) / lengths.sum() > 2  # in the file's order

    def order(seed, epoch):
        return np.concatenate(finetune.training_batches(lengths, 16, seed, epoch)).tolist()

    assert order(1, 2) == np.concatenate(batches).tolist()
    assert order(1, 2) not in (order(1, 3), order(2, 2))
    first = [lengths[batch].mean() for batch in batches]
    assert abs(scipy.stats.spearmanr(first, range(len(first)))[0]) < 0.3  # short rows do not all come first


def test_batches_hold_masks_and_types_only_where_they_say_something(checkpoint):
    config = model.BertConfig.load(checkpoint)
    rows = Rows([np.array([2, 7, 3]), np.array([2, 8, 3]), np.array([2, 7, 3, 9, 3])], [3, 3, 3], np.array([0, 1, 0]))
    ids, types, mask, labels = finetune.make_batch(rows, np.array([1, 0]), config, CPU)
    assert ids.tolist() == [[2, 8, 3], [2, 7, 3]]
    assert types is None and mask is None and labels.tolist() == [1, 0]
    ids, types, mask, labels = finetune.make_batch(rows, np.array([0, 2]), config, CPU)
    assert ids.tolist() == [[2, 7, 3, 0, 0], [2, 7, 3, 9, 3]] and types.tolist() == [[0] * 5, [0, 0, 0, 1, 1]]
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    one_type = dataclasses.replace(config, type_vocab_size=1)
    assert finetune.make_batch(dataclasses.replace(rows, labels=None), np.array([2]), one_type, CPU)[1:] == [None] * 3


# ------------------------------------------------------------------------------------------- the model of a task


@pytest.mark.parametrize("key", ["mnli", "stsb", "squad"])
def test_loss_and_logits_equal_transformers(key, checkpoint, tokenizer, tmp_path):
    generator = random.Random(0)
    kind = TASKS[key].kind
    torch.manual_seed(3)
    net = finetune.TaskModel(model.load_model(checkpoint), kind, {"span": 2, "regression": 1}.get(kind, 3)).eval()
    finetune.save_task_model(net, key, tokenizer, tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    if kind == "span":
        auto = transformers.AutoModelForQuestionAnswering
    theirs, loading = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    if key == "mnli":
        assert theirs.config.id2label == dict(enumerate(LABELS["mnli"]))
        assert theirs.config.label2id == {name: i for i, name in enumerate(LABELS["mnli"])}
    assert (kind == "regression") == (getattr(theirs.config, "problem_type", None) == "regression")

    texts = [(text(generator), text(generator, 3, 20)) for _ in range(6)]
    labels = {"span": [0] * 6, "regression": [0.5, 1, 2, 3, 4.75, 5]}.get(kind, [0, 1, 2, 2, 1, 0])
    rows = finetune.encode_table(Table(texts, labels, []), key, tokenizer, 48)
    if kind == "span":
        rows.labels = np.array([[i, i + 2] for i in range(6)])
    ids, types, mask, labels = finetune.make_batch(rows, np.arange(6), net.config, CPU)
    ours = net(ids, types, mask)
    batch = dict(input_ids=ids, token_type_ids=types, attention_mask=mask.long())
    if kind == "span":
        reference = theirs(**batch, start_positions=labels[:, 0], end_positions=labels[:, 1])
        logits = torch.stack([reference.start_logits, reference.end_logits], -1)
    else:
        reference = theirs(**batch, labels=labels)
        logits = reference.logits
    torch.testing.assert_close(ours, logits, **CLOSE)
    torch.testing.assert_close(finetune.task_loss(kind, ours, labels), reference.loss, **CLOSE)


def test_dropout_acts_in_training_alone(checkpoint):
    net = finetune.TaskModel(model.load_model(checkpoint), "classification", 2)
    net.set_dropout(0, 0)
    ids = torch.tensor([[2, 7, 8, 3]])
    for dropout, same in ((0.0, True), (0.5, False)):
        net.dropout = dropout  # of the head
        net.train()
        assert torch.equal(net(ids), net(ids)) is same
        net.eval()
        assert torch.equal(net(ids), net(ids))


def test_a_fresh_pooler_is_said_and_saved(start, checkpoint, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    bert = model.load_model(checkpoint)
    bert.bert.pooler = None
    model.save_model(bert, bare)
    data.save_tokenizer(data.load_tokenizer(checkpoint, bert.config.vocab_size), bare, 64)
    assert start("--max-steps", 1, models=(bare, checkpoint)) == 0
    said = capsys.readouterr().out
    assert f"{bare} has no pooler: it gets a fresh one" in said and f"{checkpoint} has no pooler" not in said
    saved = load_file(Path(results(tmp_path)[0]["folder"]) / "model.safetensors")
    assert 0.1 < saved["bert.pooler.dense.weight"].std() < 0.3  # initializer_range is 0.2


# ------------------------------------------------------------------------------------------------------ the loop


def test_a_toy_task_is_learnt_and_transformers_says_the_same(start, tmp_path, capsys):
    source = write_glue("sst2", tmp_path / "SST-2", train=160, dev=40)
    assert start("--epochs", 8, "--learning-rate", 2e-3, task="sst2", source=source) == 0
    (entry,) = results(tmp_path)
    assert entry["metrics"]["accuracy"] >= 95 and entry["task"] == "sst2" and entry["seconds"] > 0
    assert "chosen on dev, the split that is reported" in " ".join(capsys.readouterr().out.split())
    folder = Path(entry["folder"])
    net = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)

    def predict(texts):
        with torch.no_grad():
            return net(**theirs(texts, padding=True, return_tensors="pt")).logits.argmax(1).numpy()

    dev = finetune.read_tsv(source / "dev.tsv", "sst2", True)
    right = 100 * (predict([t for (t,) in dev.texts]) == np.array(dev.labels)).mean()
    assert right == pytest.approx(entry["metrics"]["accuracy"])
    test = finetune.read_tsv(source / "test.tsv", "sst2", False)
    lines = (folder / "SST-2.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\t{p}" for i, p in enumerate(predict([t for (t,) in test.texts])))]


@pytest.mark.parametrize("key, version", [("squad", "v1.1"), ("squad_v2", "v2.0")])
def test_toy_questions_are_learnt_and_answered(key, version, start, tmp_path):
    source = write_squad(tmp_path / "squad", version, paragraphs=40)
    assert start("--epochs", 12, "--batch-size", 8, "--learning-rate", 3e-3, task=key, source=source) == 0
    (entry,) = results(tmp_path)
    assert entry["metrics"]["exact_match"] >= 80 and entry["metrics"]["f1"] >= entry["metrics"]["exact_match"]
    answers = json.loads((Path(entry["folder"]) / "predictions.json").read_text())
    dev = finetune.read_squad(source / f"dev-{version}.json", key)
    scores = [finetune.squad_scores(answers[question.id], [t for t, _ in question.answers]) for question in dev]
    assert 100 * np.mean(scores, axis=0) == pytest.approx(list(entry["metrics"].values()))
    assert ("" in answers.values()) is (key == "squad_v2")
    config = json.loads((Path(entry["folder"]) / "config.json").read_text())
    assert config["architectures"] == ["BertForQuestionAnswering"]


@pytest.mark.parametrize("key", ORIGINAL)
def test_every_task_runs_from_files_to_predictions(key, start, tmp_path):
    source = write_glue(key, tmp_path / TASKS[key].title)
    assert start("--max-steps", 2, task=key, source=source) == 0
    (entry,) = results(tmp_path)
    names = [name + part for part in TASKS[key].parts for name in TASKS[key].metrics]
    assert list(entry["metrics"]) == names and all(-100 <= value <= 100 for value in entry["metrics"].values())
    folder = Path(entry["folder"])
    files = ["MNLI-m.tsv", "MNLI-mm.tsv"] if key == "mnli" else [f"{TASKS[key].title}.tsv"]
    for file in files:
        header, *lines = (folder / file).read_text().splitlines()
        assert header == "index\tprediction" and [line.split("\t")[0] for line in lines] == list("01234")
        for line in lines:
            value = line.split("\t")[1]
            assert 0 <= float(value) <= 5 if key == "stsb" else value in ORIGINAL[key][2]
    config = transformers.AutoConfig.from_pretrained(folder)
    if key != "stsb":
        assert [config.id2label[i] for i in range(len(LABELS[key]))] == LABELS[key]


def train(checkpoint, rte, tokenizer, seed=0, **changes) -> finetune.Outcome:
    now = settings(**changes)
    splits = finetune.read_task("rte", rte)
    rows = {split: finetune.encode_table(part, "rte", tokenizer, now.max_length) for split, part in splits.items()}
    return finetune.fine_tune(checkpoint, "rte", splits, rows, now, seed, CPU)


def flat(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_updates_equal_those_of_plain_torch(checkpoint, rte, tokenizer):
    """Three steps: gradients clipped to 1, decay of matrices alone, linear decay of the learning rate."""
    rows = finetune.encode_table(finetune.read_tsv(rte / "train.tsv", "rte", True), "rte", tokenizer, 32)
    torch.manual_seed(5)
    net = finetune.TaskModel(model.load_model(checkpoint), "classification", 2).eval()
    optimizer = torch.optim.AdamW([
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0}], eps=1e-6, foreach=False)
    norms = []
    for step, indices in enumerate(finetune.training_batches(np.array([len(ids) for ids in rows.ids]), 8, 5, 1)):
        ids, types, mask, labels = finetune.make_batch(rows, indices, net.config, CPU)
        torch.nn.functional.cross_entropy(net(ids, types, mask), labels).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (3 - step) / 3
        optimizer.step()
        optimizer.zero_grad()
    assert len(norms) == 3 and max(norms) > 1.2 * min(norms) > 1.2  # clipping has something to do
    ours = train(checkpoint, rte, tokenizer, 5, learning_rate=0.01, warmup=0.0, weight_decay=0.5, dropout=0.0).net
    torch.testing.assert_close(flat(ours), flat(net), rtol=0, atol=1e-4)


def test_dropout_is_that_of_the_checkpoint_unless_given(checkpoint, rte, tokenizer):
    for given, wanted in ((None, 0.1), (0.3, 0.3)):
        net = train(checkpoint, rte, tokenizer, max_steps=1, dropout=given).net
        assert {net.dropout, net.bert.embeddings.dropout, net.bert.layers[1].attention_dropout} == {wanted}
        assert net.config.hidden_dropout_prob == 0.1  # what is saved


def test_the_order_comes_from_seed_and_epoch(checkpoint, rte, tokenizer, monkeypatch):
    seen = []
    batches = finetune.training_batches
    monkeypatch.setattr(finetune, "training_batches", lambda *given: seen.append(given[1:]) or batches(*given))
    train(checkpoint, rte, tokenizer, seed=3, epochs=2)
    assert seen == [(8, 3, 1), (8, 3, 2)]


def test_steps_end_where_they_are_capped(checkpoint, rte, tokenizer):
    for most, epochs in ((2, 1), (3, 1), (4, 2), (99, 3)):  # an epoch is three steps
        outcome = train(checkpoint, rte, tokenizer, epochs=3, max_steps=most)
        assert (outcome.steps, outcome.epochs) == (min(most, 9), epochs)


def test_training_is_repeatable_and_every_setting_matters(checkpoint, rte, tokenizer):
    base = flat(train(checkpoint, rte, tokenizer).net)
    assert torch.equal(base, flat(train(checkpoint, rte, tokenizer).net))
    for change in (dict(learning_rate=2e-3), dict(batch_size=4), dict(max_steps=2), dict(max_length=16),
                   dict(epochs=2), dict(warmup=0.9), dict(weight_decay=0.5), dict(dropout=0.0), dict(bf16=True),
                   dict(seed=1)):
        assert not torch.equal(base, flat(train(checkpoint, rte, tokenizer, **change).net)), change


def test_the_best_epoch_is_kept_with_its_weights(checkpoint, rte, tokenizer, monkeypatch):
    scores, states = iter([10.0, 30.0, 20.0]), []

    def evaluate(net, key, splits, rows, settings, device):
        states.append(net.classifier.weight.detach().clone())
        assert set(rows) >= {"train", "dev"}
        return {"accuracy": next(scores)}, None

    monkeypatch.setattr(finetune, "evaluate", evaluate)
    splits = finetune.read_task("rte", rte)
    rows = {split: finetune.encode_table(part, "rte", tokenizer, 32) for split, part in splits.items()}
    outcome = finetune.fine_tune(checkpoint, "rte", splits, rows, settings(epochs=3), 0, CPU)
    assert (outcome.epoch, outcome.epochs, outcome.steps, outcome.metrics) == (2, 3, 9, {"accuracy": 30.0})
    assert torch.equal(outcome.net.classifier.weight, states[1]) and not torch.equal(states[1], states[2])


def test_test_splits_play_no_part_in_the_choice(checkpoint, rte, tokenizer, monkeypatch):
    splits = finetune.read_task("rte", rte)
    rows = {split: finetune.encode_table(part, "rte", tokenizer, 32) for split, part in splits.items()}
    seen = []
    predict = finetune.predict
    monkeypatch.setattr(finetune, "predict", lambda net, r, *rest: seen.append(r) or predict(net, r, *rest))
    finetune.fine_tune(checkpoint, "rte", splits, rows, settings(epochs=2), 0, CPU)
    assert seen == [rows["dev"]] * 2


def test_predictions_do_not_depend_on_the_batch(checkpoint, tokenizer):
    generator = random.Random(2)
    table = Table([(text(generator, 1, 20), text(generator, 1, 5)) for _ in range(13)], None, [])
    rows = finetune.encode_table(table, "rte", tokenizer, 32)
    for kind in ("classification", "span"):
        net = finetune.TaskModel(model.load_model(checkpoint), kind, 2)
        one, many = (finetune.predict(net, rows, size, False, CPU) for size in (1, 5))
        for ids, a, b in zip(rows.ids, one, many, strict=True):
            assert a.shape == b.shape == ((len(ids), 2) if kind == "span" else (2,))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_is_refused(start, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "task_loss", lambda kind, logits, labels: logits.sum() * float("nan"))
    assert start("--max-steps", 1) == 2
    assert "not finite" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_runs_in_bf16(checkpoint, rte, tmp_path):
    argv = ["--model", str(checkpoint), "--task", "rte", "--data", str(rte), "--output", str(tmp_path / "out")]
    assert finetune.main([*argv, "--epochs", "1"]) == 0
    assert results(tmp_path)[0]["settings"]["bf16"] is True


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def recorded(monkeypatch) -> list[finetune.Settings]:
    """The settings of every training run, which takes place all the same."""
    seen = []
    fine_tune = finetune.fine_tune

    def record(folder, key, splits, rows, settings, seed, *rest):
        seen.append(dataclasses.replace(settings))
        seen[-1].seed, seen[-1].key = seed, key
        return fine_tune(folder, key, splits, rows, settings, seed, *rest)

    monkeypatch.setattr(finetune, "fine_tune", record)
    return seen


@pytest.mark.parametrize("flag, value, field", [
    ("--epochs", 2, "epochs"), ("--max-steps", 3, "max_steps"), ("--learning-rate", 0.25, "learning_rate"),
    ("--batch-size", 5, "batch_size"), ("--max-length", 24, "max_length"), ("--warmup", 0.3, "warmup"),
    ("--weight-decay", 0.2, "weight_decay"), ("--dropout", 0.4, "dropout"),
])
def test_every_number_reaches_the_loop(flag, value, field, start, recorded):
    assert start(flag, value, *([] if flag == "--max-steps" else ["--max-steps", 1])) == 0
    assert [getattr(one, field) for one in recorded] == [value]


def test_precision_and_span_flags_reach_the_loop(start, recorded, tmp_path):
    source = write_squad(tmp_path / "squad", "v2.0")
    assert start("--precision", "bf16", "--doc-stride", 4, "--n-best", 3, "--max-answer-length", 2, "--null-threshold",
                 -1.5, "--max-steps", 1, "--max-length", 16, task="squad_v2", source=source) == 0
    assert recorded[0].bf16 is True
    assert recorded[0].span == {"stride": 4, "n_best": 3, "max_answer_length": 2, "null_threshold": -1.5}


def test_recipes_fill_in_what_is_not_given(start, recorded, capsys):
    assert start("--max-steps", 1) == 0
    rate, epochs, batch_size, _ = finetune.RECIPES["rte"]
    one = recorded[0]
    assert (one.learning_rate, one.epochs, one.batch_size, one.max_length) == (rate, epochs, batch_size, 64)
    assert "64 positions: rows are cut there instead of at 256" in capsys.readouterr().out


def test_the_grid_is_tried_once_and_its_choice_kept(start, recorded, tmp_path, capsys):
    assert start("--grid", "--max-steps", 1, "--seeds", 0) == 0
    pairs = [(one.learning_rate, one.batch_size) for one in recorded]
    assert sorted(pairs) == [(rate, size) for rate in (1e-5, 2e-5, 3e-5, 5e-5, 1e-4) for size in (16, 32)]
    (entry,) = results(tmp_path)
    choice = (entry["learning_rate"], entry["batch_size"])
    assert f"chosen on dev: learning rate {choice[0]:g}, batch {choice[1]}" in capsys.readouterr().out
    recorded.clear()
    assert start("--grid", "--max-steps", 1, "--seeds", 0, 1) == 0  # the second seed, with the choice of the first
    assert [(one.seed, one.learning_rate, one.batch_size) for one in recorded] == [(1, *choice)]
    recorded.clear()
    assert start("--grid", "--max-steps", 1, "--seeds", 2, 3, "--learning-rate", 0.01) == 0
    assert [(one.seed, one.learning_rate, one.batch_size) for one in recorded[:2]] == [(2, 0.01, 16), (2, 0.01, 32)]
    assert [(one.seed, one.batch_size) for one in recorded[2:]] == [(3, results(tmp_path)[-2]["batch_size"])]


def test_the_grid_takes_the_best_on_dev(checkpoint, monkeypatch):
    tried = []

    def fine_tune(folder, key, splits, rows, settings, seed, device, title):
        tried.append((settings.learning_rate, settings.batch_size))
        value = 90.0 if tried[-1] == (3e-5, 32) else 50.0
        return finetune.Outcome(None, {"f1": value, "accuracy": value}, None, 1, 1, 1)

    monkeypatch.setattr(finetune, "fine_tune", fine_tune)
    free = settings(learning_rate=None, batch_size=None)
    outcome, best = finetune.try_grid(checkpoint, "rte", {}, {}, free, 0, CPU, "")
    assert (best.learning_rate, best.batch_size, outcome.score) == (3e-5, 32, 90.0) and len(tried) == 10


def test_finished_results_are_not_made_again(start, recorded, tmp_path, capsys):
    assert start("--max-steps", 1, "--seeds", 0, 1) == 0
    before = results(tmp_path)
    assert start("--max-steps", 1, "--seeds", 0, 1, 2) == 0
    assert [one.seed for one in recorded] == [0, 1, 2] and results(tmp_path)[:2] == before
    assert "2 of 3 results are in" in capsys.readouterr().out
    assert start("--max-steps", 2) == 2
    message = capsys.readouterr().err
    assert "max_steps 1, now 2" in message and "--overwrite" in message and results(tmp_path)[:2] == before
    assert start("--max-steps", 2, "--overwrite") == 0
    steps = {entry["seed"]: entry["settings"]["max_steps"] for entry in results(tmp_path)}
    assert steps == {0: 2, 1: 1, 2: 1}
    recorded.clear()
    for path in Path(before[1]["folder"]).iterdir():
        path.unlink()
    Path(before[1]["folder"]).rmdir()
    assert start("--max-steps", 1, "--seeds", 1, 2) == 0  # a result without its folder is none
    assert [one.seed for one in recorded] == [1] and len(results(tmp_path)) == 3


def test_two_calls_at_a_time_keep_each_others_results(start, tmp_path, monkeypatch):
    read_task = finetune.read_task

    def meanwhile(*arguments):
        monkeypatch.setattr(finetune, "read_task", read_task)
        assert start("--max-steps", 1, "--seeds", 1) == 0
        return read_task(*arguments)

    monkeypatch.setattr(finetune, "read_task", meanwhile)
    assert start("--max-steps", 1, "--seeds", 0) == 0
    assert [entry["seed"] for entry in results(tmp_path)] == [1, 0]


def test_bad_data_costs_no_finished_result(start, tmp_path, capsys):
    source = write_glue("rte", tmp_path / "RTE")
    assert start("--max-steps", 1, source=source) == 0
    before = results(tmp_path)
    (source / "dev.tsv").unlink()
    assert start("--max-steps", 1, "--overwrite", source=source) == 2
    assert results(tmp_path) == before and Path(before[0]["folder"]).is_dir()


def test_other_weights_under_the_same_name_are_noticed(start, checkpoint, tmp_path, capsys):
    folder = tmp_path / "student"
    folder.mkdir()
    tokenizer = data.load_tokenizer(checkpoint, 10**6)
    for scale in (1.0, 1.5):
        bert = model.load_model(checkpoint)
        bert.bert.layers[0].output.dense.weight.data.mul_(scale)
        model.save_model(bert, folder)
        data.save_tokenizer(tokenizer, folder, 64)
        assert start("--max-steps", 1, models=(folder,)) == (0 if scale == 1 else 2)
    assert "made with weights" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_where_it_stopped(start, tmp_path, capsys, monkeypatch):
    fine_tune, calls = finetune.fine_tune, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fine_tune(*arguments)

    monkeypatch.setattr(finetune, "fine_tune", interrupted)
    assert start("--max-steps", 1, "--seeds", 0, 1) == 130
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "run the same command again" in message
    (first,) = results(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [Path(first["folder"]).parent.name]
    assert start("--max-steps", 1, "--seeds", 0, 1) == 0
    assert [entry["seed"] for entry in results(tmp_path)] == [0, 1] and len(calls) == 3
    assert results(tmp_path)[0] == first


@pytest.mark.parametrize("error, code", [(OSError("No space left on device"), 2), (KeyboardInterrupt(), 130)])
def test_a_model_appears_complete_or_not_at_all(error, code, start, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(data, "save_tokenizer", fail)
    assert start("--max-steps", 1) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert results(tmp_path) == []
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["results.json"]
    assert not [path for path in (tmp_path / "out").glob("*/*")]


def test_results_are_replaced_in_one_motion(tmp_path):
    finetune.write_results(tmp_path, [{"a": 1}])
    with pytest.raises(TypeError):
        finetune.write_results(tmp_path, [{"a": 2}, {"b": object()}])
    assert json.loads((tmp_path / "results.json").read_text()) == [{"a": 1}]


def test_models_whose_names_look_alike_get_folders_of_their_own(tmp_path):
    folder = finetune.result_folder(tmp_path, "../a/student", "rte", 3, {"../a/student", "b"})
    assert folder == tmp_path / "a-student" / "rte-seed3"
    twin = finetune.result_folder(tmp_path, "a/student", "rte", 3, {"../a/student", "b"})
    assert twin.parent.name.startswith("a-student-") and twin != folder
    long, other = (finetune.result_folder(tmp_path, f"{letter}/" + "ü" * 300, "rte", 3, set()) for letter in "ab")
    long.mkdir(parents=True)  # a file system takes 255 bytes
    assert long != other and len(long.parent.name.encode()) <= 255


def test_all_takes_what_is_there_and_says_what_is_not(start, tmp_path, capsys):
    root = tmp_path / "data"
    write_glue("cola", root / "CoLA")
    write_glue("stsb", root / "STS-B", test=False)
    write_squad(root / "SQuAD")
    assert start("--max-steps", 1, "--seeds", 0, 1, task="all", source=root) == 0
    assert [(entry["task"], entry["seed"]) for entry in results(tmp_path)] == [
        (key, seed) for key in ("cola", "stsb", "squad") for seed in (0, 1)]
    out = capsys.readouterr().out
    for key in ("sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli", "squad_v2"):
        assert f"skipped {key}: " in out
    head = next(line for line in out.splitlines() if line.startswith("| model"))
    columns = [name.strip() for name in head.split("|")[2:-1]]
    assert columns == ["CoLA matthews", "STS-B pearson", "STS-B spearman", "SQuAD-v1.1 exact_match", "SQuAD-v1.1 f1",
                       "GLUE average of 2"]
    assert start(task="cola rte", source=root) == 2
    assert "no folder RTE" in capsys.readouterr().err


def test_the_table_holds_means_deviations_and_the_glue_average():
    def entry(name, task, seed, **metrics):
        return {"model": name, "task": task, "seed": seed, "metrics": metrics}

    entries = [entry("m", "mrpc", 0, f1=80.0, accuracy=70.0), entry("m", "mrpc", 1, f1=82.0, accuracy=74.0),
               entry("m", "rte", 0, accuracy=60.0), entry("m", "rte", 1, accuracy=62.0),
               entry("m", "wnli", 0, accuracy=0.0), entry("m", "wnli", 1, accuracy=0.0),
               entry("other", "rte", 0, accuracy=50.0)]
    head, _, *lines = finetune.end_table(entries, ["m", "other"], ["mrpc", "rte", "wnli"]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in [head, *lines]]
    assert cells[0] == ["model", "MRPC f1", "MRPC accuracy", "RTE accuracy", "WNLI accuracy", "GLUE average of 2"]
    assert cells[1] == ["m", "81.0 ± 1.4", "72.0 ± 2.8", "61.0 ± 1.4", "0.0 ± 0.0", "68.8 ± 1.8"]
    assert cells[2] == ["other", "-", "-", "50.0", "-", "-"]


RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
RTE_ROW = "0\ta\tb\tentailment\n"
SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "the old", "qas": [
    {"id": "q7", "question": "is it", "answers": [{"text": "old", "answer_start": 4}]}]}]}]}


def squad(**changes) -> str:
    root = json.loads(json.dumps(SQUAD))
    root["data"][0]["paragraphs"][0]["qas"][0] |= changes
    return json.dumps(root)


@pytest.mark.parametrize("task, file, content, words", [
    ("rte", "dev.tsv", None, ["no dev split", "dev.tsv"]),
    ("rte", "train.tsv", None, ["no train split"]),
    ("rte", "train.tsv", "", ["train.tsv, line 1", "no column"]),
    ("rte", "train.tsv", RTE_HEADER, ["no rows"]),
    ("rte", "dev.tsv", RTE_HEADER + RTE_ROW + "1\ta\tentailment\n", ["dev.tsv, line 3", "3 columns instead of 4"]),
    ("rte", "dev.tsv", RTE_HEADER + "1\ta\tb\tc\tentailment\n", ["line 2", "5 columns instead of 4"]),
    ("rte", "dev.tsv", RTE_HEADER + RTE_ROW + "\n" + RTE_ROW, ["line 3", "1 columns"]),
    ("rte", "dev.tsv", RTE_HEADER + "0\ta\tb\tmaybe\n", ["line 2", "'maybe'", "entailment, not_entailment"]),
    ("rte", "dev.tsv", RTE_HEADER + "0\ta\tb\t0\n", ["line 2", "'0'"]),
    ("rte", "test.tsv", "index\tsentence1\n0\ta\n", ["test.tsv", "sentence2"]),
    ("rte", "dev.tsv", (RTE_HEADER + RTE_ROW).encode() + b"0\t\xff\tb\tentailment\n", ["line 3", "UTF-8"]),
    ("wnli", "train.tsv", RTE_HEADER + RTE_ROW, ["'entailment'", "WNLI"]),
    ("cola", "train.tsv", RTE_HEADER + RTE_ROW, ["line 1", "'sentence1'", "CoLA"]),
    ("cola", "train.tsv", "sentence\tlabel\n", ["line 1", "2 columns instead of 4"]),
    ("sst2", "train.tsv", RTE_HEADER + RTE_ROW, ["'sentence'", "another task"]),
    ("stsb", "train.tsv", f"{STSB}\tscore\n" + "x\t" * 9 + "5.5\n", ["line 2", "'5.5'", "0 to 5"]),
    ("stsb", "train.tsv", f"{STSB}\tscore\n" + "x\t" * 9 + "nan\n", ["'nan'"]),
    ("qqp", "train.tsv", ORIGINAL["qqp"][0] + "\n1\t2\n", ["no rows"]),
    ("mnli", "dev_mismatched.tsv", None, ["dev_mismatched"]),
    ("squad", "dev-v1.1.json", None, ["no dev split", "dev-v1.1.json"]),
    ("squad", "dev-v1.1.json", '{"data": [', ["damaged or not JSON"]),
    ("squad", "dev-v1.1.json", "", ["damaged or not JSON"]),
    ("squad", "dev-v1.1.json", "[]", ["not of SQuAD's form"]),
    ("squad", "dev-v1.1.json", '{"data": []}', ["no questions"]),
    ("squad", "dev-v1.1.json", '{"data": [{"title": "t"}]}', ["not of SQuAD's form"]),
    ("squad", "train-v1.1.json", squad(answers=[]), ["q7", "squad_v2"]),
    ("squad", "train-v1.1.json", squad(answers=[{"text": "old", "answer_start": 90}]), ["q7", "outside"]),
    ("squad", "train-v1.1.json", squad(question=None), ["q7", "form"]),
    ("squad", "train-v1.1.json", squad(answers=[{"text": 3, "answer_start": 0}]), ["q7", "form"]),
])
def test_bad_data_is_one_line(task, file, content, words, start, tmp_path, capsys):
    folder = write_squad(tmp_path / "task") if task == "squad" else write_glue(task, tmp_path / "task")
    if content is None:
        (folder / file).unlink()
    elif isinstance(content, str):
        (folder / file).write_text(content, encoding="utf-8")
    else:
        (folder / file).write_bytes(content)
    refuse(start("--max-steps", 1, task=task, source=folder), capsys, words)
    assert not (tmp_path / "out").exists()


def refuse(code: int, capsys, words: list[str]):
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("finetune.py: error: ") and message.count("\n") == 1
    for word in words:
        assert word in message


def test_a_damaged_archive_is_one_line(start, tmp_path, capsys):
    folder = write_squad(tmp_path / "squad")
    packed = gzip.compress((folder / "dev-v1.1.json").read_bytes())
    (folder / "dev-v1.1.json").unlink()
    for content in (packed[:-20], packed[:30] + b"xxxx" + packed[34:], b"not gzip"):
        (folder / "dev-v1.1.json.gz").write_bytes(content)
        refuse(start(task="squad", source=folder), capsys, ["dev-v1.1.json.gz", "damaged"])


@pytest.mark.parametrize("flags, words", [
    (["--task", "imdb"], ["imdb", "choose from"]),
    (["--seeds", "-1"], ["-1"]),
    (["--epochs", "0"], ["0"]),
    (["--learning-rate", "nan"], ["nan"]),
    (["--batch-size", "many"], ["many"]),
    (["--max-length", "5"], ["16"]),
    (["--dropout", "1"], ["1"]),
    (["--precision", "fp8"], ["fp8"]),
    (["--device", "tpu"], ["tpu"]),
    (["--model", "/no/such/model"], ["/no/such/model"]),
    (["--data", "/no/such/data"], ["not a folder"]),
    (["--colour", "red"], ["--colour"]),
])
def test_bad_flags_are_one_line(flags, words, start, capsys):
    refuse(start(*flags), capsys, words)


def test_bad_folders_are_one_line(start, checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("keep me")
    refuse(start(), capsys, ["in use", "results.json"])
    for content in ("{", '{"a": 1}', '[{"model": "m"}]', "[1]", "7"):
        (tmp_path / "out" / "results.json").write_text(content)
        refuse(start(), capsys, ["results.json", "--output"])
    refuse(start(task="all", source=tmp_path), capsys, ["none of the tasks"])
    (tmp_path / "file").write_text("x")
    refuse(start("--output", tmp_path / "file"), capsys, ["file", "in use"])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    refuse(start("--output", tmp_path / "new", models=(checkpoint, broken)), capsys, ["broken", "config.json"])
    assert not (tmp_path / "new").exists()


def test_the_program_itself_refuses_and_helps(tmp_path):
    def run(*argv):
        command = [sys.executable, str(ROOT / "finetune.py"), *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    refused, help_ = run("--model", "x", "--task", "imdb"), run("--help")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "imdb" in refused.stderr
    assert help_.returncode == 0
    flags = collections.Counter(word.strip(",[]") for word in help_.stdout.split() if word.startswith(("--", "[--")))
    for flag in ("--model", "--task", "--data", "--output", "--seeds", "--epochs", "--max-steps", "--learning-rate",
                 "--batch-size", "--max-length", "--device", "--precision", "--grid", "--overwrite"):
        assert flags[flag] >= 2  # in the usage and with its explanation
