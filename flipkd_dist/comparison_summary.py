"""All that a comparison's report says, as one value that pages are made of."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from flipkd_dist.comparison import (
    DECIDING_SEEDS,
    READINGS,
    TELLING_SEEDS,
    WITHOUT_P_MATCH,
    Comparison,
    MetricResult,
    Results,
    Row,
    RowScores,
)
from flipkd_dist.comparison_finds import JudgedPair, agreement, results_of, sweeps, won_and_lost
from flipkd_dist.comparison_numbers import (
    FLIP,
    Reliability,
    curves,
    distributions,
    is_cosine_alone,
    not_finite,
    reliability,
    table_of,
    uneven_checkpoints,
)
from flipkd_dist.comparison_plots import Drawn
from flipkd_dist.comparison_words import headline
from flipkd_dist.config import RunConfig
from flipkd_dist.evaluate import hard_negatives

LIBRARIES = ("flipkd_dist", "torch", "transformers", "peft", "scikit-learn", "scipy", "numpy")
SPLIT_TITLES = {"test": "Test pairs", "test_hard": "Matches and hard non-matches"}


@dataclass(frozen=True)
class Line:
    """A row in a table; `metrics` is empty where it failed."""

    name: str
    title: str
    metrics: dict[str, MetricResult]
    failure: str | None = None


@dataclass(frozen=True)
class Table:
    split: str
    reading: str
    lines: list[Line]


@dataclass(frozen=True)
class CostLine:
    """Means over a row's runs."""

    name: str
    title: str
    seconds: float
    tokens: float
    peak_memory: float  # bytes
    trainable_parameters: float


@dataclass(frozen=True)
class Summary:
    name: str
    reference: str
    alpha: float
    headline: list[str]
    notes: list[str]
    facts: dict[str, str]
    tables: list[Table]
    rows: list[Row]
    costs: list[CostLine]
    drawn: Drawn
    agreements: dict[str, float]  # rank correlation of matrices with the teacher's, by row
    reliability: Reliability | None  # of flip, else of the reference
    judged_by: str  # the reading
    won: list[JudgedPair]
    lost: list[JudgedPair]
    config: str  # YAML; "" where it is not given


def summarise(
    comparison: Comparison,
    results: Results,
    config: RunConfig | None = None,
    failures: dict[str, str] | None = None,
    date: str = "",
) -> Summary:
    """
    Args:
        failures: by row: why it has no runs, or fewer than the others.
        date: of the report, as it is to be shown.
    """
    failures = failures or {}
    main, before = [results.reference, FLIP], "untrained" if comparison.row("untrained") else results.reference
    lines = {reading: curves(comparison, ["teacher", *main], reading) for reading in READINGS}
    calibrated = [one for row in main if (one := reliability(comparison, row))]
    matrices = {n: m for n in dict.fromkeys([before, *main]) if (m := comparison.matrices.get(n)) is not None}
    judged_by, (won, lost) = won_and_lost(comparison, results.reference)
    return Summary(
        name=comparison.name,
        reference=results.reference,
        alpha=results.alpha,
        headline=headline(results),
        notes=_notes(comparison, results, failures),
        facts=_facts(comparison, results, date),
        tables=_tables(comparison, results, failures),
        rows=[row.row for row in comparison.rows],
        costs=[line for row in comparison.rows if (line := _cost(row))],
        drawn=Drawn(
            distributions={r: distributions(comparison, list(dict.fromkeys([before, FLIP])), r) for r in READINGS},
            roc={reading: found[0] for reading, found in lines.items()},
            precision={reading: found[1] for reading, found in lines.items()},
            reliability=calibrated,
            sweeps=sweeps(comparison, config),
            matrices=matrices,
            results=results,
        ),
        agreements={n: found for n, matrix in matrices.items() if (found := agreement(matrix)) is not None},
        reliability=calibrated[-1] if calibrated else None,
        judged_by=judged_by,
        won=won,
        lost=lost,
        config=config.to_yaml() if config else "",
    )


