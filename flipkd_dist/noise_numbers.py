"""The numbers of the noise report: ROC curve, histograms, and what each theta keeps.

Shapes: `kinds` are the similarities of positives, labelled negatives and off-diagonal pairs, three tensors.
"""

from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import torch
from sklearn.metrics import auc, roc_curve

from flipkd_dist.filter_shares import COUNTS_AS_MATCH, FilterShares, kept, shares_of

THETAS = (None, *(step / 10 for step in range(1, 10)))  # rows of the table
MOST_ROC_PAIRS = 100_000  # of each label; more are sampled
ROC_POINTS = 300  # that are drawn
BINS_PER_UNIT = 50  # of similarity
MOST_BINS = 200


@dataclass(frozen=True)
class ThetaRow:
    """What one theta keeps, and how far teacher and label agree on it."""

    threshold: float | None  # None: the filter is off
    shares: FilterShares
    agreement: float | None  # of the kept labelled pairs, the share on the label's side of 0.5
    agreement_best: float | None  # the same of the best threshold
    is_configured: bool
    is_suggested: bool


@dataclass(frozen=True, eq=False)
class Roc:
    false_positives: np.ndarray  # [at most ROC_POINTS] shares of the negatives, rising
    true_positives: np.ndarray  # shares of the positives
    auc: float
    is_sampled: bool  # from at most MOST_ROC_PAIRS pairs of each label


def point_of(kinds: list[torch.Tensor], threshold: float | None) -> tuple[float, float] | None:
    """(false positives, true positives) as shares, where a pair counts as a match from `threshold` on."""
    if threshold is None or not len(kinds[0]) or not len(kinds[1]):
        return None
    positives, negatives = ((values >= threshold).sum().item() / len(values) for values in kinds[:2])
    return negatives, positives


def agreement_of(kinds: list[torch.Tensor], theta: float | None, boundary: float | None) -> float | None:
    """Of the labelled pairs that `theta` keeps, the share whose similarity is on the label's side of `boundary`."""
    if boundary is None:
        return None
    num_kept, num_agreeing = 0, 0
    for values, match in zip(kinds[:2], COUNTS_AS_MATCH, strict=False):
        keep = kept(values, match, theta)
        num_kept += keep.sum().item()
        num_agreeing += (keep & ((values >= boundary) == match)).sum().item()
    return num_agreeing / num_kept if num_kept else None


def roc_of(kinds: list[torch.Tensor]) -> tuple[Roc | None, float | None]:
    """The curve of the labelled pairs, and the threshold that puts most of them on their label's side."""
    positives, negatives = (values.numpy() for values in kinds[:2])
    if not len(positives) or not len(negatives):
        return None, None
    generator = np.random.default_rng(0)
    sampled = [_sample(values, generator) for values in (positives, negatives)]
    labels = np.repeat([1, 0], list(map(len, sampled)))
    false, true, thresholds = roc_curve(labels, np.concatenate(sampled))
    right = true * len(positives) + (1 - false) * len(negatives)
    best = float(thresholds[1:][np.argmax(right[1:])])  # the first one is infinite: nothing matches
    if agreement_of(kinds, None, 0.5) >= agreement_of(kinds, None, best):
        best = 0.5
    drawn = np.unique(np.searchsorted(false + true, np.linspace(0, 2, ROC_POINTS)).clip(max=len(false) - 1))
    return Roc(false[drawn], true[drawn], float(auc(false, true)), len(labels) < len(positives) + len(negatives)), best


def _sample(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    if len(values) <= MOST_ROC_PAIRS:
        return values
    return values[generator.choice(len(values), MOST_ROC_PAIRS, replace=False, shuffle=False)]


def histograms_of(kinds: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts of bins that reach over [0, 1] and over every similarity, [bins + 1] and [3, bins]."""
    filled = [values.numpy() for values in kinds if len(values)]
    lowest = min([0.0, *(float(values.min()) for values in filled)])
    highest = max([1.0, *(float(values.max()) for values in filled)])
    lowest, highest = floor(lowest * 10 + 1e-3) / 10, ceil(highest * 10 - 1e-3) / 10  # rounding makes 1.0000001
    bins = min(round((highest - lowest) * BINS_PER_UNIT), MOST_BINS)

    def counts(values: np.ndarray) -> np.ndarray:  # 0.7 as fp32 lies below 0.7 and belongs above
        return np.histogram((values + 1e-6).clip(lowest, highest), bins, (lowest, highest))[0]

    return np.linspace(lowest, highest, bins + 1), np.stack([counts(values.numpy()) for values in kinds])


def rows_of(
    kinds: list[torch.Tensor], threshold: float | None, suggested: float | None, best: float | None
) -> list[ThetaRow]:
    """The table: the usual thetas, the configured and the suggested one among them."""
    thetas = sorted({*THETAS, threshold, suggested}, key=lambda theta: -1.0 if theta is None else theta)
    return [
        ThetaRow(
            theta,
            shares_of(kinds, theta),
            agreement_of(kinds, theta, 0.5),
            agreement_of(kinds, theta, best),
            is_configured=theta == threshold,
            is_suggested=theta == suggested,
        )
        for theta in thetas
    ]
