"""A matplotlib figure as SVG that stands inside a page and takes its colours and font from there.

Plots hold numbers and our own words alone, never a user's text, so that no glyph can be missing. Nothing else imports
matplotlib, and here it is imported where a plot is drawn: other commands should not wait for it.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Axes = Figure = Any  # matplotlib's

# What is drawn in these colours takes the page's: var(--positives) and so on, light or dark.
POSITIVES, NEGATIVES, OFF_DIAGONAL, INK, FAINT = COLOURS = ("#0072b2", "#d55e00", "#6f6f70", "#222223", "#d8d8d9")
VARIABLES = ("positives", "negatives", "off-diagonal", "ink", "faint")
STYLE = {
    "font.family": "DejaVu Sans",  # measured with; the page puts its own in place
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
}


def svg_of(name: str, draw: Callable[[], Figure | None], extra: dict[str, str] | None = None) -> str | None:
    """The element that `draw` makes, or None where it draws nothing.

    Args:
        name: the element's class; ids inside it begin with a hash of it, so that those of two plots never collide.
        extra: further colours (six hex digits) and the page's variables that they stand for.
    """
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        made = draw()
        return None if made is None else _svg(made, name, extra or {})


def new_figure(width: float, height: float) -> Figure:
    """Empty, of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure((width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def _svg(made: Figure, name: str, extra: dict[str, str]) -> str:
    """The element alone: no date, no size of its own, no style that reaches beyond it, colours as variables."""
    file = io.StringIO()
    made.savefig(file, format="svg")
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg class="{name}" viewBox="\1" role="img">', text, count=1
    )
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # matplotlib numbers its groups alike in every figure
    for colour, variable in {**dict(zip(COLOURS, VARIABLES, strict=True)), **extra}.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*\n+", "\n", text).strip()


def clip(artist: Any, ax: Axes, low: float, high: float, top: float) -> None:
    """Show what lies between `low` and `high`, up to `top`, alone."""
    from matplotlib.patches import Rectangle

    artist.set_clip_path(Rectangle((low, 0), max(0.0, high - low), top, transform=ax.transData))


def in_percent(ax: Axes, which: str) -> None:
    """Fifths on both axes, those of `which` written as percentages."""
    from matplotlib.ticker import PercentFormatter

    for axis in (getattr(ax, f"{letter}axis") for letter in which):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xticks(np.arange(0, 6) / 5)
    ax.set_yticks(np.arange(0, 6) / 5)


def cells(ax: Axes, values: np.ndarray, low: float, high: float, colour: str, levels: int = 24) -> None:
    """A matrix [rows, columns] as squares, the more opaque the higher; a path for each level, not for each square."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    span = max(high - low, 1e-12)
    level = np.clip(np.round((values - low) / span * levels), 0, levels).astype(int)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * 1.01  # no paper shines through between two
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for step in range(1, levels + 1):
        corners = np.argwhere(level == step)[:, ::-1]  # x is the column
        if len(corners):
            vertices = (corners[:, None] + square).reshape(-1, 2)
            path = Path(vertices, codes * len(corners))
            ax.add_patch(PathPatch(path, facecolor=colour, alpha=step / levels, linewidth=0, antialiased=False))
    ax.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0), aspect="equal", xticks=[], yticks=[])
