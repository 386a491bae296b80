"""What a comparison is made of: rows of a table, each several runs, and the scores of every run on the same pairs.

Shapes: N pairs of a split, k checkpoints of a run.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flipkd_dist.pairs import PairTable

READINGS = ("p_match", "similarity")  # the two answers of a student; an encoder has the second alone
READING_NAMES = {"p_match": "p(match)", "similarity": "read-out cosine"}
METRICS = ("accuracy", "f1", "roc_auc")
REFERENCE = "lora_sup"  # the row that all are tested against
ENCODERS = ("teacher", "overlap")  # kinds of row whose scores stand in the predictions of every run
WITHOUT_P_MATCH = (*ENCODERS, "classic")  # kinds of row
TELLING_SEEDS = 5  # fewer can hardly make a difference significant
DECIDING_SEEDS = 3  # from so many common seeds on, the t-test has its say


@dataclass(frozen=True)
class Row:
    """One line of the table: an ordinary run with these overrides, once for every seed."""

    name: str  # of letters that a folder's name may have
    title: str
    overrides: dict[str, object]  # dotted key -> value
    formula: str = ""
    source: str = ""
    kind: str = "student"  # untrained: the base as it is; classic: an encoder that a student taught; teacher; overlap


@dataclass(frozen=True)
class Cost:
    """Of one run's training, summed over its ranks where it adds up."""

    seconds: float
    tokens: int  # that are not padding
    peak_memory: int  # bytes, of the rank that had most
    trainable_parameters: int


@dataclass(frozen=True)
class RunScores:
    """Of one run: what it says of every pair, by each of its best checkpoints."""

    seed: int
    steps: list[int]  # k, the best on validation first
    scores: dict[str, dict[str, np.ndarray]]  # reading -> split -> float64 [k, N]
    cost: Cost | None = None


@dataclass(frozen=True)
class RowScores:
    row: Row
    runs: list[RunScores]  # a seed each; one of those that do not depend on it


@dataclass(frozen=True)
class Matrix:
    """Similarities of a few test pairs' first texts (rows) with their second texts: float [s, s] each."""

    pairs: list[int]  # s numbers of test pairs, matching ones, those of one group side by side
    teacher: np.ndarray
    student: np.ndarray  # cosine of the read-outs


@dataclass(frozen=True)
class Comparison:
    """All that the statistics and the report are made of."""

    name: str
    pairs: dict[str, PairTable]  # validation and test
    rows: list[RowScores]
    matrices: dict[str, Matrix] = field(default_factory=dict)  # of some rows' first runs, by row name

    def row(self, name: str) -> RowScores | None:
        return next((found for found in self.rows if found.row.name == name), None)


@dataclass(frozen=True)
class MetricResult:
    """Of one row: its mean over seeds, and its difference from the reference row (None: the reference, or untested)."""

    mean: float
    std: float | None  # over seeds, ddof 1; None with one seed
    values: list[float]  # a seed each
    difference: float | None = None  # this row minus the reference
    low: float | None = None  # 95 % interval of the difference over test pairs
    high: float | None = None
    p_seeds: float | None = None  # paired t-test over seeds
    p_pairs: float | None = None  # paired bootstrap over test pairs
    p_corrected: float | None = None  # for the number of rows
    verdict: str | None = None  # better, worse, no difference


@dataclass(frozen=True)
class RowResult:
    name: str
    title: str
    reading: str  # of READINGS
    split: str  # test, test_hard
    metrics: dict[str, MetricResult]  # by a name of METRICS


@dataclass(frozen=True)
class Results:
    rows: list[RowResult]
    reference: str  # the row that all are tested against
    alpha: float
    resamples: int  # of test pairs

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
