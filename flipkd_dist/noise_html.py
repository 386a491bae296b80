"""The noise report as one HTML page: plots and style inside, nothing fetched, no scripts."""

from dataclasses import astuple
from pathlib import Path

from flipkd_dist.filter_shares import RULE
from flipkd_dist.noise_numbers import MOST_ROC_PAIRS
from flipkd_dist.noise_plots import NAMES, plots
from flipkd_dist.noise_report import NoiseReport, percent, theta_name
from flipkd_dist.page import render
from flipkd_dist.run_folder import write_whole

TEMPLATE = "noise_report.html.jinja"


def html(report: NoiseReport) -> str:
    """The page; equal reports give equal pages."""
    filters = {"percent": percent, "theta": theta_name, "shares": astuple}
    values = {"kinds": NAMES, "rule": RULE, "most_roc_pairs": MOST_ROC_PAIRS}
    return render(TEMPLATE, filters, report=report, plots=plots(report), **values)


def write_html(report: NoiseReport, path: Path) -> None:
    """Write the page by rename, so that a browser never opens half of it."""
    write_whole(path, html(report))
