"""The paired bootstrap over test pairs, the paired t-test over seeds, and the correction for many rows.

A resample is a row of counts: how often each pair was drawn. Every row of a table is weighed with the same counts, so
that what two rows share (easy pairs, wrong labels) falls out of their difference.

Shapes: n pairs, p of them matching and q not; S scorers, each a checkpoint of a run; B resamples.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 15.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import ttest_rel

ROUNDING = 1e-6  # a difference below it is none: sums in fp32 end there
CHUNK = 512  # resamples at once
BLOCK = 1024  # matching pairs at once


def draw(num_pairs: int, count: int, seed: int) -> np.ndarray:
    """How often each resample has each pair: uint8 [B, n]."""
    generator = np.random.default_rng(seed)
    counts = np.empty((count, num_pairs), np.uint8)
    for part in _parts(count, CHUNK):
        rows = part.stop - part.start
        places = generator.integers(num_pairs, size=(rows, num_pairs)) + num_pairs * np.arange(rows)[:, None]
        counts[part] = np.bincount(places.ravel(), minlength=rows * num_pairs).reshape(rows, num_pairs)
    return counts


def resampled_metrics(
    scores: np.ndarray, thresholds: np.ndarray, share: np.ndarray, labels: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Accuracy, F1 and ROC-AUC of every resample, averaged over the scorers inside it: float64 [B] each.

    Args:
        scores: [S, n].
        thresholds: [S]; a score that reaches it says match.
        share: [S], a scorer's weight in the average; they add up to 1.
        labels: [n], 1 = match.
        counts: [B, n], see `draw`.
    Returns:
        ROC-AUC is NaN where a resample has one class alone.
    """
    said = scores >= thresholds[:, None]
    right = (said & (labels == 1)).T.astype(np.float32)  # [n, S]
    said = said.T.astype(np.float32)
    accuracy, f1 = np.empty(len(counts)), np.empty(len(counts))
    for part in _parts(len(counts), CHUNK):
        drawn = counts[part].astype(np.float32)
        num_right, num_said, num_match = (drawn @ which for which in (right, said, labels[:, None].astype(np.float32)))
        accuracy[part] = (1 - (num_said + num_match - 2 * num_right) / len(labels)) @ share
        f1[part] = (2 * num_right / np.maximum(num_said + num_match, 1)) @ share
    return {"accuracy": accuracy, "f1": f1, "roc_auc": _resampled_auc(scores, share, labels, counts)}


def _resampled_auc(scores: np.ndarray, share: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """ROC-AUC is the share of (match, non-match) that are in order, a tie counting half.

    It is linear in that table of p x q entries, so the scorers' tables are averaged first, and each resample multiplies
    the mean: 25 scorers cost about what one does.
    """
    match, other = labels == 1, labels != 1
    in_order = np.zeros(len(counts))
    for rows in _parts(int(match.sum()), BLOCK):
        won = np.zeros((rows.stop - rows.start, int(other.sum())), np.float32)
        for values, weight in zip(scores, share, strict=True):
            higher, lower = values[match][rows, None], values[other]
            won += np.float32(weight / 2) * ((higher > lower).astype(np.float32) + (higher >= lower))
        for part in _parts(len(counts), CHUNK):
            matches = counts[part][:, match][:, rows].astype(np.float32)
            in_order[part] += ((matches @ won).astype(np.float64) * counts[part][:, other]).sum(axis=1)
    possible = counts[:, match].sum(axis=1, dtype=np.float64) * counts[:, other].sum(axis=1, dtype=np.float64)
    return np.divide(in_order, possible, out=np.full(len(counts), np.nan), where=possible > 0)


def difference(row: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """In every resample [B]; what is mere rounding is 0."""
    found = row - reference
    return np.where(np.abs(found) < ROUNDING, 0.0, found)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval; resamples without a value are left out."""
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    return float(low), float(high)


def two_sided_p(differences: np.ndarray) -> float:
    """Twice the share of resamples on the rarer side of 0, those at 0 on both; never 0, and 1 where nothing differs."""
    known = differences[~np.isnan(differences)]
    below, above = (known <= 0).sum(), (known >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(known) + 1)))


def paired_t_test(row: Sequence[float], reference: Sequence[float]) -> float | None:
    """Two-tailed p; None with fewer than two pairs of values, or where all differ by the same."""
    if len(row) < 2 or np.ptp(np.subtract(row, reference)) < 1e-12:
        return None
    return float(ttest_rel(row, reference).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Each p-value, corrected for the number of them; None stays None and does not count.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[place] = largest
    return corrected


def _parts(total: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, total)) for at in range(0, total, size)]
