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
    return float(np.corrcoef(predicted, true)[0, 1]) if np.ptp(predicted) and np.ptp(true) else 0.0


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation of the ranks. Equal values share the mean of their ranks."""
    def ranks(values):
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[group]

    return pearson(ranks(predicted), ranks(true))


METRICS = {"accuracy": accuracy, "f1": f1, "pearson": pearson, "spearman": spearman,
           "matthews": pearson}  # of two classes, it is the Pearson correlation of the labels 0 and 1


def normalised_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_scores(predicted: str, references: list[str]) -> tuple[float, float]:
    """Exact match and word F1 of one answer against the best of its references, as in the official script of SQuAD 2.0.

    The empty answer is right if there are no references, or if normalisation leaves nothing of any of them.
    """
    words, exact, f1 = normalised_words(predicted), 0.0, 0.0
    for true in [words for words in map(normalised_words, references) if words] or [[]]:
        equal = float(words == true)
        common = (collections.Counter(words) & collections.Counter(true)).total()
        exact, f1 = max(exact, equal), max(f1, 2 * common / (len(words) + len(true)) if words and true else equal)
    return exact, f1
