"""A comparison's report as one HTML page: plots and style inside, nothing fetched, no scripts."""

from collections import defaultdict

from flipkd_dist.comparison import READING_NAMES
from flipkd_dist.comparison_numbers import BINS
from flipkd_dist.comparison_plots import plots
from flipkd_dist.comparison_summary import SPLIT_TITLES, Summary
from flipkd_dist.comparison_words import METRIC_NAMES, difference_text, duration, is_number, mean_text, p_text, size
from flipkd_dist.losses import SYMBOLS
from flipkd_dist.page import render

TEMPLATE = "comparison_report.html.jinja"


def html(summary: Summary) -> str:
    """The page; equal summaries give equal pages."""
    filters = {"mean": mean_text, "difference": difference_text, "p": p_text, "duration": duration, "bytes": size}
    filters |= {"figure": _figure, "share": _share}
    drawn = defaultdict(str, plots(summary.drawn))
    values = {
        "splits": SPLIT_TITLES,
        "readings": READING_NAMES,
        "metrics": METRIC_NAMES,
        "bins": BINS,
        "symbols": SYMBOLS,
    }
    return render(TEMPLATE, filters, it=summary, plots=drawn, **values)


def _figure(value: float | None) -> str:
    return f"{value:.4f}" if is_number(value) else "-"


def _share(value: float) -> str:
    return f"{value:.3f}" if is_number(value) else "-"
