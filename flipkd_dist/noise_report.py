"""Whether a teacher's similarities fit the labels and the noise filter: the numbers of the report, and it as text.

Shapes: N labelled pairs, K off-diagonal ones; kinds of pair are positives, labelled negatives, off-diagonal pairs.
"""

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from math import ceil

import numpy as np

from flipkd_dist.contradictions import ContradictoryPair
from flipkd_dist.filter_shares import FEW, GRID, KINDS, RULE, FilterShares, kinds_of, shares_of, suggestion
from flipkd_dist.noise_numbers import (
    MOST_ROC_PAIRS,
    Roc,
    ThetaRow,
    agreement_of,
    histograms_of,
    point_of,
    roc_of,
    rows_of,
)

SHOWN_AS_TEXT = 3  # contradictory pairs
WIDTH = 80  # columns of a terminal


@dataclass(frozen=True, eq=False)
class NoiseReport:
    num_pairs: tuple[int, int, int]  # of each kind
    medians: tuple[float | None, float | None, float | None]  # similarity of each kind
    edges: np.ndarray  # [bins + 1] of the histograms
    counts: np.ndarray  # [3, bins] pairs of each kind
    roc: Roc | None  # None: the pairs are of one class
    agreement: float | None  # share of labelled pairs on the label's side of 0.5
    best_threshold: float | None  # where most labelled pairs are on the label's side
    agreement_best: float | None
    half_point: tuple[float, float] | None  # (false positives, true positives) at 0.5
    best_point: tuple[float, float] | None
    threshold: float | None  # the configured theta; None: the filter is off
    suggested: float | None  # None: switch the filter off
    rows: list[ThetaRow]  # empty where there is no pair
    kept: np.ndarray  # [len(GRID), 3] shares of each kind, nan where there is none
    worst: list[ContradictoryPair]
    facts: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    def configured_shares(self) -> FilterShares:
        return next((row.shares for row in self.rows if row.is_configured), FilterShares(None, None, None))

    def lines(self) -> list[str]:
        """The report for a terminal; what is worth a warning comes last and starts with "warning:"."""
        return [
            *_fact_lines(self.facts),
            f"teacher similarity of {self.num_pairs[0] + self.num_pairs[1]:,} labelled pairs:",
            *_histogram_lines(self),
            *_quality_lines(self),
            *_theta_lines(self),
            *_pair_lines(self.worst),
            _filter_line(self),
            *(f"warning: {warning}" for warning in self.warnings),
        ]


def noise_report(
    similarity: np.ndarray,
    label: np.ndarray,
    off_diagonal: np.ndarray,
    threshold: float | None,
    worst: Sequence[ContradictoryPair] = (),
    facts: dict[str, str] | None = None,
) -> NoiseReport:
    """Everything that the report says; similarities that are not finite are left out with a warning.

    Args:
        similarity, label, off_diagonal, threshold: as for `filter_shares`.
        worst: the most contradictory pairs, as `ContradictoryPairs.worst` gives them.
        facts: what to say about the teacher, name to value.
    """
    similarity, label, off_diagonal = np.asarray(similarity), np.asarray(label), np.asarray(off_diagonal)
    finite, finite_off = np.isfinite(similarity), np.isfinite(off_diagonal)
    num_lost = int((~finite).sum() + (~finite_off).sum())
    if num_lost:
        similarity, label, off_diagonal = similarity[finite], label[finite], off_diagonal[finite_off]
    kinds = kinds_of(similarity, label, off_diagonal)
    grid = [shares_of(kinds, float(theta)) for theta in GRID]
    suggested = suggestion(grid) if any(map(len, kinds)) else None
    roc, best = roc_of(kinds)
    edges, counts = histograms_of(kinds)
    report = NoiseReport(
        num_pairs=tuple(map(len, kinds)),
        medians=tuple(float(np.median(values)) if len(values) else None for values in kinds),
        edges=edges,
        counts=counts,
        roc=roc,
        agreement=agreement_of(kinds, None, 0.5),
        best_threshold=best,
        agreement_best=agreement_of(kinds, None, best),
        half_point=point_of(kinds, 0.5 if roc else None),
        best_point=point_of(kinds, best),
        threshold=threshold,
        suggested=suggested,
        rows=rows_of(kinds, threshold, suggested, best) if any(map(len, kinds)) else [],
        kept=np.array([astuple(share) for share in grid], float),
        worst=list(worst),
        facts=dict(facts or {}),
    )
    report.warnings.extend(_warnings(report, num_lost))
    return report


def report(similarity: np.ndarray, label: np.ndarray, off_diagonal: np.ndarray, threshold: float | None) -> list[str]:
    """The lines of `noise_report` alone; arguments as for `filter_shares`."""
    return noise_report(similarity, label, off_diagonal, threshold).lines()


