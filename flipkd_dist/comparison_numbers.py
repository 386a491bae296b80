"""What the report of a comparison draws: distributions of scores, curves, calibration.

Shapes: N pairs of the test split, R scorings of them (checkpoints of all seeds of a row). Hard non-matches are left out
of curves and calibration, as they are of the headline.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from flipkd_dist.comparison import READINGS, Comparison, RowScores
from flipkd_dist.evaluate import hard_negatives
from flipkd_dist.pairs import PairTable

FLIP = "flip"
GRID = np.linspace(0, 1, 101)  # of the averaged curves
BINS = 10  # of the calibration
KINDS = ("matches", "non-matches", "hard non-matches")


@dataclass(frozen=True, eq=False)
class Distribution:
    """Shares of each kind's pairs by score, over all scorings of a row."""

    row: str
    edges: np.ndarray  # [bins + 1]
    shares: list[np.ndarray | None]  # of KINDS, [bins] each; None: no such pair


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean over the scorings of a row, and the lowest and highest of them, at GRID."""

    row: str
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    area: float  # ROC-AUC or average precision, a mean over scorings


@dataclass(frozen=True, eq=False)
class Reliability:
    """Mean p(match) against the share of matches, in bins of equal width; nan where a bin is empty."""

    row: str
    mean: np.ndarray  # [BINS]
    matches: np.ndarray  # [BINS]
    pairs: np.ndarray  # [BINS], a mean over scorings
    error: float  # ECE, a mean over scorings


def table_of(comparison: Comparison) -> PairTable | None:
    return comparison.pairs.get("test")


def scorings(row: RowScores | None, reading: str) -> np.ndarray | None:
    """The test scores of all runs and checkpoints that are finite, [R, N]; None where there is none."""
    found = [run.scores[reading]["test"] for run in row.runs if "test" in run.scores.get(reading, {})] if row else []
    stacked = np.concatenate([np.atleast_2d(scores) for scores in found]) if found else np.zeros((0, 0))
    stacked = stacked[np.isfinite(stacked).all(axis=1)]
    return stacked if stacked.size else None


def not_finite(comparison: Comparison) -> dict[str, int]:
    """By row: scorings of the test pairs that `scorings` leaves out."""
    lost = {}
    for row in comparison.rows:
        for run in row.runs:
            broken = [~np.isfinite(np.atleast_2d(s["test"])).all(axis=1) for s in run.scores.values() if "test" in s]
            lost[row.row.name] = lost.get(row.row.name, 0) + (int(np.any(broken, axis=0).sum()) if broken else 0)
    return {name: number for name, number in lost.items() if number}


def uneven_checkpoints(comparison: Comparison) -> str | None:
    """What a reader has to know where students' runs do not average equally many checkpoints."""
    numbers = {
        f"{row.row.name} seed {run.seed}": len(run.steps)
        for row in comparison.rows
        if row.row.kind == "student"
        for run in row.runs
    }
    most = max(numbers.values(), default=0)
    fewer = [f"{name} of {number}" for name, number in numbers.items() if number < most]
    if not fewer:
        return None
    others = f" and {len(fewer) - 3} more" if len(fewer) > 3 else ""
    return f"runs are means over {most} checkpoints, but {', '.join(fewer[:3])}{others}: fewer were kept or made"


def is_cosine_alone(comparison: Comparison) -> bool:
    """Whether p(match) of flip is (1 + cosine) / 2 and says nothing of its own."""
    row = comparison.row(FLIP)
    p_match, similarity = (scorings(row, reading) for reading in READINGS)
    if p_match is None or similarity is None or p_match.shape != similarity.shape:
        return False
    return bool(np.allclose(p_match, (1 + similarity) / 2, atol=1e-4))


