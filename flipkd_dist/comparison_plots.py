"""The plots of a comparison's report, in the colours of its page; rows are called by their short names."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from flipkd_dist.comparison import READING_NAMES, READINGS, Matrix, Results
from flipkd_dist.comparison_finds import Sweep, results_of, sweep_values
from flipkd_dist.comparison_numbers import FLIP, GRID, KINDS, Curve, Distribution, Reliability
from flipkd_dist.comparison_words import METRIC_NAMES
from flipkd_dist.plot_svg import (
    FAINT,
    INK,
    NEGATIVES,
    OFF_DIAGONAL,
    POSITIVES,
    Axes,
    Figure,
    cells,
    in_percent,
    new_figure,
    svg_of,
)

FLIP_COLOUR, REFERENCE_COLOUR, TEACHER_COLOUR = "#00795c", "#7b3fa0", "#8a6d01"
VARIABLES = {FLIP_COLOUR: "flip", REFERENCE_COLOUR: "reference", TEACHER_COLOUR: "teacher"}
DASHES = {"teacher": (0, (1.5, 1.5)), FLIP: "-"}  # for who cannot tell the colours; else long dashes


@dataclass(frozen=True)
class Drawn:
    """All that is drawn; what is empty or None has no plot."""

    distributions: dict[str, list[Distribution]]  # by reading
    roc: dict[str, list[Curve]]
    precision: dict[str, list[Curve]]
    reliability: list[Reliability]
    sweeps: list[Sweep]
    matrices: dict[str, Matrix]
    results: Results


def plots(found: Drawn) -> dict[str, str]:
    """SVG elements: `distributions`, `roc-READING`, `precision-READING`, `calibration`, `sweep-N`, `matrices`."""
    drawings = {"distributions": partial(_distributions, found.distributions)}
    for reading in READINGS:
        drawings[f"roc-{reading}"] = partial(_roc, found.roc.get(reading))
        drawings[f"precision-{reading}"] = partial(_precision, found.precision.get(reading))
    drawings["calibration"] = partial(_calibration, found.reliability)
    for number, sweep in enumerate(found.sweeps):
        drawings[f"sweep-{number}"] = partial(_sweep, sweep, found.results)
    drawings["matrices"] = partial(_matrices, found.matrices)
    made = {name: svg_of(name, draw, VARIABLES) for name, draw in drawings.items()}
    return {name: svg for name, svg in made.items() if svg is not None}


def _colour(row: str) -> str:
    """Of a row's lines; the reference has the colour that is left."""
    named = {FLIP: FLIP_COLOUR, "teacher": TEACHER_COLOUR, "untrained": OFF_DIAGONAL}
    return named.get(row, REFERENCE_COLOUR)


def _line(row: str) -> dict:
    return {"color": _colour(row), "linestyle": DASHES.get(row, (0, (5, 2))), "linewidth": 2}


def _distributions(found: dict[str, list[Distribution]]) -> Figure | None:
    """A row of plots for each reading, a column for each row of the table."""
    found = {reading: drawn for reading, drawn in found.items() if drawn}
    if not found:
        return None
    columns = max(map(len, found.values()))
    figure = new_figure(8.4, 0.5 + 2.1 * len(found))
    axes = figure.subplots(len(found), columns, squeeze=False)
    for line, (reading, drawn) in zip(axes, found.items(), strict=True):
        top = max(shares.max() for one in drawn for shares in one.shares if shares is not None) * 1.05
        for ax in line[len(drawn) :]:
            ax.set_visible(False)
        for ax, one in zip(line, drawn, strict=False):
            _distribution(ax, one, top)
            ax.set(xlabel=READING_NAMES[reading])
            ax.text(0, 1.03, one.row, transform=ax.transAxes, weight="bold")
    handles, labels = next(ax for ax in axes.flat if ax.get_visible()).get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, columnspacing=1.6)
    return figure


def _distribution(ax: Axes, one: Distribution, top: float) -> None:
    ax.set(xlim=one.edges[[0, -1]], ylim=(0, top), yticks=[])
    ax.spines["left"].set_visible(False)
    looks = ((POSITIVES, True), (NEGATIVES, True), (NEGATIVES, False))
    for kind, shares, (colour, is_filled) in zip(KINDS, one.shares, looks, strict=True):
        if shares is None:
            continue
        if is_filled:
            ax.stairs(shares, one.edges, fill=True, color=colour, alpha=0.45, linewidth=0, label=kind)
        ax.stairs(
            shares,
            one.edges,
            color=colour,
            linewidth=1.2,
            linestyle="-" if is_filled else (0, (2, 1.5)),
            label=None if is_filled else kind,
        )