def _warnings(report: NoiseReport, num_lost: int) -> list[str]:
    warnings = []
    if num_lost:
        warnings.append(f"{num_lost:,} similarities are not finite and are left out: look at the teacher's scores")
    shares = zip(KINDS, astuple(report.configured_shares()), strict=True)
    few = [kind for kind, share in shares if share is not None and share < FEW]
    if few:
        then = "null, which switches it off" if report.suggested is None else f"{report.suggested:.2f}"
        warnings.append(f"the noise filter keeps under {FEW:.0%} of {' and '.join(few)}: set loss.threshold to {then}")
    return warnings


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def theta_name(theta: float | None) -> str:
    return "off" if theta is None else f"{theta:g}"


def _fact_lines(facts: dict[str, str]) -> list[str]:
    return textwrap.wrap(printable(", ".join(f"{name} {value}" for name, value in facts.items())), WIDTH)


def _histogram_lines(report: NoiseReport) -> list[str]:
    """Ten bins of 0.1, the share of each label's pairs as a bar; what lies outside [0, 1] joins the outer bins."""
    tenth = np.clip(np.floor((report.edges[:-1] + report.edges[1:]) * 5).astype(int), 0, 9)
    lines = [f"{'similarity':<12}{'matches':>9} {'':20} {'non-matches':>12}"]
    for index in range(10):
        line = f"{'below 0.1' if index == 0 else f'{index / 10:.1f} to {(index + 1) / 10:.1f}':<12}"
        for kind, width in ((0, 9), (1, 12)):
            count = int(report.counts[kind, tenth == index].sum())
            line += f"{count:>{width}} {'#' * ceil(20 * count / max(1, report.num_pairs[kind])):<20} "
        lines.append(line.rstrip())
    return lines


def _quality_lines(report: NoiseReport) -> list[str]:
    kinds = zip(("matches", "non-matches", "off-diagonal pairs"), report.medians, strict=True)
    medians = [f"{kind} {median:.3f}" for kind, median in kinds if median is not None]
    lines = [f"median: {', '.join(medians)}"] if medians else []
    if report.roc is None:
        lines.append("teacher ROC-AUC: not defined, the pairs are of one class")
    else:
        sampled = f" (of {MOST_ROC_PAIRS:,} sampled pairs of a label)" if report.roc.is_sampled else ""
        lines.append(f"teacher ROC-AUC {report.roc.auc:.3f}{sampled}")
    if report.agreement is not None:
        best = (
            f"; at the best threshold, {report.best_threshold:.3f}: {report.agreement_best:.1%}" if report.roc else ""
        )
        lines.append(f"teacher and label agree at 0.5: {report.agreement:.1%}{best}")
    return lines


def _theta_lines(report: NoiseReport) -> list[str]:
    if not report.rows:
        return []
    lines = [f"{'theta':<10}{'positives':>11}{'negatives':>11}{'off-diagonal':>14}{'agreement':>11}"]
    for row in report.rows:
        marks = "*" * row.is_configured + "+" * row.is_suggested
        shares = "".join(f"{percent(x):>{width}}" for x, width in zip(astuple(row.shares), (11, 11, 14), strict=True))
        lines.append(f"{theta_name(row.threshold):<6}{marks:<4}{shares}{percent(row.agreement):>11}")
    legend = (
        f"* configured, + suggested: {RULE}. Agreement: the share of the kept labelled pairs whose similarity is on "
    )
    return [*lines, *textwrap.wrap(legend + "the label's side of 0.5.", WIDTH)]


def printable(text: str) -> str:
    """One line without the characters that control a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _cut(text: str, columns: int) -> str:
    """The beginning that fits; wide characters take two columns."""
    used = 0
    for at, letter in enumerate(text):
        used += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if used > columns:
            return text[: at - 1] + "…"
    return text


def _pair_lines(worst: list[ContradictoryPair]) -> list[str]:
    lines = []
    for pair in worst[:SHOWN_AS_TEXT]:
        lines.append(f"  label {pair.label}, similarity {pair.similarity:.3f}  {_cut(printable(pair.id), 40)}".rstrip())
        texts = (printable(" ".join(text.split())) for text in (pair.text_a, pair.text_b))
        lines.extend(f"    {_cut(text, WIDTH - 4)}" for text in texts)
    return [
        f"where label and teacher differ most (mislabelled, or hard), {len(lines) // 3} of {len(worst)}:",
        *lines,
    ] * bool(lines)


def _filter_line(report: NoiseReport) -> str:
    if report.threshold is None:
        return "the noise filter is off: every pair is kept"
    shares = zip(KINDS, astuple(report.configured_shares()), strict=True)
    texts = [f"{share:.1%} of {kind}" if share is not None else f"(no {kind})" for kind, share in shares]
    return f"the noise filter at theta {report.threshold:g} keeps {', '.join(texts)}"
