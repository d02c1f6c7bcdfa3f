"""support/metrics.py against scikit-learn and scipy, and the corner cases of SQuAD's official script."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from support.metrics import METRICS, accuracy, f1, pearson, spearman, squad_scores


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learn_and_scipy(seed):
    generator = np.random.default_rng(seed)
    predicted, true = generator.integers(0, 2, (2, 50))
    assert accuracy(predicted, true) == pytest.approx(sklearn.metrics.accuracy_score(true, predicted))
    assert f1(predicted, true) == pytest.approx(sklearn.metrics.f1_score(true, predicted))
    assert METRICS["matthews"](predicted, true) == pytest.approx(sklearn.metrics.matthews_corrcoef(true, predicted))
    scores = generator.normal(size=50).astype(np.float32)
    with_ties = generator.integers(0, 4, 50).astype(np.float32)
    assert pearson(scores, with_ties) == pytest.approx(scipy.stats.pearsonr(scores, with_ties)[0], abs=1e-6)
    assert spearman(scores, with_ties) == pytest.approx(scipy.stats.spearmanr(scores, with_ties)[0], abs=1e-6)


def test_metrics_of_constant_predictions_are_zero_not_nan():
    true, zeros = np.array([0, 1, 1]), np.zeros(3)
    for name in ("f1", "matthews", "pearson", "spearman"):
        assert METRICS[name](zeros, true) == 0
    assert f1(zeros, zeros) == 0  # as scikit-learn returns with a warning
    assert pearson(np.full(3, 0.1), true) == 0  # the rounded mean is not exactly 0.1


@pytest.mark.parametrize("predicted, references, exact, f1", [
    ("The Cat!", ["cat"], 1, 1),  # article, punctuation and case are ignored
    ("an apple a day", ["apple day"], 1, 1),
    ("theatre", ["atre"], 0, 0),  # an article inside a word is kept
    ("", [], 1, 1),  # unanswerable, and not answered
    ("", ["cat"], 0, 0),
    ("cat", [], 0, 0),
    ("", ["the", "..."], 1, 1),  # normalisation leaves nothing of the references
    ("", ["the", "cat"], 0, 0),  # an empty reference does not count beside a real one
    ("red cat", ["blue dog", "big red cat"], 0, 0.8),  # the best of several references
    ("cat cat", ["cat"], 0, 2 / 3),  # words are counted
    ("Zürich", ["zürich"], 1, 1),
    ("Zurich", ["Zürich"], 0, 0),  # accents matter
    ("“cat”", ["cat"], 0, 0),  # only ASCII punctuation is removed
    ("U.S.", ["us"], 1, 1),
    ("well-known", ["wellknown"], 1, 1),
    ("  a   b ", ["b"], 1, 1),
])
def test_squad_scores_follow_the_official_script(predicted, references, exact, f1):
    assert squad_scores(predicted, references) == (exact, pytest.approx(f1))
