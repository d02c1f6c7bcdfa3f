"""The metrics of GLUE and SQuAD: from 0 to 1, correlations from -1 to 1.

Those of GLUE compare predictions (N,) with labels (N,). `squad_scores` compares one answer with its references.
"""

import collections
import re
import string

import numpy as np


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float((predicted == true).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if neither is defined."""
    true_positives = ((predicted == 1) & (true == 1)).sum()
    positives = (predicted == 1).sum() + (true == 1).sum()
    return float(2 * true_positives / positives) if positives else 0.0


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation; 0 if one side is constant."""
    x, y = (np.asarray(values, np.float64) - np.mean(values, dtype=np.float64) for values in (predicted, true))
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if np.ptp(predicted) and np.ptp(true) else 0.0


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Matthews correlation of two classes, which is the Pearson correlation of the labels 0 and 1."""
    return pearson(predicted, true)


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation of the ranks. Equal values share the mean of their ranks."""
    def ranks(values):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[group]

    return pearson(ranks(predicted), ranks(true))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_scores(predicted: str, references: list[str]) -> tuple[float, float]:
    """Exact match and word F1 of one answer against the best of its references, as in SQuAD's official script.

    The empty answer is right if there are no references, or if normalisation leaves nothing of any of them.
    """
    words = normalise_answer(predicted).split()
    exact, best = 0.0, 0.0
    for reference in [text for text in references if normalise_answer(text)] or [""]:
        true = normalise_answer(reference).split()
        common = sum((collections.Counter(words) & collections.Counter(true)).values())
        score = 2 * common / (len(words) + len(true)) if words and true else float(words == true)
        exact, best = max(exact, float(words == true)), max(best, score)
    return exact, best
