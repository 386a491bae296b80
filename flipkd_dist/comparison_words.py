"""The figures of a comparison in words: what it says of flip, verdicts, p-values, durations."""

from flipkd_dist.comparison import READING_NAMES, MetricResult, Results, RowResult
from flipkd_dist.comparison_finds import results_of
from flipkd_dist.comparison_numbers import FLIP

METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "roc_auc": "ROC-AUC"}
VERDICTS = ("better", "worse", "no difference")


def headline(results: Results) -> list[str]:
    """A sentence for each reading: flip on the test pairs against the reference; what does not differ is said so."""
    reference = title_of(results, results.reference)
    sentences = []
    for reading in READING_NAMES:
        row = results_of(results, FLIP, reading)
        if row is not None and results_of(results, results.reference, reading) is not None:
            sentences.append(_sentence(row, reference))
    if not sentences:
        missing = [name for name in (FLIP, results.reference) if not any(row.name == name for row in results.rows)]
        return [f"No statement about flip: there is no result of {' and '.join(missing) or 'both rows together'}."]
    return sentences


def title_of(results: Results, name: str) -> str:
    return next((row.title for row in results.rows if row.name == name), name)


def _sentence(row: RowResult, reference: str) -> str:
    parts = {verdict: [] for verdict in (*VERDICTS, None)}
    for metric, name in METRIC_NAMES.items():
        found = row.metrics.get(metric)
        if found is not None and is_number(found.mean):
            parts[found.verdict if found.verdict in VERDICTS else None].append(f"{name}{_points(found)}")
    by = f"By {READING_NAMES[row.reading] if row.reading == 'p_match' else 'the cosine of the read-outs'}"
    said = [
        f"{row.title} is {verdict} than {reference} in {_listed(parts[verdict])}"
        for verdict in ("better", "worse")
        if parts[verdict]
    ]
    same = parts["no difference"]
    if same and not said:
        said = [f"there is no difference between {row.title} and {reference} in {_listed(same)}"]
    elif same:
        said.append(f"there is no difference in {_listed(same)}")
    if parts[None]:
        said.append(f"not tested: {_listed(parts[None])}")
    return f"{by}, {'; '.join(said)}." if said else f"{by}, there is nothing to compare: the labels are of one class."


def _points(found: MetricResult) -> str:
    if not is_number(found.difference):
        return ""
    interval = ""
    if is_number(found.low) and is_number(found.high):
        interval = f", 95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f" ({100 * found.difference:+.1f} points{interval})"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def is_number(value: float | None) -> bool:
    return value is not None and value == value and abs(value) != float("inf")


def mean_text(found: MetricResult | None) -> str:
    """Mean and standard deviation over seeds."""
    if found is None or not is_number(found.mean):
        return "-"
    return f"{found.mean:.4f}" + (f" ± {found.std:.4f}" if is_number(found.std) else "")


def difference_text(found: MetricResult | None) -> str:
    """The difference from the reference and its interval, "" where there is none."""
    if found is None or not is_number(found.difference):
        return ""
    interval = is_number(found.low) and is_number(found.high)
    return f"{found.difference:+.4f}" + (f" ({found.low:+.4f} to {found.high:+.4f})" if interval else "")


def p_text(p: float | None) -> str:
    if not is_number(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes} min {seconds % 60:02} s" if not hours else f"{hours} h {minutes % 60:02} min"


def size(count: float) -> str:
    """Bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
