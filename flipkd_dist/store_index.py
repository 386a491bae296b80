"""What readers map into memory: an array of rows in the order of the shards, and the sorted keys that point into it.

    ROWS  header | per row: vector, padded to words [w], checksum [1]
    KEYS  header | first words, sorted [m] | second words [m] | row numbers [m]

A row's checksum covers its key, and the key is taken from KEYS: damage in either file, a row number included, is
noticed by the row that is read. Headers are JSON of 4,096 bytes with the id of this index, so that files of two
indexes never serve together. Shapes as in store_keys.py; w words of a row, m keys.
"""

import json
import mmap
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flipkd_dist.durable import whole_file
from flipkd_dist.errors import UserError
from flipkd_dist.store_keys import WORD, checksums, find, unique_order

HEADER = 4096  # bytes
FORMAT = 1
SUFFIXES = ("rows", "keys")


def damaged(path: Path, what: str) -> UserError:
    """A broken file of a store, as the user should hear of it."""
    return UserError(f"{path}: {what}: mend the store with `flipkd store verify --repair {path.parent}`")


def index_paths(folder: Path, stem: str, index_id: str) -> list[Path]:
    return [folder / f"{stem}-{index_id}.{suffix}" for suffix in SUFFIXES]


def _head(index_id: str, suffix: str, num_keys: int, num_rows: int, words: int) -> bytes:
    said = dict(format=FORMAT, id=index_id, kind=suffix, num_keys=num_keys, num_rows=num_rows, words=words)
    return json.dumps(said).encode().ljust(HEADER - 1) + b"\n"


def write_index(
    folder: Path, stem: str, words: int, parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> dict[str, Any]:
    """Write both files, durably.

    Args:
        words: w.
        parts: (keys [k, 2], rows [k, w], their checksums [k]), one in memory at a time. Of equal keys the first counts.

    Returns:
        What `Index` needs to know: id, num_keys, num_rows, words. Some 36 bytes a text
        are in memory while the keys are sorted.

    Raises:
        UserError: the disk is full.
    """
    index_id = uuid.uuid4().hex[:16]
    rows_path, keys_path = index_paths(folder, stem, index_id)
    with whole_file(rows_path) as file:
        keys = _write_rows(file, words, parts)
        entry = dict(id=index_id, num_keys=0, num_rows=len(keys), words=words)
        order = unique_order(keys)
        entry["num_keys"] = len(order)
        file.seek(0)
        file.write(_head(index_id, "rows", len(order), len(keys), words))
    try:
        with whole_file(keys_path) as file:
            file.write(_head(index_id, "keys", len(order), len(keys), words))
            for column in (0, 1):
                file.write(keys[order, column].data)
            file.write(order.astype("<i8", copy=False).data)
    except BaseException:
        rows_path.unlink(missing_ok=True)
        raise
    return entry


def _write_rows(file: BinaryIO, words: int, parts: Iterable) -> np.ndarray:
    """Rows behind an empty header; returns their keys [rows, 2]."""
    file.write(bytes(HEADER))
    found = [np.empty((0, 2), WORD)]
    for keys, rows, sums in parts:
        record = np.empty((len(keys), words + 1), WORD)
        record[:, :-1], record[:, -1] = rows, sums
        file.write(record.data)
        found.append(keys)
    return np.concatenate(found)


class Index:
    """Both files, mapped read-only; pages are read when they are touched and shared by all processes of a machine."""

    def __init__(self, folder: Path, stem: str, entry: dict[str, Any]):
        """
        Raises:
            UserError: a file is missing, of another size, or not of this index.
        """
        self.id, self.num_keys, self.num_rows = entry["id"], entry["num_keys"], entry["num_rows"]
        self.rows_path, self.keys_path = index_paths(folder, stem, self.id)
        words = entry["words"]
        head = [self.id, self.num_keys, self.num_rows, words]
        rows = _mapped(self.rows_path, "rows", head, self.num_rows * (words + 1))
        self.first, self.second, place = _mapped(self.keys_path, "keys", head, 3 * self.num_keys).reshape(3, -1)
        self.place = place.view("<i8")
        self.rows = rows.reshape(-1, words + 1)

    @property
    def nbytes(self) -> int:
        """Bytes of both files."""
        return 2 * HEADER + WORD.itemsize * (self.rows.size + 3 * self.num_keys)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position, 0 where it is not there; whether it is there) of each key [n, 2]."""
        return find(self.first, self.second, keys)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """The rows at positions of the sorted keys, words [n, w].

        Raises:
            UserError: a row does not match its checksum.
        """
        place = self.place[positions]
        outside = (place < 0) | (place >= self.num_rows)
        if outside.any():
            raise damaged(self.keys_path, f"row number {place[np.argmax(outside)]} is damaged")
        records = self.rows[place]
        keys = np.stack([self.first[positions], self.second[positions]], axis=-1)
        wrong = checksums(keys, records[:, :-1]) != records[:, -1]
        if wrong.any():
            raise damaged(self.rows_path, f"row {place[np.argmax(wrong)]}, or what points to it, is damaged")
        return records[:, :-1]

    def rows_in_order(self, start: int, count: int) -> np.ndarray:
        """Rows with their checksums, words [count, w + 1], read ahead as files are."""
        width = self.rows.shape[1]
        offset = HEADER + start * width * WORD.itemsize
        return np.fromfile(self.rows_path, WORD, count * width, offset=offset).reshape(-1, width)


def _mapped(path: Path, suffix: str, head: list, num_words: int) -> np.ndarray:
    """The words [num_words] behind the header of a file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != HEADER + num_words * WORD.itemsize:
                raise damaged(path, f"has {size:,} bytes, {HEADER + num_words * WORD.itemsize:,} were written")
            index_id, num_keys, num_rows, words = head
            if file.read(HEADER) != _head(index_id, suffix, num_keys, num_rows, words):
                raise damaged(path, "its header is not the one of this index")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    if suffix == "rows":
        content.madvise(mmap.MADV_RANDOM)  # rows are asked for in no order: what stands beside one is not wanted
    return np.frombuffer(content, WORD, offset=HEADER)
