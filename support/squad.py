"""SQuAD 1.1 and 2.0: read the files, split contexts into windows, and choose answers from a model's scores.

A context that is too long for the model becomes several overlapping windows, each with the question in front. The model
scores every token of a window as the first and as the last token of the answer.

    windows = make_windows(questions, tokenizer, max_length=384, training=False)
    answers = best_answers(windows, scores, questions, can_be_empty=False)  # scores: (S,2) a window
"""

import dataclasses
import gzip
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from support.errors import InputError, one_line

# All three are BERT's values, in tokens.
MAX_QUESTION_TOKENS = 64  # longer questions are truncated
STRIDE = 128  # from the start of a window to the next
MAX_ANSWER_TOKENS = 30
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


def make_windows(questions: list[Question], tokenizer, max_length: int, training: bool) -> list[Window]:
    """The windows of all questions; those of one question start STRIDE tokens apart.

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
            for start in itertools.count(0, min(STRIDE, room)):
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


def best_span(window: Window, scores: np.ndarray, context: str) -> tuple[float, str]:
    """Score and text of the best span in one window, at most MAX_ANSWER_TOKENS long; -inf, "" without a context."""
    first, last = scores[window.context_start : -1].T  # (T,) each, for the T tokens of the context
    if not len(first):
        return -np.inf, ""
    padded = np.pad(last, (0, MAX_ANSWER_TOKENS - 1), constant_values=-np.inf)
    totals = first[:, None] + sliding_window_view(padded, MAX_ANSWER_TOKENS)  # (T,MAX_ANSWER_TOKENS)
    start, more = np.unravel_index(totals.argmax(), totals.shape)
    end = window.offsets[start + more, 1]
    while end < len(context) and unicodedata.combining(context[end]):  # an accent that the tokenizer stripped
        end += 1
    return float(totals.max()), context[window.offsets[start, 0] : end]


def best_answers(windows: list[Window], scores: list[np.ndarray], questions: list[Question],
                 can_be_empty: bool) -> dict[str, str]:
    """Question id -> text of the best span over all windows, copied from the context character by character.

    scores: (S,2) for each window, of every token as first and as last one. If it can be empty (SQuAD 2.0), the answer
    is empty where the lowest [CLS] score of all windows exceeds that of the best span.
    """
    best = [(-np.inf, "")] * len(questions)
    null = [np.inf] * len(questions)
    for window, values in zip(windows, scores, strict=True):
        i = window.question
        best[i] = max(best[i], best_span(window, values, questions[i].context), key=lambda span: span[0])
        null[i] = min(null[i], float(values[0].sum()))
    return {question.id: "" if can_be_empty and null_score > score else text
            for question, (score, text), null_score in zip(questions, best, null, strict=True)}
