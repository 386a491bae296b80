"""The report of a comparison: `report.html`, which stands alone, and `report.md`."""

from datetime import UTC, datetime
from pathlib import Path

from flipkd_dist.comparison import Comparison, Results
from flipkd_dist.comparison_html import html
from flipkd_dist.comparison_markdown import markdown
from flipkd_dist.comparison_summary import summarise
from flipkd_dist.config import RunConfig
from flipkd_dist.run_folder import write_whole


def write(
    folder: Path,
    comparison: Comparison,
    results: Results,
    config: RunConfig | None = None,
    failures: dict[str, str] | None = None,
) -> None:
    """Write both files by rename, so that a browser never opens half of one.

    Args:
        folder: that of the comparison.
        config: of the row flip, resolved; shown on the page, and the source of its own value in a sweep.
        failures: by row: in one line, why it has no runs, or fewer than the others.
    """
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    summary = summarise(comparison, results, config, failures, date)
    write_whole(folder / "report.html", html(summary))
    write_whole(folder / "report.md", markdown(summary))
