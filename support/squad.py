"""SQuAD 1.1 and 2.0: read the files, split contexts into windows, and choose answers from a model's scores.

A context that is too long for the model becomes several overlapping windows, each with the question in front. The model
scores every token of a window as the first and as the last token of the answer.
"""

import gzip
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from support.batches import Example, Row, tokenise
from support.errors import InputError, LocalError, one_line

# All three are BERT's values, in tokens.
MAX_QUESTION_TOKENS = 64  # longer questions are truncated
STRIDE = 128  # from the start of a window to the next
MAX_ANSWER_TOKENS = 30


def read_squad(path: Path, key: str) -> list[Example]:
    """Read a SQuAD file, JSON or gzipped JSON. Raises InputError that names the question if possible."""
    questions, where = [], ""
    try:
        raw = path.read_bytes()
        root = json.loads(gzip.decompress(raw) if path.name.endswith(".gz") else raw)
        for paragraph in itertools.chain.from_iterable(article["paragraphs"] for article in root["data"]):
            for entry in paragraph["qas"]:
                where = f", in or after question {entry['id']}"
                answers = [(answer["text"], int(answer["answer_start"])) for answer in entry["answers"]]
                name = str(entry["id"])
                texts = name, entry["question"], paragraph["context"], *dict(answers)
                "".join(texts).encode()  # a TypeError or ValueError unless all is text
                if not answers and key == "squad":
                    raise InputError(f"{path}, question {entry['id']}: no answer; use --task squad_v2")
                questions.append(Example((entry["question"], paragraph["context"]), answers, name))
    except (OSError, EOFError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError,
            gzip.zlib.error) as error:
        raise InputError(f"{path}{where}: damaged, or not in SQuAD's format ({one_line(error)})") from None
    if not questions:
        raise InputError(f"{path} holds no questions; download it again")
    return questions


def pair_template(tokenizer) -> tuple[list[int], list[int], list[int], int]:
    """What the tokenizer adds to a pair, "head a middle b tail", as token ids; and the token type of b. XLM-R's middle
    is two separators, and its type of b is 0."""
    length, pair = len(tokenizer.encode("a", add_special_tokens=False)), tokenizer.encode("a", "a")
    a, b = pair.sequence_ids.index(0), pair.sequence_ids.index(1)
    return pair.ids[:a], pair.ids[a + length : b], pair.ids[b + length :], pair.type_ids[b]


def make_windows(questions: list[Example], tokenizer, max_length: int, training: bool) -> list[Row]:
    """The windows of all questions, [CLS] question [SEP] part of the context [SEP]; those of one start STRIDE apart.

    For training the first answer is labelled, or else the [CLS] token, 0, 0, if the window does not hold all of it. A
    question whose answer is not found at `answer_start` is then dropped. Raises InputError if none is left.
    """
    head, middle, tail, second_type = pair_template(tokenizer)
    free = max_length - len(head) - len(middle) - len(tail)
    windows, misplaced = [], 0
    texts, contexts = zip(*(question.texts for question in questions), strict=True)
    contexts = list(dict.fromkeys(contexts))  # most have several questions
    encoded = {context: (encoding.ids, np.array(encoding.offsets, np.int32).reshape(-1, 2))
               for context, encoding in zip(contexts, tokenise(contexts, tokenizer, special=False), strict=True)}
    for question, text in zip(questions, tokenise(texts, tokenizer, special=False), strict=True):
        context, offsets = encoded[question.texts[1]]
        ids = text.ids[: min(MAX_QUESTION_TOKENS, free // 2)]
        room, first_length = free - len(ids), len(head) + len(ids) + len(middle)
        first, last = -1, -1  # tokens of the context that overlap the answer
        if training and question.label:
            answer, begin = question.label[0]
            found = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < begin + len(answer)))
            if not len(found) or question.texts[1][begin : begin + len(answer)] != answer:
                misplaced += 1
                continue
            first, last = found[[0, -1]].tolist()
        for start in itertools.count(0, min(STRIDE, room)):
            shift, end = first_length - start, start + room
            label = (first + shift, last + shift) if start <= first and last < end else (0, 0)
            row = np.array([*head, *ids, *middle, *context[start:end], *tail], np.int32)
            windows.append(Row(row, first_length, label, question, offsets[start:end], second_type))
            if end >= len(context):
                break
    if misplaced:
        print(f"{misplaced} questions are not used for training: their answer is not at answer_start.")
    if not windows:
        raise LocalError("no question of the training split has its answer at answer_start, counted in characters")
    return windows


def best_span(window: Row, scores: np.ndarray) -> tuple[float, str]:
    """Score and text of the best span in one window, at most MAX_ANSWER_TOKENS long; -inf, "" without a context."""
    first, last = scores[window.first_length :][: len(window.offsets)].T  # (T,) each: the tokens of the context
    if not len(first):
        return -np.inf, ""
    padded = np.pad(last, (0, MAX_ANSWER_TOKENS - 1), constant_values=-np.inf)
    totals = first[:, None] + sliding_window_view(padded, MAX_ANSWER_TOKENS)  # (T,MAX_ANSWER_TOKENS)
    start, more = np.unravel_index(totals.argmax(), totals.shape)
    context, end = window.example.texts[1], window.offsets[start + more, 1]
    while end < len(context) and unicodedata.combining(context[end]):  # an accent that the tokenizer stripped
        end += 1
    return float(totals.max()), context[window.offsets[start, 0] : end]


def best_answers(windows: list[Row], scores: list[np.ndarray], can_be_empty: bool) -> dict[str, str]:
    """Question id -> text of the best span over all its windows, copied from the context character by character.

    scores: (S,2) for each window, of every token as first and as last one; S may include padding. If it can be empty
    (SQuAD 2.0), the answer is empty where the lowest [CLS] score of all windows exceeds that of the best span.
    """
    best: dict[str, tuple[float, str]] = {}
    null: dict[str, float] = {}
    for window, values in zip(windows, scores, strict=True):
        key = window.example.name
        best[key] = max(best.get(key, (-np.inf, "")), best_span(window, values), key=lambda span: span[0])
        null[key] = min(null.get(key, np.inf), float(values[0].sum()))
    return {key: "" if can_be_empty and null[key] > score else text for key, (score, text) in best.items()}
