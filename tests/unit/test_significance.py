"""Metrics of resamples against scikit-learn on the drawn pairs themselves, ties included; the tests by hand."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from flipkd_dist import significance
from flipkd_dist.significance import difference, draw, holm, interval, paired_t_test, resampled_metrics, two_sided_p


def cases(num_pairs: int = 60, scorers: int = 3, digits: int = 1, seed: int = 0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=num_pairs)
    scores = np.clip(generator.normal(0.4 + 0.2 * labels, 0.3, size=(scorers, num_pairs)), 0, 1).round(digits)
    share = generator.random(scorers)
    return labels, scores, generator.choice([0.3, 0.5, 0.6], scorers), share / share.sum()


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_metrics_are_those_of_the_drawn_pairs(monkeypatch, digits):
    monkeypatch.setattr(significance, "CHUNK", 7)  # so that pairs and resamples come in several parts
    monkeypatch.setattr(significance, "BLOCK", 11)
    labels, scores, thresholds, share = cases(digits=digits)
    assert digits > 1 or len(np.unique(scores)) < 12  # ties
    counts = draw(len(labels), 20, 3)
    found = resampled_metrics(scores, thresholds, share, labels, counts)
    for resample, drawn in enumerate(counts):
        chosen = np.repeat(np.arange(len(labels)), drawn)
        assert len(chosen) == len(labels)
        said = scores >= thresholds[:, None]
        wanted = {
            "accuracy": [accuracy_score(labels[chosen], one[chosen]) for one in said],
            "f1": [f1_score(labels[chosen], one[chosen], zero_division=0) for one in said],
            "roc_auc": [roc_auc_score(labels[chosen], one[chosen]) for one in scores],
        }
        for metric, values in wanted.items():
            assert found[metric][resample] == pytest.approx(share @ values, abs=2e-6), metric


def test_one_class_alone_and_nothing_called_a_match():
    labels, scores = np.array([1, 0, 0]), np.array([[0.9, 0.2, 0.1]])
    counts = np.array([[3, 0, 0], [0, 2, 1], [1, 1, 1]], np.uint8)
    found = resampled_metrics(scores, np.array([0.95]), np.ones(1), labels, counts)
    assert np.isnan(found["roc_auc"]).tolist() == [True, True, False] and found["roc_auc"][2] == 1
    assert found["f1"].tolist() == [0, 0, 0]
    assert found["accuracy"].tolist() == pytest.approx([0, 1, 2 / 3])


def test_resamples_are_drawn_with_replacement_and_the_same_each_time():
    counts = draw(40, 3000, 0)
    assert counts.dtype == np.uint8 and (counts.sum(axis=1) == 40).all()
    np.testing.assert_array_equal(counts, draw(40, 3000, 0))
    assert (counts != draw(40, 3000, 1)).any()
    assert np.abs(counts.mean(axis=0) - 1).max() < 0.08  # every pair alike
    assert counts.var(axis=0).mean() == pytest.approx(1 - 1 / 40, abs=0.02)  # binomial


def test_the_p_value_and_the_interval_by_hand():
    assert two_sided_p(np.array([1.0] * 97 + [-1.0] * 2)) == 2 * 3 / 100
    assert two_sided_p(np.array([-1.0] * 99)) == 2 / 100  # never 0
    assert two_sided_p(np.zeros(99)) == 1 and two_sided_p(np.array([1.0, -1.0])) == 1
    assert two_sided_p(np.array([1.0] * 90 + [0.0] * 9)) == 2 * 10 / 100  # 0 is on both sides
    assert two_sided_p(np.array([np.nan, *[1.0] * 99])) == 2 / 100
    assert interval(np.array([*np.linspace(-1, 1, 41), np.nan])) == pytest.approx((-0.95, 0.95))
    assert difference(np.array([0.5 + 1e-8, 0.7]), np.array([0.5, 0.5])).tolist() == [0, pytest.approx(0.2)]


@pytest.mark.parametrize("metric", ["accuracy", "roc_auc"])
def test_scorers_of_one_distribution_differ_as_often_as_alpha_says(metric):
    generator, called, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        labels = generator.integers(2, size=120)
        scores = generator.normal(labels * 0.8 + generator.normal(size=120), size=(2, 1, 120))  # some pairs are hard
        counts = draw(120, 199, trial)
        found = [resampled_metrics(one, np.array([0.4]), np.ones(1), labels, counts)[metric] for one in scores]
        called += two_sided_p(difference(*found)) < 0.1
    assert 0.05 < called / trials < 0.15


def test_the_t_test_on_known_numbers():
    row_values, reference = [0.71, 0.74, 0.735, 0.72], [0.70, 0.72, 0.73, 0.715]
    differences = np.subtract(row_values, reference)
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert paired_t_test(row_values, reference) == pytest.approx(2 * stats.t.sf(t, df=3))
    assert paired_t_test([0.7], [0.6]) is None
    assert paired_t_test([0.7, 0.8], [0.6, 0.7]) is None  # the same difference twice


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.4]) == [0.8, None, 0.8] and holm([None]) == [None] and holm([]) == []
