"""Texts as 16-byte keys, keys in sorted tables, and the checksum that ties a row of numbers to its key.

Shapes: n keys asked for, m keys of a table, w words of 8 bytes in a row. A key is two words [2], the first one sorted.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice

import numpy as np

WORD = np.dtype("<u8")
CHUNK = 65536  # texts that are looked up at once
WINDOW = 32  # keys that are compared with a value in the end
REFINEMENTS = 3  # of the place of a value in a table of hashes
BLOCK = 1024  # rows whose checksums are computed at once, so that they stay in the processor's cache


def normalised(text: str) -> str:
    """What the teacher reads in place of the text: composed Unicode (NFC), single spaces; NUL parts a pair's texts."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\0" not in text:
        return " ".join(text.split())
    return "\0".join(" ".join(part.split()) for part in text.split("\0"))


def pair_text(text_a: str, text_b: str) -> str:
    """A pair as the one text that a store of pair scores knows it by; `split("\\0")` gives its texts back."""
    return normalised("\0".join(text.replace("\0", " ") for text in (text_a, text_b)))


def text_key(text: str) -> bytes:
    """16 bytes that stand for the normalised text."""
    return hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """The keys of texts, words [n, 2]."""
    return np.frombuffer(b"".join(map(text_key, texts)), WORD).reshape(-1, 2)


def chunks(texts: Iterable[str], size: int = CHUNK) -> Iterator[list[str]]:
    """Lists of `size` texts, the last one shorter."""
    texts = iter(texts)
    while chunk := list(islice(texts, size)):
        yield chunk


def find(first: np.ndarray, second: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Look keys up in a table that is sorted by the first word alone.

    Args:
        first, second: words [m]; equal first words may stand in any order.
        keys: words [n, 2].

    Returns:
        (position in the table, 0 where it is not there; whether it is there), both [n].
    """
    position, found = _lower_bound(first, keys[:, 0]), np.zeros(len(keys), bool)
    left = np.arange(len(keys))
    while len(left):  # once, and once more for each key whose first word another key has too
        left = left[position[left] < len(first)]
        left = left[first[position[left]] == keys[left, 0]]
        hit = second[position[left]] == keys[left, 1]
        found[left[hit]] = True
        left = left[~hit]
        position[left] += 1
    position[~found] = 0
    return position, found


def _lower_bound(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`np.searchsorted` of values [n] in a large table [m] of hashes, in half of the time.

    Hashes are spread evenly, so that a value says where it stands, up to the root of m; from what stands there the
    place follows up to the root of that, and so on. What is not found near the place in the end is searched for.
    """
    if len(table) < 4 * WINDOW:
        return np.searchsorted(table, values)
    scale, last = len(table) / 2.0**64, len(table) - 1
    exact = values.astype(np.float64)
    place = np.clip((exact * scale).astype(np.int64), 0, last)
    for _ in range(REFINEMENTS):
        place = np.clip(place + ((exact - table[place]) * scale).astype(np.int64), 0, last)
    start = np.clip(place - WINDOW // 2, 0, len(table) - WINDOW)
    below = (table[start[:, None] + np.arange(WINDOW)] < values[:, None]).sum(1)
    far = np.flatnonzero((below == 0) | (below == WINDOW))
    position = start + below
    position[far] = np.searchsorted(table, values[far])
    return position


def unique_order(keys: np.ndarray) -> np.ndarray:
    """The positions that sort keys [n, 2], each key once: of equal ones the earliest. int64 [m]."""
    order = np.argsort(keys[:, 0], kind="stable")  # four times as fast as np.lexsort
    first = keys[order, 0]
    same = np.zeros(len(keys) + 1, bool)  # as the one before
    same[1:-1] = first[1:] == first[:-1]
    in_run = np.flatnonzero(same[:-1] | same[1:])
    if not len(in_run):
        return order
    runs = order[in_run]
    runs = runs[np.lexsort((keys[runs, 1], keys[runs, 0]))]
    order[in_run] = runs
    repeated = np.zeros(len(keys), bool)
    repeated[in_run[1:]] = (keys[runs[1:]] == keys[runs[:-1]]).all(1)
    return order[~repeated]


class KeySet:
    """A growing set of keys: sorted runs, each at least twice as long as the next, so that adding stays cheap."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> None:
        """Add keys [n, 2]."""
        run = keys[unique_order(keys)]
        while self.runs and len(self.runs[-1]) < 2 * len(run):
            both = np.concatenate([self.runs.pop(), run])
            run = both[unique_order(both)]
        self.runs.append(run)

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Which keys are in the set, bool [n]."""
        found = np.zeros(len(keys), bool)
        for run in self.runs:
            found |= find(run[:, 0], run[:, 1], keys)[1]
        return found


@cache
def _weights(count: int) -> np.ndarray:
    """Odd multipliers without a pattern (the finaliser of SplitMix64), words [count]."""
    word = np.arange(1, count + 1, dtype=WORD) * WORD.type(0x9E3779B97F4A7C15)
    word = (word ^ (word >> WORD.type(30))) * WORD.type(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> WORD.type(27))) * WORD.type(0x94D049BB133111EB)
    return (word ^ (word >> WORD.type(31))) | WORD.type(1)


def checksums(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A checksum of each row [n, w] together with its key [n, 2], words [n].

    A sum of the words, each times an odd number, modulo 2^64: a change within one word is always seen, any other but
    for one in about 2^63. A row of zeros has a checksum of its key. 256 rows of 768 bytes take 0.05 ms.
    """
    weights, sums = _weights(2 + rows.shape[1]), np.empty(len(rows), WORD)
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        sums[part] = _folded(rows[part]) @ weights[2:] + _folded(keys[part]) @ weights[:2]
    return sums


def _folded(words: np.ndarray) -> np.ndarray:
    """High halves mixed into the low ones: else two flipped highest bits would cancel out."""
    folded = words >> WORD.type(32)
    folded ^= words
    return folded
