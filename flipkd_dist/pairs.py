"""Labelled pairs as one table: unique texts once, pairs as numbers into them, and which pairs are known to match.

Shapes: N pairs of the table, m and n pairs asked about.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import label_of, name_of, text_of
from flipkd_dist.pair_files import file_format, place, read_records


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
        text_a, text_b = self.text_a[rows_a][:, None], self.text_b[rows_b]
        group_a, group_b = self.group_a[rows_a][:, None], self.group_b[rows_b]
        keys = self._keys(text_a, text_b)
        positive = self._positive_keys[np.searchsorted(self._positive_keys, keys)] == keys
        return (text_a == text_b) | ((group_a == group_b) & (group_a != -1)) | positive

    def _keys(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """One number for two texts in either order."""
        return np.minimum(one, other) * len(self.texts) + np.maximum(one, other)

    @cached_property
    def _positive_keys(self) -> np.ndarray:
        """Sorted keys of the positives, and one beyond all keys, so that every search ends inside the array."""
        positive = self.label == 1
        keys = np.unique(self._keys(self.text_a[positive], self.text_b[positive]))
        return np.append(keys, np.iinfo(np.int64).max)


class _Codes(dict):
    """Numbers from 0 for values, in order of first appearance."""

    def __missing__(self, value: str) -> int:
        code = self[value] = len(self)
        return code


def read_pairs(paths: str | Path | list[str] | None, data: DataConfig, key: str) -> PairTable:
    """Read labelled pairs from a file, several files or a hub split `org/name:split`.

    Args:
        paths: what the configuration gives under `key`.
        data: the format and the names of the columns.
        key: the configuration key to name in errors, such as `data.train`.
    Raises:
        UserError: anything wrong with the files, with the line at fault.
    """
    try:
        return _read([paths] if isinstance(paths, str | Path) else list(paths or []), data)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _read(paths: list[str | Path], data: DataConfig) -> PairTable:
    if not all(paths) or not paths:
        raise UserError("no pairs are given: set it to a file, a list of files or a hub id org/name:split")
    if data.text_a == data.text_b:
        raise UserError(f"data.text_a and data.text_b both name the column {data.text_a}: name two columns")
    texts, groups = _Codes(), _Codes()
    pairs: list[tuple[int, int, int, int, int]] = []
    places: dict[str, tuple[str | Path, int, str]] = {}  # of each id
    kinds: list[str] = []
    for path, prefix in zip(paths, _id_prefixes(paths), strict=True):
        format, before = file_format(path, data.format), len(pairs)
        for number, record in read_records(path, format):
            try:
                text_a = text_of(record, data.text_a, "data.text_a")
                text_b = text_of(record, data.text_b, "data.text_b")
                label = label_of(record, data.label, "data.label")
                group_a, group_b = name_of(record, "group_a"), name_of(record, "group_b")
                pair_id = name_of(record, "id") or f"{prefix}:{number}"
                if pair_id in places:
                    raise UserError(f"id {pair_id!r} stands at {place(*places[pair_id])} too: make ids unique")
                places[pair_id] = (path, number, format)
                kinds.append(name_of(record, "kind"))
            except UserError as error:
                raise UserError(f"{place(path, number, format)}: {error}") from None
            codes = [groups[group] if group else -1 for group in (group_a, group_b)]
            pairs.append((texts[text_a], texts[text_b], label, *codes))
        if len(pairs) == before:
            raise UserError(f"{path}: no pairs in it: add some or name another file")
    columns = np.array(pairs, dtype=np.int64).T.copy()
    return PairTable(list(texts), *columns[:3], list(places), kinds, *columns[3:])


def _id_prefixes(paths: list[str | Path]) -> list[str]:
    """What the ids of a file without ids begin with: its stem, or its path where two files share a stem."""
    for path in paths:
        if [str(other) for other in paths].count(str(path)) > 1:
            raise UserError(f"{path}: listed twice: remove one")
    stems = [Path(path).stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for path, stem in zip(paths, stems, strict=True)]
