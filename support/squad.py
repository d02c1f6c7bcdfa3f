"""SQuAD 1.1 and 2.0: read the files, split contexts into windows, and choose answers from a model's scores.

A context that is too long for the model becomes several overlapping windows, each with the question in front. The model
scores every token of a window as the first and as the last token of the answer.

    windows = make_windows(questions, tokenizer, max_length=384, stride=128, training=False)
    answers = best_answers(windows, scores, questions, n_best=20, max_answer_length=30)  # scores: (S,2) a window
"""

import dataclasses
import gzip
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np

from support.errors import InputError, one_line

MAX_QUESTION_TOKENS = 64  # longer questions are truncated, as in BERT
TOKENISE_AT_ONCE = 1024  # questions; an Encoding of the tokenizer takes much more memory than its token ids


@dataclasses.dataclass
class Question:
    id: str
    text: str
    context: str
    answers: list[tuple[str, int]]  # text, and index of its first character in the context


@dataclasses.dataclass(slots=True)
class Window:
    """[CLS] question [SEP] part of the context [SEP], at most `max_length` tokens."""

    question: int  # index of the question
    ids: np.ndarray  # (S,) token ids
    context_start: int  # first token of the context
    offsets: np.ndarray  # (tokens of the context, 2) the characters start:end of each of them
    answer: tuple[int, int]  # first and last token; 0, 0 (the [CLS] token) if the window does not hold the answer


def read_squad(path: Path, key: str) -> list[Question]:
    """Read a SQuAD file, JSON or gzipped JSON. Raises InputError that names the question if possible."""
    try:
        raw = path.read_bytes()
        root = json.loads(gzip.decompress(raw) if path.name.endswith(".gz") else raw)
    except (OSError, EOFError, ValueError, RecursionError, gzip.zlib.error) as error:
        raise InputError(f"{path} is damaged or not JSON: {one_line(error)}; download it again") from None
    questions, where = [], "top level"
    try:
        for a, article in enumerate(root["data"], 1):
            for p, paragraph in enumerate(article["paragraphs"], 1):
                where, context = f"article {a}, paragraph {p}", paragraph["context"]
                for entry in paragraph["qas"]:
                    where = f"question {entry['id']}"
                    answers = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                    "".join((entry["id"], entry["question"], context))  # a TypeError unless all three are text
                    if any(start < 0 or len(text + context[:start]) > len(context) for text, start in answers):
                        raise InputError(f"{path}, {where}: an answer lies outside its paragraph; repair the file")
                    if not answers and key == "squad":
                        raise InputError(f"{path}, {where}: no answer; use --task squad_v2 for such questions")
                    questions.append(Question(entry["id"], entry["question"], context, answers))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}, {where}: not in SQuAD's format ({one_line(error)})") from None
    if not questions:
        raise InputError(f"{path} holds no questions; download it again")
    return questions


def make_windows(questions: list[Question], tokenizer, max_length: int, stride: int, training: bool) -> list[Window]:
    """The windows of all questions; those of one question start `stride` tokens apart.

    For training the first answer is labelled. A question whose answer is not found at `answer_start` is then dropped.
    """
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    windows, misplaced = [], 0
    for begin in range(0, len(questions), TOKENISE_AT_ONCE):
        chunk = questions[begin : begin + TOKENISE_AT_ONCE]
        contexts = {question.context: None for question in chunk}  # most contexts have several questions
        for context, encoding in zip(contexts, tokenizer.encode_batch(list(contexts), add_special_tokens=False),
                                     strict=True):
            contexts[context] = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
        texts = tokenizer.encode_batch_fast([question.text for question in chunk], add_special_tokens=False)
        for index, (question, text) in enumerate(zip(chunk, texts, strict=True), begin):
            context, offsets = contexts[question.context]
            ids = text.ids[: min(MAX_QUESTION_TOKENS, (max_length - 3) // 2)]
            room, context_start = max_length - 3 - len(ids), len(ids) + 2
            first, last = answer_tokens(question, offsets) if training and question.answers else (-1, -1)
            if first is None:
                misplaced += 1
                continue
            for start in itertools.count(0, min(stride, room)):
                shift, end = context_start - start, start + room
                windows.append(Window(
                    index, np.array([cls, *ids, sep, *context[start:end], sep], np.int32), context_start,
                    offsets[start:end], (first + shift, last + shift) if start <= first and last < end else (0, 0)))
                if end >= len(context):
                    break
    if misplaced:
        print(f"{misplaced} questions are not used for training: their answer is not at answer_start.")
    return windows


def answer_tokens(question: Question, offsets: np.ndarray):
    """First and last token of the context that overlap the first answer; None, None if the answer is misplaced."""
    text, start = question.answers[0]
    found = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
    misplaced = not len(found) or question.context[start : start + len(text)] != text
    return (None, None) if misplaced else found[[0, -1]]


def best_answers(windows: list[Window], scores: list[np.ndarray], questions: list[Question], n_best: int,
                 max_answer_length: int, null_threshold: float | None = None) -> dict[str, str]:
    """Question id -> text of the best span over all windows, copied from the context character by character.

    scores: (S,2) for each window, of every token as first and as last one. The `n_best` first and last tokens of the
    context are paired; a valid pair is in order and at most `max_answer_length` tokens long. With a threshold (SQuAD
    2.0) the answer is empty if the lowest [CLS] score of all windows exceeds that of the best span by more.
    """
    best = [(-np.inf, "")] * len(questions)
    null = [np.inf] * len(questions)
    for window, values in zip(windows, scores, strict=True):
        null[window.question] = min(null[window.question], float(values[0].sum()))
        first, last = values[window.context_start : -1].T  # without the last [SEP]
        starts, ends = np.argsort(-first)[:n_best], np.argsort(-last)[:n_best]
        length = ends - starts[:, None] + 1  # (n_best,n_best)
        valid = (length > 0) & (length <= max_answer_length)
        total = np.where(valid, first[starts][:, None] + last[ends], -np.inf)  # (n_best,n_best)
        if total.size and total.max() > best[window.question][0]:
            i, j = np.unravel_index(total.argmax(), total.shape)
            text, end = questions[window.question].context, window.offsets[ends[j], 1]
            while end < len(text) and unicodedata.combining(text[end]):  # an accent that the tokenizer stripped
                end += 1
            best[window.question] = (float(total.max()), text[window.offsets[starts[i], 0] : end])
    threshold = np.inf if null_threshold is None else null_threshold
    return {question.id: "" if null_score - score > threshold else text
            for question, (score, text), null_score in zip(questions, best, null, strict=True)}
