"""Vectors by text out of a published index. Shapes: n texts, d the hidden size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flipkd_dist.store_index import Index
from flipkd_dist.store_keys import keys_of
from flipkd_dist.store_shards import StoreSpec


class StoreReader:
    """Vectors by text, read-only; touches only the pages that hold what is asked for."""

    def __init__(self, folder: Path, spec: StoreSpec, index: Index):
        self.folder, self.spec, self.index = folder, spec, index

    def __len__(self) -> int:
        """Number of unique texts."""
        return self.index.num_keys

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """The row of each text, for `at`; int64 [n].

        Raises:
            KeyError: the store is not complete for these texts (an error of ours: scoring comes first).
        """
        rows, found = self.index.find(keys_of(texts))
        if not found.all():
            first = texts[int(np.argmin(found))]
            raise KeyError(f"{self.folder} lacks {np.sum(~found)} of {len(texts)} texts, the first is {first!r}")
        return rows

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows, float32 [n, d]; what was stored in float16 is scaled back to length 1.

        Raises:
            UserError: the index is damaged there.
        """
        stored = self.index.read(np.asarray(rows)).view(self.spec.numbers)[:, : self.spec.hidden_size]
        vectors = torch.from_numpy(stored).float().numpy()  # the processor's own conversion; NumPy's takes nine times
        if self.spec.are_unit:
            vectors *= 1 / np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
        return vectors

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of texts, float32 [n, d] in the order given."""
        return self.at(self.rows(texts))
