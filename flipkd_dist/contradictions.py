"""The pairs whose label and teacher contradict each other most, found in one pass over any number of pairs."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ContradictoryPair:
    similarity: float  # the teacher's
    label: int  # 1 = match
    text_a: str
    text_b: str
    id: str = ""  # as in the pairs' file, or its place there

    @property
    def gap(self) -> float:
        return abs(self.label - self.similarity)


class ContradictoryPairs:
    """Keeps the `limit` pairs with the largest |label - similarity|; of equal ones those that came first."""

    def __init__(self, limit: int = 20):
        self.limit = limit
        self._heap: list[tuple[float, int, ContradictoryPair]] = []  # (gap, -number, pair), the least of them on top
        self._num_seen = 0

    def add(
        self,
        similarity: np.ndarray,
        label: np.ndarray,
        texts_a: Sequence[str],
        texts_b: Sequence[str],
        ids: Sequence[str] | None = None,
    ) -> None:
        """Look at the next m pairs; what is not finite is passed over.

        Args:
            similarity, label: [m] teacher similarities and labels (0/1).
            texts_a, texts_b, ids: [m]; only those of pairs that are kept are read.
        """
        similarity, label = np.asarray(similarity, np.float64), np.asarray(label)
        gap = np.abs(label - similarity)
        gap[~np.isfinite(gap)] = -np.inf
        least = self._heap[0][0] if len(self._heap) >= self.limit else -np.inf
        candidates = np.flatnonzero(gap > least)  # an equal one came later than those that are kept
        for row in candidates[np.argsort(-gap[candidates], kind="stable")[: self.limit]].tolist():
            name = ids[row] if ids is not None else ""
            pair = ContradictoryPair(float(similarity[row]), int(label[row]), texts_a[row], texts_b[row], name)
            entry = (float(gap[row]), -(self._num_seen + row), pair)
            if len(self._heap) < self.limit:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)
        self._num_seen += len(gap)

    def worst(self) -> list[ContradictoryPair]:
        """The kept pairs, the most contradictory one first."""
        return [pair for _, _, pair in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
