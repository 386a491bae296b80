"""Runs of several rounds to a table: medians, and the spread from the lowest to the highest."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.lowest:.{digits}f} to {self.highest:.{digits}f})"


def speed(result: dict) -> float:
    """Sequences a second of one run: by the median of its steps, which a burst of other work does not move."""
    return result["sequences"] / statistics.median(result["seconds"])


def ratios(rounds: list[dict[str, dict]], name: str, baseline: str) -> list[float]:
    """How many times as fast as the baseline of the same round, for the rounds where both ran."""
    return [speed(one[name]) / speed(one[baseline]) for one in rounds if name in one and baseline in one]


def rows(rounds: list[dict[str, dict]], baseline: str, ours: str = "ours") -> dict[str, dict]:
    """By variant what the table shows; JSON can hold it.

    Args:
        rounds: each by variant the result of a run; a run that failed is not there.
    """

    def spread(values: list[float]) -> dict[str, float] | None:
        return vars(Spread.of(values)) if values else None

    table = {}
    for name in dict.fromkeys(name for one in rounds for name in one):
        results = [one[name] for one in rounds if name in one]
        table[name] = {
            "runs": len(results),
            "sequences_per_second": spread([speed(result) for result in results]),
            "over_baseline": spread(ratios(rounds, name, baseline)),
            "ours_over": spread(ratios(rounds, ours, name)),
            "peak_mib": spread([result["peak_mib"] for result in results]),
            "libraries_mib": statistics.median(result["libraries_mib"] for result in results),
            "real_tokens": statistics.fmean(results[0]["real_tokens"]),
            "computed_tokens": statistics.fmean(results[0]["computed_tokens"]),
        }
    return table


def markdown(table: dict[str, dict], baseline: str) -> str:
    lines = [
        f"| | sequences/s | over {baseline} | ours over it | peak MiB (imports) | tokens a step: real, computed |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        over, ours = ("" if row[key] is None else Spread(**row[key]).text(2) for key in ("over_baseline", "ours_over"))
        lines.append(
            f"| {name} | {Spread(**row['sequences_per_second']).text(1)} | {over} | {ours} | "
            f"{row['peak_mib']['median']:.0f} ({row['libraries_mib']:.0f}) | "
            f"{row['real_tokens']:.0f}, {row['computed_tokens']:.0f} |"
        )
    return "\n".join(lines)
