"""What the report of a comparison finds among rows and pairs: sweeps, pairs won and lost, how far matrices agree."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from flipkd_dist.comparison import READINGS, Comparison, Matrix, Results, RowResult
from flipkd_dist.comparison_numbers import FLIP, scorings, table_of
from flipkd_dist.config import RunConfig
from flipkd_dist.pairs import PairTable


@dataclass(frozen=True)
class SweepPoint:
    value: float
    row: str


@dataclass(frozen=True)
class Sweep:
    key: str
    points: list[SweepPoint]  # values rising


@dataclass(frozen=True)
class JudgedPair:
    """A pair that one row judges better than the other; scores are means over checkpoints and seeds."""

    number: int
    id: str
    text_a: str
    text_b: str
    label: int
    before: float
    after: float
    gain: float  # of the right answer's score


def sweeps(comparison: Comparison, config: RunConfig | None = None) -> list[Sweep]:
    """The rows `flip-KEY-VALUE`, which are flip with one number changed, by their setting.

    Args:
        config: where flip's own value stands that no row overrides.
    """
    flip = comparison.row(FLIP)
    base = flip.row.overrides if flip else {}
    found: dict[str, list[SweepPoint]] = {}
    for row in (found.row for found in comparison.rows):
        changed = [key for key, value in row.overrides.items() if key not in base or base[key] != value]
        if len(changed) == 1 and row.name.startswith(f"{FLIP}-{changed[0]}-") and _is_point(row.overrides[changed[0]]):
            found.setdefault(changed[0], []).append(SweepPoint(float(row.overrides[changed[0]]), row.name))
    for key, points in found.items():
        own = base.get(key, _setting(config, key))
        if flip and _is_point(own):
            points.append(SweepPoint(float(own), FLIP))
        points.sort(key=lambda point: point.value)
    return [Sweep(key, points) for key, points in found.items()]


def _is_point(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _setting(config: RunConfig | None, key: str) -> object:
    found: object = config
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


def results_of(results: Results, row: str, reading: str, split: str = "test") -> RowResult | None:
    wanted = (row, reading, split)
    return next((found for found in results.rows if (found.name, found.reading, found.split) == wanted), None)


def sweep_values(sweep: Sweep, results: Results, reading: str, metric: str) -> np.ndarray:
    """Setting, mean and standard deviation (0 with one seed) of every point that has results, [points, 3]."""
    rows = [(point.value, results_of(results, point.row, reading)) for point in sweep.points]
    found = [(value, row.metrics[metric]) for value, row in rows if row and metric in row.metrics]
    kept = [(value, one.mean, one.std or 0.0) for value, one in found if _is_number(one.mean)]
    return np.array(kept).reshape(-1, 3)


def _is_number(value: float | None) -> bool:
    return value is not None and np.isfinite(value)


def agreement(matrix: Matrix) -> float | None:
    """Spearman's rank correlation of teacher and student off the diagonal; None where one of them is constant.

    Entries that the teacher does not know (NaN) are left out.
    """
    off = ~np.eye(len(matrix.teacher), dtype=bool) & ~np.isnan(matrix.teacher)
    teacher, student = matrix.teacher[off], matrix.student[off]
    if len(teacher) < 2 or np.ptp(teacher) == 0 or not np.ptp(student) > 0:
        return None
    return float(spearmanr(teacher, student).statistic)


def won_and_lost(comparison: Comparison, reference: str, count: int = 10) -> tuple[str, list[list[JudgedPair]]]:
    """The reading, and the pairs whose right answer flip makes most likely and most unlikely beside the reference.

    p(match) where both rows have it, else the similarity. Hard non-matches take part.
    """
    rows = [comparison.row(reference), comparison.row(FLIP)]
    table = table_of(comparison)
    for reading in READINGS:
        found = [scorings(row, reading) for row in rows]
        if table is None or any(scores is None for scores in found):
            continue
        before, after = (scores.mean(axis=0) for scores in found)
        gain = np.where(table.label == 1, after - before, before - after)
        order = np.argsort(-gain, kind="stable")
        won, lost = order[gain[order] > 0][:count], order[::-1][gain[order[::-1]] < 0][:count]
        return reading, [[_judged(table, n, before, after, gain) for n in numbers] for numbers in (won, lost)]
    return READINGS[0], [[], []]


def _judged(table: PairTable, number: int, before: np.ndarray, after: np.ndarray, gain: np.ndarray) -> JudgedPair:
    texts = (table.texts[table.text_a[number]], table.texts[table.text_b[number]])
    label = int(table.label[number])
    figures = (float(values[number]) for values in (before, after, gain))
    return JudgedPair(int(number), table.ids[number], *texts, label, *figures)
