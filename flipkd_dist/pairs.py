"""Labelled pairs as one table: unique texts once, pairs as numbers into them, and which pairs are known to match.

Shapes: N pairs of the table, m and n pairs asked about.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_formats import pair_id, pair_records


@dataclass(frozen=True, eq=False)
class PairTable:
    """Pairs in the order of their files. Codes: equal code = equal group, -1 = no group."""

    texts: list[str]  # unique, in order of first appearance
    text_a: np.ndarray  # [N] int64, numbers into texts
    text_b: np.ndarray  # [N] int64, numbers into texts
    label: np.ndarray  # [N] int64, 1 = match
    ids: list[str]  # [N], unique
    kind: list[str]  # [N], "" where the file names none
    group_a: np.ndarray  # [N] int64 codes
    group_b: np.ndarray  # [N] int64 codes

    def __len__(self) -> int:
        return len(self.ids)

    def labelled_texts(self) -> Iterator[tuple[str, str]]:
        """First and second text of every pair."""
        return ((self.texts[a], self.texts[b]) for a, b in zip(self.text_a, self.text_b, strict=True))

    def known_match(self, rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
        """Where the first text of pair i is known to match the second text of pair j: bool [m, n].

        Known are equal texts, equal groups, and the positives of this table in either order; no transitive closure.

        Args:
            rows_a: [m] pair numbers whose first texts are the rows.
            rows_b: [n] pair numbers whose second texts are the columns.
        Source: FlipKD, section 3, and our ruling on off-diagonal entries.
        """
        text_a, text_b = self.text_a[rows_a], self.text_b[rows_b]
        group_a, group_b = self.group_a[rows_a], self.group_b[rows_b]
        match = self._are_positive(text_a, text_b)
        match |= text_a[:, None] == text_b
        match |= np.where(group_a == -1, -2, group_a)[:, None] == group_b  # -2 is nobody's code
        return match

    def _are_positive(self, text_a: np.ndarray, text_b: np.ndarray) -> np.ndarray:
        """Where a row's text [m] and a column's text [n] are a positive of the table, in either order: bool [m, n].

        Most texts have few positives: they are looked up among the columns, not every entry among the positives. A text
        with more positives than there are columns has the columns looked up among them.
        """
        unique, row_of = np.unique(text_a, return_inverse=True)
        order = np.argsort(text_b)
        columns = text_b[order]
        texts, partners = self._positives
        start, stop = np.searchsorted(texts, unique), np.searchsorted(texts, unique, "right")
        is_hub = stop - start > len(columns)
        row, place = _spread(start, np.where(is_hub, start, stop))
        wanted = partners[place]
        hit, at = _spread(np.searchsorted(columns, wanted), np.searchsorted(columns, wanted, "right"))
        found = np.zeros((len(unique), len(columns)), bool)
        found[row[hit], order[at]] = True
        for hub in np.flatnonzero(is_hub):
            own = partners[start[hub] : stop[hub]]
            nearest = own[np.minimum(np.searchsorted(own, columns), len(own) - 1)]
            found[hub, order] = nearest == columns
        return found[row_of]

    @cached_property
    def _positives(self) -> np.ndarray:
        """Both texts of every positive, in either order, sorted by both: int64 [2, 2 positives]."""
        positive = self.label == 1
        one, other = self.text_a[positive], self.text_b[positive]
        both = np.stack([np.concatenate([one, other]), np.concatenate([other, one])])
        return both[:, np.lexsort(both[::-1])]


def _spread(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All places of all ranges, one after the other, and which range each is of."""
    lengths = stop - start
    which = np.repeat(np.arange(len(start)), lengths)
    return which, np.arange(len(which)) + (start - np.cumsum(lengths) + lengths)[which]


class _Codes(dict):
    """Numbers from 0 for values, in order of first appearance."""

    def __missing__(self, value: str) -> int:
        code = self[value] = len(self)
        return code


class PairRecord(NamedTuple):
    """A labelled pair as its file gives it; "" where an optional name is absent."""

    text_a: str
    text_b: str
    label: int
    group_a: str
    group_b: str
    id: str
    kind: str


class Places(Protocol):
    """Where each id was first seen; a dict is one."""

    def setdefault(self, name: str, place: str) -> str: ...


def read_pairs(paths: str | Path | list[str] | None, data: DataConfig, key: str) -> PairTable:
    """Read labelled pairs from a file, several files or a hub split `org/name:split`.

    Args:
        paths: what the configuration gives under `key`.
        data: the format and the names of the columns.
        key: the configuration key to name in errors, such as `data.train`.
    Raises:
        UserError: anything wrong with the files, with the line at fault.
    """
    texts, groups = _Codes(), _Codes()
    pairs: list[tuple[int, int, int, int, int]] = []
    ids, kinds = [], []
    for pair in stream_pairs(paths, data, key, {}):
        codes = [groups[group] if group else -1 for group in (pair.group_a, pair.group_b)]
        pairs.append((texts[pair.text_a], texts[pair.text_b], pair.label, *codes))
        ids.append(pair.id)
        kinds.append(pair.kind)
    columns = np.array(pairs, dtype=np.int64).T.copy()
    return PairTable(list(texts), *columns[:3], ids, kinds, *columns[3:])


def stream_pairs(
    paths: str | Path | list[str] | None, data: DataConfig, key: str, places: Places
) -> Iterator[PairRecord]:
    """The records that `read_pairs` makes its table of, each checked, one in memory at a time.

    Args:
        places: empty; it learns where each id stands.
    """
    try:
        yield from _stream([paths] if isinstance(paths, str | Path) else list(paths or []), data, places)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _stream(paths: list[str | Path], data: DataConfig, places: Places) -> Iterator[PairRecord]:
    if not all(paths) or not paths:
        raise UserError("no pairs are given: set it to a file, a list of files or a hub id org/name:split")
    if data.text_a == data.text_b:
        raise UserError(f"data.text_a and data.text_b both name the column {data.text_a}: name two columns")
    for path, prefix in zip(paths, _id_prefixes(paths), strict=True):
        number = None
        for number, record, where in pair_records(path, data):
            name, here = pair_id(record, number, prefix), f"{number}\t{where}"
            before = places.setdefault(name, here)
            if before != here and not record.get("id"):  # the same two texts judged twice: the number tells them apart
                name = f"{name}@{number}"
                before = places.setdefault(name, here)
            if before != here:
                there = before.partition("\t")[2]
                raise UserError(f"{where}: id {name!r} stands at {there} too: make ids unique")
            optional = (record.get(key, "") for key in ("group_a", "group_b"))
            yield PairRecord(
                record["text_a"], record["text_b"], record["label"], *optional, name, record.get("kind", "")
            )
        if number is None:
            raise UserError(f"{path}: no pairs in it: add some or name another file")


def _id_prefixes(paths: list[str | Path]) -> list[str]:
    """What the ids of a file without ids begin with: its stem, or its path where two files share a stem."""
    for path in paths:
        if [str(other) for other in paths].count(str(path)) > 1:
            raise UserError(f"{path}: listed twice: remove one")
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for path, stem in zip(paths, stems, strict=True)]
