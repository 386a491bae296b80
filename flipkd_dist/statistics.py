"""`compare_rows(comparison)`: every row of the table against the reference row, by seeds and by test pairs.

The protocol (FlipKD, section 4): each of a run's best checkpoints has its own thresholds, found on validation; a run's
figure is the mean over its checkpoints, a row's the mean over its runs. docs/statistics.md says what the tests mean.

Shapes: N pairs of the test split, n of them in a table; k checkpoints of a run, S of all runs of a row.
"""

import logging
import math
from dataclasses import dataclass, replace

import numpy as np

from flipkd_dist.comparison import (
    DECIDING_SEEDS,
    METRICS,
    READING_NAMES,
    READINGS,
    REFERENCE,
    Comparison,
    MetricResult,
    Results,
    Row,
    RowResult,
    RowScores,
    RunScores,
)
from flipkd_dist.comparison_numbers import uneven_checkpoints
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import binary_metrics, parts_by_kind, thresholds_from
from flipkd_dist.pairs import PairTable
from flipkd_dist.significance import difference, draw, holm, interval, paired_t_test, resampled_metrics, two_sided_p

logger = logging.getLogger("flipkd_dist")
RESAMPLES = 10_000
WIDTH = 28  # of a row's name, and of longer ones what the longest has


@dataclass(frozen=True, eq=False)
class _Answers:
    """What a row says of the n pairs of one table."""

    row: Row
    seeds: list[int]
    values: dict[str, list[float]]  # metric -> a value per seed
    scores: np.ndarray  # [S, n]
    thresholds: np.ndarray  # [S]
    share: np.ndarray  # [S], of a checkpoint in the row's mean


def compare_rows(comparison: Comparison, alpha: float = 0.01, resamples: int | None = None, seed: int = 0) -> Results:
    """Means, differences from the reference row, p-values and verdicts for every table, reading and metric.

    Args:
        alpha: level of significance; the paper's is 0.01.
        resamples: of test pairs; None for 10,000, or as many as so many rows need.
        seed: of the resampling, the only source of chance.
    Raises:
        UserError: so few resamples that no row could ever be called different.
    """
    results, num_tested = [], len(comparison.rows) - 1
    fewest = math.floor(2 * num_tested / alpha)
    resamples = max(RESAMPLES, fewest) if resamples is None else resamples
    if resamples < fewest:
        raise UserError(
            f"resamples: with {resamples} no p-value corrected for {num_tested} rows can fall below {alpha}: "
            f"take {fewest} or more"
        )
    if note := uneven_checkpoints(comparison):
        logger.warning("warning: %s", note)
    pairs = comparison.pairs.get("test")
    for split, part in parts_by_kind(pairs, "test").items() if pairs is not None else ():
        counts = draw(int(part.sum()), resamples, seed)
        for reading in READINGS:
            found = [_answers(row, reading, comparison.pairs, part) for row in comparison.rows]
            answers = [one for one in found if one is not None]
            figures = _figures(answers, pairs.label[part], counts, alpha)
            results += [
                RowResult(one.row.name, one.row.title, reading, split, metrics)
                for one, metrics in zip(answers, figures, strict=True)
            ]
    return Results(results, REFERENCE, alpha, resamples)


def run_thresholds(run: RunScores, reading: str, validation: PairTable | None) -> np.ndarray:
    """Of each checkpoint, from the run's own validation scores alone: float64 [k]; 0.5 without validation pairs."""
    scores = run.scores[reading].get("validation")
    if validation is None or scores is None:
        return np.full(len(run.scores[reading]["test"]), 0.5)
    return np.array([thresholds_from({reading: values}, validation)[reading] for values in scores])


def _finite(run: RunScores, reading: str) -> dict[str, np.ndarray]:
    """The scores of the checkpoints that are finite throughout, by split; {} where there are none."""
    scores = run.scores.get(reading, {})
    if "test" not in scores:
        return {}
    sound = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in scores.values()])
    return {split: values[sound] for split, values in scores.items()} if sound.any() else {}


def _answers(found: RowScores, reading: str, pairs: dict[str, PairTable], part: np.ndarray) -> _Answers | None:
    """None for a row without this reading, or without a run.

    Args:
        part: bool [N], the test pairs of the table.
    """
    runs = [replace(run, scores={reading: scores}) for run in found.runs if (scores := _finite(run, reading))]
    labels = pairs["test"].label[part]
    if not runs or not len(labels):
        return None
    if lost := len(found.runs) - len(runs):
        logger.warning("warning: %s: %d of %d runs have no finite %s", found.row.name, lost, len(found.runs), reading)
    scores = [run.scores[reading]["test"][:, part] for run in runs]
    thresholds = [run_thresholds(run, reading, pairs.get("validation")) for run in runs]
    values: dict[str, list[float]] = {}
    for answers, limits in zip(scores, thresholds, strict=True):
        every = [binary_metrics(one, labels, limit) for one, limit in zip(answers, limits, strict=True)]
        for metric in METRICS:
            if every[0][metric] is not None:  # ROC-AUC of labels that are all alike
                values.setdefault(metric, []).append(float(np.mean([one[metric] for one in every])))
    share = [np.full(len(one), 1 / (len(one) * len(runs))) for one in scores]
    joined = (np.concatenate(parts) for parts in (scores, thresholds, share))
    return _Answers(found.row, [run.seed for run in runs], values, *joined)


