"""Scales by hand, Platt's curve against a minimiser of its own, and what is refused."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score

from flipkd_dist.calibration import Calibration, Meaning, fit, quality
from flipkd_dist.errors import UserError


def pair(k: int) -> str:
    return f"pair {k}"


def labelled(count: int = 400, seed: int = 0):
    generator = np.random.default_rng(seed)
    scores = generator.normal(3, 5, count)
    return scores, (generator.random(count) < 1 / (1 + np.exp(1.5 - 0.7 * scores))).astype(int)


def test_the_scales():
    scores = np.array([[-1.0, 0.25], [0.5, 1.0]], np.float32)
    cosine = Meaning("cosine").similarity(scores, pair)
    assert cosine.dtype == np.float32 and np.array_equal(cosine, scores)
    assert np.array_equal(Meaning("probability").similarity(scores[1], pair), scores[1])
    logits = np.array([-800.0, -2, 0, 2, 800], np.float32)
    found = Meaning("logit").similarity(logits, pair)
    np.testing.assert_allclose(found, [0, 1 / (1 + np.e**2), 0.5, 1 / (1 + np.e**-2), 1], rtol=1e-6)
    assert found.dtype == np.float32
    curve = Meaning("cosine", Calibration(2.0, -1.0)).similarity(scores, pair)
    np.testing.assert_allclose(curve, 1 / (1 + np.exp(1 - 2 * scores)), rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "scores"),
    [("cosine", [0.5, -1.01]), ("probability", [1, -0.01]), ("probability", [0, 1.01]), ("logit", [0, np.nan])],
)
def test_a_score_that_is_not_of_the_scale_is_named(scale, scores):
    for calibration in (None, Calibration(1.0, 0.0)):
        with pytest.raises(UserError, match=f"teacher.scale = {scale}: pair 1 has the score .*: set it to"):
            Meaning(scale, calibration).similarity(np.array(scores), pair)


def test_rounding_is_no_error():
    assert Meaning("cosine").similarity(np.array([1.0001, -1.0001]), pair).shape == (2,)


def test_platt_scaling_against_a_minimiser_of_its_own():
    scores, label = labelled()
    positive = label == 1
    target = np.where(positive, (positive.sum() + 1) / (positive.sum() + 2), 1 / ((~positive).sum() + 2))

    def loss(curve):
        logit = curve[0] * scores + curve[1]
        return np.sum(np.logaddexp(0, logit) - target * logit)

    best = minimize(loss, [0.1, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9, "maxiter": 5000}).x
    curve = fit(scores, label, "the teacher")
    np.testing.assert_allclose([curve.slope, curve.intercept], best, rtol=1e-4)
    assert 0.5 < curve.slope < 0.9 and -2.2 < curve.intercept < -0.8  # the labels were drawn with 0.7 and -1.5
    assert curve == fit(scores, label, "the teacher")


def test_calibration_is_monotone_and_makes_probabilities_better():
    scores, label = labelled()
    after = fit(scores, label, "the teacher").probability(scores)
    assert np.all(np.diff(after[np.argsort(scores)]) > 0)
    assert roc_auc_score(label, after) == roc_auc_score(label, scores)
    assert abs(after.mean() - label.mean()) < 0.01
    crooked = 1 / (1 + np.exp(-scores))
    brier = [float(quality(p, label).split()[2].rstrip(",")) for p in (crooked, after)]
    assert brier[1] < brier[0] - 0.01
    np.testing.assert_allclose(brier[1], np.mean((after - label) ** 2), atol=5e-5)


def test_any_unit_of_the_scores_gives_the_same_probabilities():
    scores, label = labelled()
    expected = fit(scores, label, "the teacher").probability(scores)
    for factor, shift in ((1e-3, 5.0), (1e4, -1e5)):
        moved = factor * scores + shift
        np.testing.assert_allclose(fit(moved, label, "the teacher").probability(moved), expected, atol=1e-5)


def test_separable_scores_keep_a_finite_slope():
    curve = fit([0.1, 0.2, 0.3, 0.7, 0.8, 0.9], [0, 0, 0, 1, 1, 1], "the teacher")
    assert 0 < curve.slope < 100 and 0.5 < curve.probability(0.9) < 0.95


def test_what_cannot_be_calibrated_is_refused():
    scores, label = labelled()
    with pytest.raises(UserError, match=r"scores of the teacher do not rise with the labels of data\.train"):
        fit(-scores, label, "the teacher")
    with pytest.raises(UserError, match="do not rise"):
        fit(np.full(4, 0.3), [0, 1, 0, 1], "the teacher")
    with pytest.raises(UserError, match="one class alone"):
        fit(scores, np.ones_like(label), "the teacher")
