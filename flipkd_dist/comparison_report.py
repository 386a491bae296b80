"""The report of a comparison: `report.html`, which stands alone, and `report.md`."""

from datetime import UTC, datetime
from pathlib import Path

from flipkd_dist.comparison import ENCODERS, Comparison, Results
from flipkd_dist.comparison_html import html
from flipkd_dist.comparison_markdown import markdown
from flipkd_dist.comparison_reading import INDEX
from flipkd_dist.comparison_summary import summarise
from flipkd_dist.config import RunConfig, load_config
from flipkd_dist.run_folder import read_json, write_whole


def write(folder: Path, comparison: Comparison, results: Results, config: RunConfig | None = None) -> None:
    """Write both files by rename, so that a browser never opens half of one.

    Args:
        folder: that of the comparison.
        config: of the row flip, resolved; None for the folder's config.yaml, where there is one.
    """
    if config is None and (folder / "config.yaml").exists():
        config = load_config(folder / "config.yaml")
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    summary = summarise(comparison, results, config, failed_rows(folder), date)
    write_whole(folder / "report.html", html(summary))
    write_whole(folder / "report.md", markdown(summary))


def failed_rows(folder: Path) -> dict[str, str]:
    """By row of `folder`/comparison.json: how many of its runs have failed, and why the first of them has.

    An encoder is read out of the runs of students, and has not failed with one of them.
    """
    failures = {}
    for row in (read_json(folder / INDEX) or {}).get("rows", []):
        reasons = [
            run.get("reason") for run in row["runs"] if run["status"] == "failed" and row["kind"] not in ENCODERS
        ]
        if reasons:
            failures[row["name"]] = f"{len(reasons)} of {len(row['runs'])} runs: {reasons[0] or 'see run.log'}"
    return failures
