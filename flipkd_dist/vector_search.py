"""The nearest of many vectors: exactly, in blocks, or by an approximate index that is scored exactly afterwards.

Equal scores are a matter of order: of two rows with one score the lower row comes first, also where a list is cut. A
score is a dot product in float64 rounded to float32, so that equal vectors score the same whatever block they stand in.

Shapes: Q queries, N vectors of width d, k the length of a list. A list that is too short ends with row -1.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

CELLS = 2**22  # scores of a block that are held at a time
QUERIES = 1024  # of a block at most
LAST = 2**32 - 1  # rows have 32 bits of a key
NEIGHBOURS = 32  # links of a node of HNSW
POINTS_PER_CELL = 64  # on average, of an inverted file; also the sample of each that it is trained on


@contextmanager
def vector_file(folder: Path, num_rows: int, width: int) -> Iterator[np.ndarray]:
    """An array [num_rows, width] on disk in a file without a name, gone with its process.

    Raises:
        OSError: the disk's own, before anything is computed.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, 4 * num_rows * width)  # a mapped file on a full disk ends the process
        yield np.memmap(file, np.float32, "w+", shape=(num_rows, width))


def keys(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Integers that order (score, row) pairs: a higher score is larger, then a lower row; int64 of their shape.

    Args:
        scores: float32, no NaN.
        rows: below 2^32.
    """
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32)  # + 0: one zero, not two
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    return (ordered << 32) + (LAST - rows)


def best_of(found: np.ndarray, top_k: int) -> np.ndarray:
    """The largest `top_k` keys of each row, falling: [Q, at most top_k]."""
    if found.shape[1] > top_k:
        found = np.partition(found, found.shape[1] - top_k, axis=1)[:, -top_k:]
    return -np.sort(-found, axis=1)


def scores_and_rows(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `keys` was made of: float32 scores and int64 rows."""
    ordered = (found >> 32).astype(np.int32)
    bits = np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered)
    return bits.view(np.float32), LAST - (found & LAST)


def exact_search(queries: np.ndarray, vectors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and rows int64 [Q, min(k, N)] of the nearest vectors, best first.

    Args:
        queries: [Q, d].
        vectors: [N, d], in memory or on disk.
    """
    width, length = max(1, CELLS // QUERIES), min(top_k, len(vectors))
    parts = []
    for first in range(0, len(queries), QUERIES):
        block = queries[first : first + QUERIES].astype(np.float64)
        best = np.empty((len(block), 0), np.int64)
        for start in range(0, len(vectors), width):
            some = vectors[start : start + width].astype(np.float64)
            rows = np.arange(start, start + len(some))
            found = keys((block @ some.T).astype(np.float32), rows)
            best = best_of(np.concatenate([best, found], axis=1), length)
        parts.append(best)
    return scores_and_rows(np.concatenate([np.empty((0, length), np.int64), *parts]))


class ApproximateIndex:
    """FAISS over dot products; it holds all vectors in memory.

    Args:
        kind: "hnsw", a graph, or "ivf", an inverted file over the cells of k-means.
        vectors: [N, d], in memory or on disk.
    Raises:
        ImportError: FAISS is not there.
    """

    def __init__(self, kind: str, vectors: np.ndarray):
        import faiss

        count, width = vectors.shape
        if kind == "hnsw":
            self.index = faiss.IndexHNSWFlat(width, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = 100
        else:
            cells = max(1, min(int(4 * count**0.5), count // POINTS_PER_CELL))
            self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
            self.index.nprobe = max(1, min(cells, 8 + cells // 16))
            sample = np.random.default_rng(0).permutation(count)[: cells * POINTS_PER_CELL]
            self.index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
        self.kind, self.vectors = kind, vectors
        for start in range(0, count, CELLS // width + 1):
            self.index.add(np.ascontiguousarray(vectors[start : start + CELLS // width + 1]))

    def search(self, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `exact_search`, of the rows that the index finds."""
        length = min(top_k, len(self.vectors))
        if self.kind == "hnsw":
            self.index.hnsw.efSearch = max(128, 2 * length)
        parts = []
        for first in range(0, len(queries), QUERIES // 8):
            block = np.ascontiguousarray(queries[first : first + QUERIES // 8])
            _, rows = self.index.search(block, length)
            parts.append(self._scored(block, rows))
        if not parts:
            return np.empty((0, length), np.float32), np.empty((0, length), np.int64)
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _scored(self, queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows [Q, k] with exact scores, in their order."""
        found = np.empty(rows.shape, np.int64)
        for number, own in enumerate(rows):
            exact = self.vectors[np.maximum(own, 0)].astype(np.float64) @ queries[number].astype(np.float64)
            found[number] = keys(np.where(own < 0, -np.inf, exact).astype(np.float32), np.where(own < 0, LAST, own))
        scores, best = scores_and_rows(best_of(found, rows.shape[1]))
        return scores, np.where(best == LAST, -1, best)


def recall_against(found: np.ndarray, exact: np.ndarray) -> float:
    """The mean share of the exact lists' rows that are among the found ones, both [Q, k]."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))
