"""Reading SQuAD, windows over long contexts, and the answers (support/squad.py)."""

import gzip
import json
import math

import numpy as np
import pytest
import transformers
from conftest import WORDS
from made_up_tasks import write_squad

from support import squad
from support.batches import Example
from support.checkpoint import load_tokenizer
from support.glue import find_split, read_task
from support.squad import best_answers, make_windows, read_squad


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("key, version", [("squad", "v1.1"), ("squad_v2", "v2.0")])
def test_files_are_read_plain_and_gzipped(key, version, compressed, tmp_path):
    folder = write_squad(tmp_path / "squad", version)
    for path in list(folder.iterdir()) if compressed else []:
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    splits = read_task(key, folder)
    for split, questions in splits.items():
        assert [question.name for question in questions] == [f"{split}{i}" for i in range(6)]
        assert [len(question.label) for question in questions] == ([1] * 6 if key == "squad" else [1, 0] * 3)
        for question in questions:
            context = question.texts[1]
            assert all(context[start : start + len(text)] == text for text, start in question.label)


def one_question_file(**changes) -> str:
    question = {"id": "q7", "question": "is it", "answers": [{"text": "old", "answer_start": 4}]} | changes
    return json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "the old", "qas": [question]}]}]})


@pytest.mark.parametrize("content, words", [
    ('{"data": [', ["damaged"]),
    ("", ["damaged"]),
    ("[]", ["not in SQuAD's format"]),
    ('{"data": []}', ["no questions"]),
    ('{"data": [{"title": "t"}]}', ["not in SQuAD's format"]),
    (one_question_file(answers=[]), ["q7", "squad_v2"]),
    (one_question_file(answers=[{"text": "old", "answer_start": "x"}]), ["q7", "format"]),
    (one_question_file(answers=[{"text": "old"}]), ["q7", "answer_start"]),
    (one_question_file(question=None), ["q7", "format"]),
    (one_question_file()[:-2] + ', {"title": "u"}]}', ["after question q7", "format"]),
    (one_question_file(answers=[{"text": 3, "answer_start": 0}]), ["q7", "format"]),
    (one_question_file(answers=[{"text": "old", "answer_start": math.inf}]), ["q7", "format"]),
    (one_question_file(question="half a \ud800 pair"), ["q7", "format"]),
])
def test_bad_files_are_named_with_their_question(content, words, tmp_path, refused):
    path = tmp_path / "train-v1.1.json"
    path.write_text(content)
    with refused("train-v1.1.json", *words):
        read_squad(path, "squad")


def test_missing_and_damaged_archives_are_errors(tmp_path, refused):
    folder = write_squad(tmp_path / "squad")
    archive = gzip.compress((folder / "dev-v1.1.json").read_bytes())
    (folder / "dev-v1.1.json").unlink()
    with refused("holds no dev-v1.1.json"):
        read_task("squad", folder)
    for content in (archive[:-20], archive[:30] + b"xxxx" + archive[34:], b"not gzip"):
        (folder / "dev-v1.1.json.gz").write_bytes(content)
        with refused("dev-v1.1.json.gz", "damaged"):
            read_task("squad", folder)


def answers_from_labels(questions: list[Example], tokenizer, max_length: int) -> dict[str, str]:
    """The answers if the model is sure of the labels of the training windows."""
    windows = make_windows(questions, tokenizer, max_length, training=True)
    all_scores = []
    for window in windows:
        scores = np.full((len(window.ids), 2), -5.0, np.float32)
        first, last = window.label
        scores[first, 0] = scores[last, 1] = 5
        all_scores.append(scores)
    return best_answers(windows, all_scores, can_be_empty=False)


def one_question(context: str, answer: str | None, start: int | None = None, text="is it the") -> list[Example]:
    start = context.index(answer) if answer and start is None else start
    return [Example((text, context), [(answer, start)] if answer else [], "q")]


@pytest.mark.parametrize("context, answer", [
    ("the Café in Zürich was naïve", "Café"),
    ("cafe\u0301 of old", "cafe\u0301"),  # the accent is a character of its own
    ("The 東京 city", "京"),  # every CJK character is a token
    ("it was 😀 in May", "May"),  # beyond the basic plane: one character, not two
    ("an\u00a0old  \t river", "river"),
    ("price (of $1.5) now", "1.5"),
    ("İstanbul is old", "old"),  # longer in lower case
    ("the end", "end"),
])
def test_answers_are_copied_from_the_context_exactly(context, answer, tokenizer):
    assert answers_from_labels(one_question(context, answer), tokenizer, 32) == {"q": answer}


def test_windows_of_an_xlmr_tokenizer_equal_those_of_transformers(xlmr_checkpoint):
    tokenizer = load_tokenizer(xlmr_checkpoint, 1000)
    questions = one_question("the old river, by the sea", "river", text="king of the old")
    (window,) = make_windows(questions, tokenizer, 32, training=True)
    theirs = transformers.AutoTokenizer.from_pretrained(xlmr_checkpoint)
    assert window.ids.tolist() == theirs(questions[0].texts[0], questions[0].texts[1])["input_ids"]
    assert window.second_type == 0 and len(window.offsets) == len(window.ids) - window.first_length - 1
    assert answers_from_labels(questions, tokenizer, 32) == {"q": "river"}
    assert [len(part.ids) for part in make_windows(questions, tokenizer, 14, training=False)] == [14, 9]