def _tables(comparison: Comparison, results: Results, failures: dict[str, str]) -> list[Table]:
    tables = []
    for split in SPLIT_TITLES:
        for reading in READINGS:
            lines = [_line(row, results, failures, reading, split) for row in comparison.rows]
            if any(line and line.metrics for line in lines):
                tables.append(Table(split, reading, [line for line in lines if line]))
    return tables


def _line(row: RowScores, results: Results, failures: dict[str, str], reading: str, split: str) -> Line | None:
    """None where the row has no such reading."""
    name, title = row.row.name, row.row.title
    found = results_of(results, name, reading, split)
    if found is not None:
        return Line(name, title, found.metrics, failures.get(name))
    if row.runs or (reading == "p_match" and row.row.kind in WITHOUT_P_MATCH):
        return None
    return Line(name, title, {}, failures.get(name, "no run has finished"))


def _notes(comparison: Comparison, results: Results, failures: dict[str, str]) -> list[str]:
    """What a reader has to know before the figures."""
    notes = [f"{name} failed: {reason}" for name, reason in failures.items()]
    notes += [f"{row.row.name} has no run" for row in comparison.rows if not row.runs and row.row.name not in failures]
    notes += [
        f"{name}: {number} scorings with scores that are not finite are left out of the plots"
        for name, number in not_finite(comparison).items()
    ]
    seeds = [len(row.runs) for row in comparison.rows if row.row.name in (FLIP, results.reference)]
    if seeds and min(seeds) < DECIDING_SEEDS:
        notes.append(
            f"with fewer than {DECIDING_SEEDS} seeds the verdict rests on the test pairs alone: whether another seed "
            "would say the same is not known"
        )
    elif seeds and min(seeds) < TELLING_SEEDS:
        notes.append(
            f"with {min(seeds)} seeds the t-test can hardly reach {results.alpha:g}: large differences may stand as "
            f"no difference; take {TELLING_SEEDS}"
        )
    if note := uneven_checkpoints(comparison):
        notes.append(note)
    table = table_of(comparison)
    if table is None or not len(table):
        notes.append("there are no test pairs")
    elif len(set(table.label[~hard_negatives(table)].tolist())) < 2:
        notes.append("the test pairs are of one class, so there are no curves and no ROC-AUC")
    if comparison.pairs.get("validation") is None:
        notes.append("there are no validation pairs, so every threshold is 0.5")
    if is_cosine_alone(comparison):
        notes.append("each text was read alone: p(match) is (1 + cosine) / 2, not a probability of its own")
    return notes


def _facts(comparison: Comparison, results: Results, date: str) -> dict[str, str]:
    runs = [run for row in comparison.rows if row.row.kind == "student" for run in row.runs]
    seeds, steps = sorted({run.seed for run in runs}), sorted({len(run.steps) for run in runs})
    facts = {"seeds": ", ".join(map(str, seeds)) or "none"}
    for split, table in comparison.pairs.items():
        if table is not None:
            hard = int(hard_negatives(table).sum())
            text = f"{len(table):,} ({int((table.label == 1).sum()):,} match"
            facts[f"{split} pairs"] = text + (f", {hard:,} hard non-matches)" if hard else ")")
    if steps:
        facts["checkpoints averaged"] = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    has_validation = comparison.pairs.get("validation") is not None
    facts["thresholds"] = "best F1 on validation pairs" if has_validation else "0.5"
    facts["resamples of test pairs"] = f"{results.resamples:,}"
    facts["level of significance"] = f"{results.alpha:g}"
    facts["versions"] = ", ".join([f"Python {platform.python_version()}", *map(_version, LIBRARIES)])
    return {**facts, "date": date} if date else facts


def _version(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return f"{library} (not installed)"


def _cost(row: RowScores) -> CostLine | None:
    costs = [run.cost for run in row.runs if run.cost is not None]
    if not costs:
        return None
    figures = [(c.seconds, c.tokens, c.peak_memory, c.trainable_parameters) for c in costs]
    return CostLine(row.row.name, row.row.title, *np.mean(figures, axis=0).tolist())
