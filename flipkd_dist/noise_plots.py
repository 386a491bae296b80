"""The plots of the noise report, in the colours of its page."""

from dataclasses import astuple
from functools import partial

from flipkd_dist.filter_shares import GRID
from flipkd_dist.noise_report import NoiseReport
from flipkd_dist.plot_svg import COLOURS, FAINT, INK, POSITIVES, Axes, Figure, clip, in_percent, new_figure, svg_of

NAMES = ("matches", "non-matches", "off-diagonal")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # of the kinds, for who cannot tell the colours


def plots(report: NoiseReport) -> dict[str, str]:
    """SVG elements by name: `distributions`, `roc` (both classes needed) and `kept`; none where there is no pair."""
    if not report.rows:
        return {}
    drawings = {"distributions": _distributions, "roc": _roc, "kept": _kept}
    found = {name: svg_of(name, partial(draw, report)) for name, draw in drawings.items()}
    return {name: svg for name, svg in found.items() if svg is not None}


def _distributions(report: NoiseReport) -> Figure:
    """A row for each kind of pair; what the filter drops is pale."""
    figure = new_figure(8.4, 4.2)
    axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"hspace": 0.12})
    shares = astuple(report.configured_shares())
    for kind, (ax, colour) in enumerate(zip(axes, COLOURS, strict=False)):
        _distribution(ax, report, kind, colour)
        num = report.num_pairs[kind]
        share = "" if report.threshold is None or shares[kind] is None else f"{shares[kind]:.1%} kept"
        ax.text(0, 1.06, NAMES[kind], transform=ax.transAxes, weight="bold", color=colour)
        ax.text(1, 1.06, ", ".join(filter(None, (f"{num:,} pairs", share))), transform=ax.transAxes, ha="right")
    axes[-1].set_xlabel("teacher similarity")
    axes[-1].tick_params(bottom=True)
    return figure


def _distribution(ax: Axes, report: NoiseReport, kind: int, colour: str) -> None:
    low, high = report.edges[[0, -1]]
    counts = report.counts[kind]
    top = max(1, int(counts.max())) * 1.05
    ax.set(xlim=(low, high), ylim=(0, top))
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.tick_params(bottom=False)
    is_pale = report.threshold is not None
    ax.stairs(counts, report.edges, fill=True, color=colour, alpha=0.25 if is_pale else 0.9, linewidth=0)
    if not is_pale:
        return
    boundary = report.threshold if kind == 0 else 1 - report.threshold
    kept = (boundary, high) if kind == 0 else (low, boundary)
    full = ax.stairs(counts, report.edges, fill=True, color=colour, alpha=0.9, linewidth=0)
    clip(full, ax, *kept, top)
    ax.axvline(boundary, color=INK, linewidth=1, linestyle=(0, (3, 2)))


def _roc(report: NoiseReport) -> Figure | None:
    if report.roc is None:
        return None
    figure = new_figure(4.2, 3.9)
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    ax.plot(report.roc.false_positives, report.roc.true_positives, color=POSITIVES, linewidth=2)
    points = {"0.5": (report.half_point, "o", -8), f"best, {report.best_threshold:.2f}": (report.best_point, "D", 2)}
    if report.best_threshold == 0.5:
        points = {"0.5, the best": (report.half_point, "D", -3)}
    for name, (point, marker, offset) in points.items():
        ax.plot(*point, marker, color=INK, markersize=5.5, clip_on=False, zorder=3)
        at_the_edge = point[0] > 0.7
        place = {"xytext": (-9, -16), "ha": "right"} if at_the_edge else {"xytext": (9, offset)}
        ax.annotate(name, point, textcoords="offset points", **place)
    ax.text(0.98, 0.05, f"AUC {report.roc.auc:.3f}", ha="right", weight="bold", size=11)
    ax.set(xlim=(0, 1), ylim=(0, 1.005), aspect="equal", xlabel="non-matches taken for matches", ylabel="matches found")
    in_percent(ax, "xy")
    return figure


def _kept(report: NoiseReport) -> Figure:
    figure = new_figure(4.2, 3.9)
    ax = figure.subplots()
    ax.axhline(0.5, color=FAINT, linewidth=1)
    for kind, name in enumerate(NAMES):
        if report.num_pairs[kind]:
            shares = report.kept[:, kind]
            ax.plot(GRID, shares, color=COLOURS[kind], linewidth=2, linestyle=DASHES[kind], label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="theta", ylabel="kept")
    _mark_thetas(ax, report)
    in_percent(ax, "y")
    figure.legend(frameon=False, loc="outside lower center", ncols=3, handlelength=2.2, columnspacing=1.2)
    return figure


def _mark_thetas(ax: Axes, report: NoiseReport) -> None:
    """Vertical lines at the configured and the suggested theta, their names above, none over another."""
    marks = {"configured": report.threshold, "suggested": report.suggested}
    if report.threshold == report.suggested:
        marks = {"configured, suggested": report.threshold}
    drawn = {name: theta for name, theta in marks.items() if theta is not None}
    is_close = max(drawn.values(), default=0) - min(drawn.values(), default=0) < 0.4
    for row, (name, theta) in enumerate(drawn.items()):
        ax.axvline(theta, color=INK, linewidth=1, linestyle=(0, (1, 2)) if name == "suggested" else "-")
        height = 1.02 + 0.07 * (row if is_close else 0)
        ax.text(theta, height, f"{name} {theta:g}", transform=ax.get_xaxis_transform(), ha="center")
