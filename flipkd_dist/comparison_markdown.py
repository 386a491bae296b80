"""A comparison's report as Markdown: its tables and texts, without the plots."""

import re

from flipkd_dist.comparison import READING_NAMES, READINGS, MetricResult
from flipkd_dist.comparison_finds import JudgedPair, results_of
from flipkd_dist.comparison_summary import SPLIT_TITLES, Summary
from flipkd_dist.comparison_summary import Table as ResultTable
from flipkd_dist.comparison_words import METRIC_NAMES, difference_text, duration, mean_text, p_text, size
from flipkd_dist.losses import SYMBOLS
from flipkd_dist.page import SHOWN, shown


def markdown(summary: Summary) -> str:
    """The report; equal summaries give equal texts."""
    parts = [
        [f"# Comparison: {escaped(summary.name)}", "", *(f"**{escaped(one, 1000)}**\n" for one in summary.headline)],
        [f"> Note: {escaped(note, 600)}.\n>" for note in summary.notes],
        [f"Tested against {escaped(summary.reference)}. The plots are in `report.html`."],
        *(_results(table, summary) for table in summary.tables),
        _losses(summary),
        *_sweeps(summary),
        _reliability(summary),
        _agreements(summary),
        _pairs("won", summary.won, summary),
        _pairs("lost", summary.lost, summary),
        _costs(summary),
        ["## What was run", "", *(f"- {escaped(name)}: {escaped(text)}" for name, text in summary.facts.items())],
        _config(summary.config),
    ]
    return "\n\n".join("\n".join(part).strip() for part in parts if part) + "\n"


def escaped(text: object, limit: int = SHOWN) -> str:
    """One line that reads as it stands, whatever it holds."""
    flat = " ".join(shown(str(text), limit).split()).replace("&", "&amp;").replace("<", "&lt;")
    marked = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", flat)
    return re.sub(r"^(\d*)([-+#>.)])", r"\1\\\2", marked)  # no list, heading or quotation begins


def _table(head: list[str], lines: list[list[str]]) -> list[str]:
    """Its cells are escaped already."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, ruler, *lines)]


def _results(table: ResultTable, summary: Summary) -> list[str]:
    lines = []
    for line in table.lines:
        name = escaped(line.title) + (" (reference)" if line.name == summary.reference else "")
        if line.failure:
            name += f", failed: {escaped(line.failure)}"
        lines.append([name, *(_cell(line.metrics.get(metric)) for metric in METRIC_NAMES)])
    title = f"## {SPLIT_TITLES[table.split]}: {READING_NAMES[table.reading]}"
    return [title, "", *_table(["row", *METRIC_NAMES.values()], lines)]


def _cell(found: MetricResult | None) -> str:
    parts = [mean_text(found), difference_text(found)]
    if found is not None and found.verdict:
        parts.append(f"p {p_text(found.p_corrected)}: {found.verdict}".replace("<", "&lt;"))
    return "<br>".join(filter(None, parts))


def _losses(summary: Summary) -> list[str]:
    lines = []
    for row in summary.rows:
        settings = ", ".join(f"{key}={value}" for key, value in row.overrides.items())
        lines.append([escaped(text) for text in (row.title, row.formula, row.source, settings)])
    head = ["## What each row trains on", "", f"{escaped(SYMBOLS)}.", ""]
    return [*head, *_table(["row", "loss", "source", "settings"], lines)] if lines else []


def _sweeps(summary: Summary) -> list[list[str]]:
    parts, results = [], summary.drawn.results
    for sweep in summary.drawn.sweeps:
        rows = {reading: [results_of(results, point.row, reading) for point in sweep.points] for reading in READINGS}
        found = [reading for reading in READINGS if any(rows[reading])]
        head = [f"{name}, {READING_NAMES[reading]}" for reading in found for name in METRIC_NAMES.values()]
        lines = [
            [
                f"{point.value:g}",
                *(mean_text(row and row.metrics.get(m)) for r in found for row in [rows[r][at]] for m in METRIC_NAMES),
            ]
            for at, point in enumerate(sweep.points)
        ]
        parts.append([f"## Sweep of {escaped(sweep.key)}", "", *_table([escaped(sweep.key), *head], lines)])
    return parts


def _reliability(summary: Summary) -> list[str]:
    errors = [f"{escaped(one.row)} {one.error:.3f}" for one in summary.drawn.reliability]
    return ["## Calibration of p(match)", "", f"ECE with bins of equal width: {', '.join(errors)}."] if errors else []


def _agreements(summary: Summary) -> list[str]:
    found = [f"{escaped(row)} {value:.3f}" for row, value in summary.agreements.items()]
    text = f"Rank correlation with the teacher off the diagonal: {', '.join(found)}."
    return ["## Similarity matrices", "", text] if found else []


def _pairs(title: str, pairs: list[JudgedPair], summary: Summary) -> list[str]:
    if not pairs:
        return []
    lines = [f"## The {len(pairs)} pairs that flip {title}", ""]
    way = "towards" if title == "won" else "away from"
    said = f"{READING_NAMES[summary.judged_by]} of {escaped(summary.reference)} → that of flip, means over seeds and"
    lines += [f"{said} checkpoints: where flip moved it farthest {way} the label.", ""]
    for pair in pairs:
        lines.append(f"- label {pair.label}, {pair.before:.3f} → {pair.after:.3f}, {escaped(pair.id, 80)}")
        lines += [f"  - {escaped(text)}" for text in (pair.text_a, pair.text_b)]
    return lines


def _costs(summary: Summary) -> list[str]:
    lines = [
        [
            escaped(cost.name),
            duration(cost.seconds),
            f"{cost.tokens:,.0f}",
            f"{cost.tokens / cost.seconds:,.0f}" if cost.seconds > 0 else "-",
            size(cost.peak_memory),
            f"{cost.trainable_parameters:,.0f}",
        ]
        for cost in summary.costs
    ]
    head = ["row", "time", "tokens", "tokens/s", "peak memory", "trained parameters"]
    return ["## What each row cost", "", *_table(head, lines)] if lines else []


def _config(config: str) -> list[str]:
    if not config:
        return []
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", config)), default=0))
    return ["## The configuration of flip", "", f"{fence}yaml", shown(config, 20_000), fence]
