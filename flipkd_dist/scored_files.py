"""Files of scored pairs as the teacher: canonical records with a column `score`, or FlagEmbedding's JSONL.

Shapes: K scored pairs whose texts both belong to the run, T texts of the run.
"""

import hashlib
import logging
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flipkd_dist.calibration import RANGES
from flipkd_dist.config import DataConfig, TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_files import place
from flipkd_dist.pair_formats import Place, first_record, look, pair_records
from flipkd_dist.store import StoreSpec, normalised

logger = logging.getLogger("flipkd_dist")
KEY = "teacher.scores"
SAME_SCORE = 1e-2  # how far two scores of one pair may lie apart: half precision and padding move them


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """The files' scores of pairs of the run's texts; the pairs are unique."""

    spec: StoreSpec
    scale: str  # cosine, probability or logit
    texts: list[str]  # [T] normalised, unique
    first: np.ndarray  # [K] int64, numbers into texts
    second: np.ndarray  # [K] int64
    scores: np.ndarray  # [K] float32


def _paths(names: str | list[str]) -> list[Path]:
    paths = [names] if isinstance(names, str) else names
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file: check the path")
    return [Path(path) for path in paths]


def _fingerprint(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_scored_pairs(settings: TeacherConfig, data: DataConfig, texts: Sequence[str]) -> ScoredPairs:
    """The files' scores of pairs whose texts are both among `texts`; other records are checked and passed over.

    Raises:
        UserError: anything wrong with the files, with the line at fault.
    """
    try:
        return _read(_paths(settings.scores), settings.scale, data, texts)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None


def _read(paths: list[Path], scale: str, data: DataConfig, texts: Sequence[str]) -> ScoredPairs:
    numbers: dict[str, int] = {}
    for text in texts:
        numbers.setdefault(normalised(text), len(numbers))
    keys, scores, lines, ends, forms = array("q"), array("f"), array("q"), [], []
    lowest, highest = (math.inf, ""), (-math.inf, "")
    for path in paths:
        where = None
        for where, first, second, score in _scored_pairs(path, data):
            lowest, highest = min(lowest, (score, where)), max(highest, (score, where))
            row, column = numbers.get(normalised(first)), numbers.get(normalised(second))
            if row is not None and column is not None:
                keys.append(row * len(numbers) + column)
                scores.append(score)
                lines.append(where.number)
        if where is None:
            raise UserError(f"{path}: no scored pairs in it: add some or name another file")
        ends.append(len(keys))
        forms.append(where.format)

    def name(entry: int) -> str:
        file = bisect_right(ends, entry)
        return place(paths[file], lines[entry], forms[file])

    unique, values = _unique(np.array(keys), np.array(scores), name)
    spec = StoreSpec(_fingerprint(paths), "scores", 1, hidden_size=1, dtype="float32")
    from_tool = all(look(first_record(path)) == "flagembedding" for path in paths)
    scale = _scale(scale, lowest, highest, from_tool)
    return ScoredPairs(spec, scale, list(numbers), *np.divmod(unique, max(len(numbers), 1)), values)


def _scored_pairs(path: Path, data: DataConfig) -> Iterator[tuple[Place, str, str, float]]:
    """(where it is, first text, second text, score) of every pair of a file."""
    first = first_record(path)
    foreign = None if data.text_a in first else look(first)
    data = DataConfig(format=foreign) if foreign else DataConfig(text_a=data.text_a, text_b=data.text_b, label="")
    for _, record, where in pair_records(path, data, KEY, needs_label=False):
        if "score" not in record:
            raise UserError(f"{where}: a pair without a score: score every pair, or remove it")
        yield where, record["text_a"], record["text_b"], record["score"]


def _unique(keys: np.ndarray, scores: np.ndarray, name: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, sorted by its key; of scores that differ by rounding the first counts, others are an error."""
    order = np.argsort(keys, kind="stable")
    keys, scores = keys[order], scores[order]
    apart = np.abs(scores[1:] - scores[:-1]) > SAME_SCORE * np.maximum(1, np.abs(scores[1:]))
    again = np.flatnonzero((keys[1:] == keys[:-1]) & apart)
    if len(again):
        one, other = name(order[again[0]]), name(order[again[0] + 1])
        raise UserError(f"{one} and {other} give one pair two different scores: remove one")
    first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    return keys[first], scores[first]


def _scale(declared: str, lowest: tuple[float, str], highest: tuple[float, str], from_tool: bool) -> str:
    """The declared scale if every score has it; `auto` means probabilities where they all can be such.

    Args:
        from_tool: the files are FlagEmbedding's, whose other scores are logits.
    """
    if declared == "auto" and from_tool and not 0 <= lowest[0] <= highest[0] <= 1:
        logger.info("%s: FlagEmbedding's scores beyond [0, 1] are taken as logits (teacher.scale)", KEY)
        return "logit"
    low, high, slack = RANGES["probability" if declared == "auto" else declared]
    for score, where in (lowest, highest):
        if not low - slack <= score <= high + slack:
            raise UserError(
                f"{where}: the score {score:g} lies outside [{low:g}, {high:g}]: set teacher.scale to "
                + ("cosine or logit" if declared == "auto" else f"what the scores are, {declared} they are not")
            )
    if declared == "auto":
        logger.info("%s: all scores lie in [0, 1] and are taken as probabilities (teacher.scale)", KEY)
        return "probability"
    return declared