def _figures(
    answers: list[_Answers], labels: np.ndarray, counts: np.ndarray, alpha: float
) -> list[dict[str, MetricResult]]:
    """Of each row, by metric."""
    metrics = [metric for metric in METRICS if answers and metric in answers[0].values]
    figures = [{metric: _summary(found.values[metric]) for metric in metrics} for found in answers]
    reference = next((found for found in answers if found.row.name == REFERENCE), None)
    if reference is None:
        return figures
    resampled = [resampled_metrics(one.scores, one.thresholds, one.share, labels, counts) for one in answers]
    base, tested = resampled[answers.index(reference)], [n for n, one in enumerate(answers) if one is not reference]
    for metric in metrics:
        results = [figures[number][metric] for number in tested]
        differences = [difference(resampled[number][metric], base[metric]) for number in tested]
        by_seed = [common_seeds(answers[number], reference, metric) for number in tested]
        p_seeds = [paired_t_test(*values) for values in by_seed]
        has_say = [len(values) >= DECIDING_SEEDS for values, _ in by_seed]
        mean = figures[answers.index(reference)][metric].mean
        for number, result in zip(tested, against(mean, results, differences, p_seeds, has_say, alpha), strict=True):
            figures[number][metric] = result
    return figures


def against(
    reference: float,
    results: list[MetricResult],
    differences: list[np.ndarray],
    p_seeds: list[float | None],
    has_say: list[bool],
    alpha: float,
) -> list[MetricResult]:
    """One metric of all tested rows, with the tests' results corrected for their number.

    Args:
        reference: the reference row's mean.
        differences: from the reference row in every resample [B], a row each.
        p_seeds: of the t-test, where it can be made.
        has_say: where the t-test has seeds enough to have its say in the verdict.
    """
    p_pairs = [two_sided_p(values) for values in differences]
    found = []
    corrected = zip(holm(p_pairs), holm(p_seeds), strict=True)
    for number, (result, (by_pairs, by_seeds)) in enumerate(zip(results, corrected, strict=True)):
        deciding = max(by_pairs, by_seeds) if has_say[number] and by_seeds is not None else by_pairs
        change = result.mean - reference
        verdict = "no difference" if deciding >= alpha else "better" if change > 0 else "worse"
        low, high = interval(differences[number])
        found.append(
            replace(
                result,
                difference=change,
                low=low,
                high=high,
                p_seeds=p_seeds[number],
                p_pairs=p_pairs[number],
                p_corrected=deciding,
                verdict=verdict,
            )
        )
    return found


def _summary(values: list[float]) -> MetricResult:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return MetricResult(float(np.mean(values)), std, values)


def common_seeds(row: _Answers, reference: _Answers, metric: str) -> tuple[list[float], list[float]]:
    """The values of a metric for the seeds that both rows have."""
    mine, theirs = (dict(zip(one.seeds, one.values[metric], strict=True)) for one in (row, reference))
    seeds = sorted(mine.keys() & theirs.keys())
    return [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]


def table(results: Results) -> str:
    """Fixed-width text for a terminal: a block for every table, reading and metric.

    Pairs without the hard non-matches come first.
    """
    blocks: dict[tuple[str, str, str], list[RowResult]] = {}
    for found in results.rows:
        for metric in METRICS:
            if metric in found.metrics:
                blocks.setdefault((found.split, found.reading, metric), []).append(found)
    parts, width = [], max([WIDTH, *(len(found.name) for found in results.rows)])
    for (split, reading, metric), rows in blocks.items():
        parts.append(
            f"{f'{split}, {READING_NAMES[reading]}':<{width + 14}}{'mean':>8}{'sd':>8}{'difference':>12}"
            f"{'95 % interval':>20}{'p':>8}  verdict"
        )
        parts += [f"{row.name:<{width}}  {metric:<12}{_line(row.metrics[metric])}".rstrip() for row in rows]
        parts.append("")
    parts.append(
        f"difference: from {results.reference}. p: two-sided, corrected for the number of rows; below "
        f"{results.alpha:g} a row is better or worse."
    )
    return "\n".join(parts)


def _line(value: MetricResult) -> str:
    sd = "-" if value.std is None else f"{value.std:.4f}"
    text = f"{value.mean:>8.4f}{sd:>8}"
    if value.verdict is None:
        return text
    interval = f"{value.low:+.4f} {value.high:+.4f}"
    return f"{text}{value.difference:>+12.4f}{interval:>20}{value.p_corrected:>8.4f}  {value.verdict}"