def distributions(comparison: Comparison, rows: list[str], reading: str, bins: int = 40) -> list[Distribution]:
    """Of every row that has this reading, in bins that reach over the scores of all of them."""
    table = table_of(comparison)
    found = {name: scorings(comparison.row(name), reading) for name in rows}
    found = {name: scores for name, scores in found.items() if scores is not None}
    if table is None or not found:
        return []
    lowest = min([0.0, *(scores.min() for scores in found.values())])
    highest = max([1.0, *(scores.max() for scores in found.values())])
    edges = np.linspace(lowest, highest, bins + 1)
    hard = hard_negatives(table)
    masks = (table.label == 1, (table.label == 0) & ~hard, hard)
    return [
        Distribution(name, edges, [_shares(scores[:, mask], edges) for mask in masks]) for name, scores in found.items()
    ]


def _shares(scores: np.ndarray, edges: np.ndarray) -> np.ndarray | None:
    return np.histogram(scores, edges)[0] / scores.size if scores.size else None


def curves(comparison: Comparison, rows: list[str], reading: str) -> tuple[list[Curve], list[Curve]]:
    """ROC and precision-recall curves; of a row without this reading (a teacher) those of its similarity.

    Returns:
        Two empty lists where the pairs are of one class.
    """
    table = table_of(comparison)
    easy = ~hard_negatives(table) if table is not None else None
    if table is None or len(set(table.label[easy].tolist())) < 2:
        return [], []
    roc, precision = [], []
    for name in rows:
        row = comparison.row(name)
        scores = scorings(row, reading)
        if scores is None and row is not None and row.row.kind == "teacher":
            scores = scorings(row, "similarity")
        if scores is not None:
            roc.append(_mean_curve(name, table.label[easy], scores[:, easy], _roc_at_grid, roc_auc_score))
            precision.append(
                _mean_curve(name, table.label[easy], scores[:, easy], _precision_at_grid, average_precision_score)
            )
    return roc, precision


def _mean_curve(name, label, scores, at_grid, area) -> Curve:
    found = np.stack([at_grid(label, one) for one in scores])
    areas = [area(label, one) for one in scores]
    return Curve(name, found.mean(axis=0), found.min(axis=0), found.max(axis=0), float(np.mean(areas)))


def _roc_at_grid(label: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Share of matches found at each share of false alarms; a jump counts from its foot on."""
    false, true, _ = roc_curve(label, scores)
    last = np.concatenate([false[1:] > false[:-1], [True]])  # the highest point over each false share
    return np.concatenate([[0.0], np.interp(GRID[1:], false[last], true[last])])


def _precision_at_grid(label: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The precision at the highest threshold that finds at least each share of matches."""
    precision, recall, _ = precision_recall_curve(label, scores)
    at = np.searchsorted(recall[:-1][::-1], GRID - 1e-12).clip(max=len(recall) - 2)
    return precision[:-1][::-1][at]


def reliability(comparison: Comparison, row: str) -> Reliability | None:
    """Calibration of p(match), which has to lie in [0, 1].

    Source: expected calibration error with bins of equal width (Guo et al. 2017, arXiv 1706.04599, Eq 3).
    """
    table, scores = table_of(comparison), scorings(comparison.row(row), "p_match")
    if table is None or scores is None:
        return None
    easy = ~hard_negatives(table)
    scores, label = scores[:, easy], table.label[easy]
    if not len(label):
        return None
    bins = np.clip((scores * BINS).astype(int), 0, BINS - 1)
    cells = bins + BINS * np.arange(len(scores))[:, None]

    def sums(values: np.ndarray) -> np.ndarray:  # [R, BINS]
        weights = np.broadcast_to(values, scores.shape).ravel()
        return np.bincount(cells.ravel(), weights, BINS * len(scores)).reshape(len(scores), BINS)

    pairs, probability, matches = sums(np.ones(1)), sums(scores), sums(label.astype(float))
    with np.errstate(invalid="ignore"):
        mean, share = probability.sum(axis=0) / pairs.sum(axis=0), matches.sum(axis=0) / pairs.sum(axis=0)
    error = np.abs(probability - matches).sum(axis=1) / len(label)
    return Reliability(row, mean, share, pairs.mean(axis=0), float(error.mean()))
