"""The noise report as one HTML page: plots and style inside, nothing fetched, no scripts."""

import unicodedata
from dataclasses import astuple
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from flipkd_dist.filter_shares import RULE
from flipkd_dist.noise_numbers import MOST_ROC_PAIRS
from flipkd_dist.noise_plots import NAMES, plots
from flipkd_dist.noise_report import NoiseReport, percent, theta_name
from flipkd_dist.run_folder import write_whole

TEMPLATE = "noise_report.html.jinja"
SHOWN = 300  # characters of a text


def html(report: NoiseReport) -> str:
    """The page; equal reports give equal pages."""
    environment = Environment(
        loader=PackageLoader("flipkd_dist"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, theta=theta_name, shown=shown, shares=astuple)
    environment.globals.update(zip=zip)
    return environment.get_template(TEMPLATE).render(
        report=report, plots=plots(report), kinds=NAMES, rule=RULE, most_roc_pairs=MOST_ROC_PAIRS
    )


def write_html(report: NoiseReport, path: Path) -> None:
    """Write the page by rename, so that a browser never opens half of it."""
    write_whole(path, html(report))


def shown(text: str, limit: int = SHOWN) -> str:
    """The text's beginning; characters that are not for a page are replaced."""
    text = text if len(text) <= limit else text[:limit].rstrip() + " …"
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(x) in ("Cc", "Cs") and x not in "\n\t" else x for x in text
    )
