"""The results of a comparison as fixed-width text for a terminal."""

from flipkd_dist.comparison import METRICS, MetricResult, Results, RowResult

HEADLINES = {"p_match": "p(match)", "similarity": "similarity of the read-outs"}
WIDTH = 28  # of a row's title


def table(results: Results) -> str:
    """A block for every table, reading and metric: mean and standard deviation over seeds, difference, p, verdict.

    Pairs without the hard non-matches come first.
    """
    blocks: dict[tuple[str, str, str], list[RowResult]] = {}
    for found in results.rows:
        for metric in METRICS:
            if metric in found.metrics:
                blocks.setdefault((found.split, found.reading, metric), []).append(found)
    parts = []
    for (split, reading, metric), rows in blocks.items():
        parts.append(
            f"{f'{split}, {HEADLINES[reading]}':<{WIDTH + 14}}{'mean':>8}{'sd':>8}{'difference':>12}"
            f"{'95 % interval':>20}{'p':>8}  verdict"
        )
        parts += [f"{_cut(row.title):<{WIDTH}}  {metric:<12}{_figures(row.metrics[metric])}".rstrip() for row in rows]
        parts.append("")
    parts.append(
        f"difference: from {results.reference}. p: two-sided, corrected for the number of rows; below "
        f"{results.alpha:g} a row is better or worse."
    )
    return "\n".join(parts)


def _cut(title: str) -> str:
    return title if len(title) <= WIDTH else f"{title[: WIDTH - 1]}…"


def _figures(value: MetricResult) -> str:
    sd = "-" if value.std is None else f"{value.std:.4f}"
    text = f"{value.mean:>8.4f}{sd:>8}"
    if value.verdict is None:
        return text
    interval = f"{value.low:+.4f} {value.high:+.4f}"
    return f"{text}{value.difference:>+12.4f}{interval:>20}{value.p_corrected:>8.4f}  {value.verdict}"