def test_answers_of_real_text_are_exact(shared):
    """Except for words that contain more than the answer."""
    questions = read_squad(find_split(shared / "data" / "squad", "squad", "dev"), "squad")[::100]
    tokenizer = load_tokenizer(shared / "teacher", 30522)
    answers = answers_from_labels(questions, tokenizer, max_length=384)
    correct = [answers[question.name] == question.label[0][0] for question in questions]
    assert len(correct) > 100 and np.mean(correct) > 0.97


def test_windows_cover_the_context_and_label_whole_answers_only(tokenizer, monkeypatch):
    monkeypatch.setattr(squad, "STRIDE", 5)
    context = " ".join(WORDS[:40])
    answer = " ".join(WORDS[18:22])  # four tokens, which some windows hold in part
    questions = one_question(context, answer, text="of")
    windows = make_windows(questions, tokenizer, max_length=16, training=True)
    room, tokens = 16 - 3 - 1, [tokenizer.token_to_id(word) for word in WORDS[:40]]
    characters = np.cumsum([0] + [len(word) + 1 for word in WORDS[:39]])  # where the words start
    starts = [int(np.searchsorted(characters, window.offsets[0, 0])) for window in windows]
    whole = [start <= 18 and start + room >= 22 for start in starts]
    for window, start, is_whole in zip(windows, starts, whole, strict=True):
        assert window.ids[3:-1].tolist() == tokens[start : start + room] and len(window.ids) <= 16
        first, last = window.label
        if is_whole:
            assert tokenizer.decode(window.ids[first : last + 1].tolist()) == answer
        else:
            assert (first, last) == (0, 0)
    assert starts == list(range(0, 5 * len(starts), 5)) and starts[-1] + room >= 40 > starts[-2] + room
    assert 0 < sum(whole) < len(windows)
    assert answers_from_labels(questions, tokenizer, 16) == {"q": answer}
    monkeypatch.setattr(squad, "STRIDE", 99)
    wide = make_windows(questions, tokenizer, max_length=16, training=False)
    assert np.concatenate([window.offsets for window in wide])[:, 0].tolist() == characters.tolist()  # no gaps


def test_misplaced_answers_are_dropped_from_training_with_a_message(tokenizer, capsys, refused):
    right = one_question("the old river", "old")
    for start in (5, 90, -3):
        wrong = one_question("the old river", "old", start=start)
        windows = make_windows([*wrong, *right], tokenizer, 32, training=True)
        assert [window.example for window in windows] == right
        assert "1 questions are not used for training" in capsys.readouterr().out
        assert len(make_windows(wrong, tokenizer, 32, training=False)) == 1
        with refused("answer_start"):
            make_windows(wrong, tokenizer, 32, training=True)


def test_long_questions_leave_room_for_the_context(tokenizer):
    questions = one_question("the old river", "old", text="of " * 300)
    for max_length, most in ((16, 6), (384, 64)):
        (window,) = make_windows(questions, tokenizer, max_length, training=True)
        assert (window.ids == tokenizer.token_to_id("of")).sum() == most


def test_the_best_valid_span_of_the_context_is_the_answer(tokenizer, monkeypatch):
    questions = one_question("the old river of time", None)
    (window,) = windows = make_windows(questions, tokenizer, 32, training=False)
    scores = np.zeros((len(window.ids), 2), np.float32)
    context = window.first_length
    scores[:context] = scores[-1] = 9  # [CLS], the question and the last [SEP] must not win
    scores[0] = 0
    scores[context + 1] = 2, 1  # old
    scores[context + 4] = 0, 4  # time
    scores[context + 3, 0] = 1.5  # of

    def answer(can_be_empty=False):
        return best_answers(windows, [scores], can_be_empty)["q"]

    for most, expected in ((30, "old river of time"), (4, "old river of time"), (2, "of time"), (1, "time")):
        monkeypatch.setattr(squad, "MAX_ANSWER_TOKENS", most)
        assert answer() == expected
    monkeypatch.setattr(squad, "MAX_ANSWER_TOKENS", 30)
    assert answer(can_be_empty=True) == "old river of time"  # 2 + 4, and 0 for no answer
    scores[0] = 4
    assert answer(can_be_empty=True) == "" and answer() == "old river of time"
    scores[context:-1] = 0
    scores[context + 3, 0] = scores[context + 1, 1] = 5  # of ... old: out of order
    scores[context + 2] = 3  # river
    scores[context + 1, 0] = scores[context + 3, 1] = -9
    assert answer() == "river"  # 3 + 3, not 5 + 5


def test_the_lowest_null_score_of_all_windows_counts(tokenizer):
    questions = one_question(" ".join(WORDS[:20]), None)
    windows = make_windows(questions, tokenizer, max_length=16, training=False)
    assert len(windows) == 2
    for first, second in ((-4, 4), (4, -4), (4, 4)):  # the best span scores 1 in both
        scores = [np.full((len(window.ids), 2), 0.5, np.float32) for window in windows]
        scores[0][0], scores[1][0] = first, second
        assert (best_answers(windows, scores, can_be_empty=True)["q"] == "") is (first == second)


def test_a_window_without_context_has_no_span(tokenizer):
    questions = one_question(" ", None)
    windows = make_windows(questions, tokenizer, 32, training=False)
    scores = [np.zeros((len(window.ids), 2), np.float32) for window in windows]
    assert best_answers(windows, scores, can_be_empty=False) == {"q": ""}
