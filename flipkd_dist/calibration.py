"""What a teacher's numbers mean: raw scores to the similarity alpha of FlipKD, by their scale or by a fitted curve."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from flipkd_dist.errors import UserError

# Smallest and largest score of a scale, and how far rounding may lead beyond them. A logit is any number.
RANGES = {"cosine": (-1.0, 1.0, 1e-3), "probability": (0.0, 1.0, 1e-6), "logit": (-np.inf, np.inf, 0.0)}


@dataclass(frozen=True)
class Calibration:
    """p(match) = sigmoid(slope * score + intercept)."""

    slope: float
    intercept: float

    def probability(self, scores: np.ndarray) -> np.ndarray:
        return expit(self.slope * np.asarray(scores, np.float64) + self.intercept)


@dataclass(frozen=True)
class Meaning:
    """How scores become similarities."""

    scale: str  # cosine, probability or logit
    calibration: Calibration | None = None  # takes the place of the scale

    def similarity(self, scores: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
        """alpha, float32 in the shape of the scores: the cosine, the probability, sigmoid(logit) or sigmoid(a s + b).

        Args:
            name: what the k-th score (flat) belongs to, for the error.
        Raises:
            UserError: a score that the scale does not have.
        """
        beyond = out_of_range(scores, self.scale)
        if beyond is not None:
            raise UserError(
                f"teacher.scale = {self.scale}: {name(beyond)} has the score {np.ravel(scores)[beyond]:g}: "
                "set it to the scale of the scores"
            )
        if self.calibration is not None:
            return self.calibration.probability(scores).astype(np.float32)
        return expit(scores).astype(np.float32) if self.scale == "logit" else np.asarray(scores, np.float32)


def out_of_range(scores: np.ndarray, scale: str) -> int | None:
    """The place (flat) of the first score that `scale` does not have, a NaN included; None if there is none."""
    low, high, slack = RANGES[scale]
    flat = np.ravel(scores)
    bad = ~((flat >= low - slack) & (flat <= high + slack)) | ~np.isfinite(flat)
    return int(np.argmax(bad)) if bad.any() else None


def fit(scores: np.ndarray, label: np.ndarray, what: str) -> Calibration:
    """Platt scaling of labelled scores (both [N]), with Platt's softened targets, so that separable data stay finite.

    Args:
        what: whose scores they are, for the errors.
    Raises:
        UserError: one class only, or scores that do not rise with the label.
    Source: Platt, "Probabilistic outputs for support vector machines", 1999.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(label) == 1
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        raise UserError("teacher.calibrate: data.train has pairs of one class alone: add the other or set it to false")
    target = np.where(positive, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    centre, spread = scores.mean(), scores.std()
    slope = 0.0
    if spread > 0:
        unit = np.tile((scores - centre) / spread, 2).reshape(-1, 1)
        classes, weights = np.repeat([1, 0], len(scores)), np.concatenate([target, 1 - target])
        # Each pair stands in both classes, weighted by its target; the penalty is as good as none.
        curve = LogisticRegression(C=1e10, tol=1e-8, max_iter=1000).fit(unit, classes, sample_weight=weights)
        slope = float(curve.coef_[0, 0] / spread)
    if slope <= 0:
        raise UserError(
            f"teacher.calibrate: the scores of {what} do not rise with the labels of data.train (slope {slope:.3g}): "
            "turn the labels or the scores round, or take another teacher"
        )
    return Calibration(slope, float(curve.intercept_[0] - slope * centre))


def quality(similarity: np.ndarray, label: np.ndarray) -> str:
    """Brier score and ROC-AUC of similarities as probabilities of a match, for the log."""
    brier = brier_score_loss(label, np.clip(np.asarray(similarity, np.float64), 0, 1))
    return f"Brier score {brier:.4f}, ROC-AUC {roc_auc_score(label, similarity):.4f}"