def _roc(found: list[Curve] | None) -> Figure | None:
    return _curves(found, "AUC", "non-matches taken for matches", "matches found", "upper left")


def _precision(found: list[Curve] | None) -> Figure | None:
    return _curves(found, "AP", "matches found", "of those found, matches", "lower left")


def _curves(found: list[Curve] | None, area: str, across: str, up: str, chance: str) -> Figure | None:
    if not found:
        return None
    figure = new_figure(4.2, 4.3)
    ax = figure.subplots()
    if chance == "upper left":
        ax.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for curve in found:
        ax.fill_between(GRID, curve.low, curve.high, color=_colour(curve.row), alpha=0.15, linewidth=0)
        ax.plot(GRID, curve.mean, label=f"{curve.row}, {area} {curve.area:.3f}", **_line(curve.row))
    ax.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal", xlabel=across, ylabel=up)
    in_percent(ax, "xy")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, handlelength=2.2, columnspacing=1.2)
    return figure


def _calibration(found: list[Reliability]) -> Figure | None:
    """The larger a point, the more pairs lie in its bin."""
    if not found:
        return None
    figure = new_figure(4.2, 4.3)
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for one in found:
        filled = np.isfinite(one.mean)
        label = f"{one.row}, ECE {one.error:.3f}"
        ax.plot(one.mean[filled], one.matches[filled], label=label, **_line(one.row))
        sizes = 8 + 110 * one.pairs[filled] / one.pairs.sum()
        ax.scatter(
            one.mean[filled], one.matches[filled], sizes, color=_colour(one.row), zorder=3, clip_on=False, linewidths=0
        )
    ax.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal", xlabel="p(match)", ylabel="share of matches")
    in_percent(ax, "xy")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, handlelength=2.2, columnspacing=1.2)
    return figure


def _sweep(sweep: Sweep, results: Results) -> Figure | None:
    """A column for each metric, a row for each reading; bars are one standard deviation over seeds."""
    lines = {(r, m): sweep_values(sweep, results, r, m) for r in READINGS for m in METRIC_NAMES}
    readings = [r for r in READINGS if any(len(lines[r, m]) for m in METRIC_NAMES)]
    if not readings:
        return None
    figure = new_figure(8.4, 0.5 + 2.2 * len(readings))
    axes = figure.subplots(len(readings), len(METRIC_NAMES), squeeze=False, sharex=True)
    for row, reading in zip(axes, readings, strict=True):
        for ax, (metric, name) in zip(row, METRIC_NAMES.items(), strict=True):
            value, mean, std = lines[reading, metric].T
            ax.errorbar(value, mean, std, marker="o", markersize=4, capsize=3, label=FLIP, **_line(FLIP))
            base = results_of(results, results.reference, reading)
            if base and metric in base.metrics:
                ax.axhline(
                    base.metrics[metric].mean, label=results.reference, **{**_line("reference"), "linewidth": 1.2}
                )
            ax.set_title(f"{name}, {READING_NAMES[reading]}", fontsize=9, loc="left")
            ax.margins(x=0.06, y=0.15)
    for ax in axes[-1]:
        ax.set_xlabel(sweep.key)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2, handlelength=2.2)
    return figure


def _matrices(found: dict[str, Matrix]) -> Figure | None:
    """The teacher's and each row's on one scale; the more ink, the more similar."""
    shown = {"teacher": next(iter(found.values())).teacher} if found else {}
    shown |= {row: matrix.student for row, matrix in found.items()}
    shown = {name: values for name, values in shown.items() if values.size and np.isfinite(values).all()}
    if len(shown) < 2:
        return None
    low, high = min(map(np.min, shown.values())), max(map(np.max, shown.values()))
    figure = new_figure(8.4, 0.3 + 7.8 / max(3, len(shown)))
    *axes, scale = figure.subplots(1, len(shown) + 1, gridspec_kw={"width_ratios": [*[1.0] * len(shown), 0.06]})
    for ax, (name, values) in zip(axes, shown.items(), strict=True):
        cells(ax, values, low, high, INK)
        ax.set_title(name, fontsize=9, loc="left", weight="bold")
    cells(scale, np.linspace(high, low, 25)[:, None], low, high, INK)
    scale.set(aspect="auto", yticks=[0.5, 24.5], yticklabels=[f"{high:.2f}", f"{low:.2f}"])
    scale.yaxis.tick_right()
    return figure
