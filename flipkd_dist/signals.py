"""What the teacher says about the pairs of a table: similarities of entries of a contrast matrix, and which are known.

Vectors and scores come out of the store's memory maps, a batch at a time; only row numbers and one score per labelled
pair are held. Shapes: N pairs of the table, K pairs with a score, n pairs of a contrast batch, m of them a rank's own,
d the teacher's hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flipkd_dist.calibration import Meaning
from flipkd_dist.neighbours import nearest_columns
from flipkd_dist.pairs import PairTable
from flipkd_dist.store import StoreReader, normalised, pair_text

CHUNK = 16384  # pairs looked up at once
COLUMNS = 1024  # of a matrix: what is looked up at once stays in the processor's cache
COSINE = Meaning("cosine")


@dataclass(frozen=True, eq=False)
class TextTeacher:
    """Similarities of any two texts: dot products of stored unit vectors."""

    reader: StoreReader
    meaning: Meaning = COSINE

    def cosines(self, rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
        """Of text k with text k, by their rows in the store: float32 [k]."""
        parts = [
            np.einsum("nd,nd->n", self.reader.at(rows_a[at : at + CHUNK]), self.reader.at(rows_b[at : at + CHUNK]))
            for at in range(0, len(rows_a), CHUNK)
        ]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def matrix(self, rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
        """alpha of every text of one side with every text of the other, by their rows: float32 [m, n]."""
        cosines, vectors = np.empty((len(rows_a), len(rows_b)), np.float32), self.reader.at(rows_a)
        for start in range(0, len(rows_b), COLUMNS):
            part = slice(start, start + COLUMNS)
            cosines[:, part] = vectors @ self.reader.at(rows_b[part]).T
        return self.meaning.similarity(cosines, lambda _: "a pair of vectors")

    def of_texts(self, texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
        """alpha of text k with text k: float32 [k]."""
        cosines = self.cosines(self.reader.rows(texts_a), self.reader.rows(texts_b))
        return self.meaning.similarity(cosines, lambda _: "a pair of vectors")


@dataclass(frozen=True, eq=False)
class PairTeacher:
    """Similarities of the pairs that have a stored score."""

    reader: StoreReader
    meaning: Meaning
    neighbours: int = 0  # columns of each row of a contrast batch whose scores are stored too

    def scores(self, texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
        """Raw scores of text k with text k, float32 [k].

        Raises:
            KeyError: the store lacks one (an error of ours: scoring comes first).
        """
        found = [np.empty(0, np.float32)]
        for at in range(0, len(texts_a), CHUNK):
            pairs = zip(texts_a[at : at + CHUNK], texts_b[at : at + CHUNK], strict=True)
            found.append(self.reader.at(self.reader.rows([pair_text(*pair) for pair in pairs]))[:, 0])
        return np.concatenate(found)

    def of_texts(self, texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
        """alpha of text k with text k: float32 [k].

        Raises:
            UserError: a score that is not of the declared scale.
        """

        def name(k: int) -> str:
            return f"the pair {texts_a[k][:80]!r}, {texts_b[k][:80]!r}"

        return self.meaning.similarity(self.scores(texts_a, texts_b), name)


class TeacherSignals:
    """The teacher, bound to the pairs of one table.

    Args:
        texts: the teacher of single texts; every entry is known then.
        scored: the teacher of pairs; its word counts where both know an entry.
        also: [K, 2] numbers into `pairs.texts`: pairs with a score besides the labelled ones.
    Source: FlipKD, section 2; teachers of pairs are ours (docs/teacher_scores.md).
    """

    def __init__(
        self,
        pairs: PairTable,
        texts: TextTeacher | None = None,
        scored: PairTeacher | None = None,
        also: np.ndarray | None = None,
    ):
        assert texts is not None or scored is not None
        self.pairs, self.texts, self.scored = pairs, texts, scored
        self._rows = None if texts is None else texts.reader.rows(pairs.texts)
        if scored is not None:
            self._hold_scores(np.empty((0, 2), np.int64) if also is None else also)

    def _hold_scores(self, also: np.ndarray) -> None:
        """alpha of the pairs with a score, sorted by a key made of their texts, equal ones with equal codes."""
        codes: dict[str, int] = {}
        self._codes = np.array([codes.setdefault(normalised(t), len(codes)) for t in self.pairs.texts], np.int64)
        first = np.concatenate([self.pairs.text_a, also[:, 0]])
        second = np.concatenate([self.pairs.text_b, also[:, 1]])
        self._keys, places = np.unique(self._key(first, second), return_index=True)
        self._alpha = self._scored(first[places], second[places])

    def _key(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return self._codes[first] * len(self._codes) + self._codes[second]

    def _scored(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        texts = self.pairs.texts
        return self.scored.of_texts([texts[i] for i in first], [texts[j] for j in second])

    def similarity(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha of first texts with second texts (numbers into `pairs.texts`), and where it is known without a batch.

        Returns:
            float32 [m, n], 0 where it is unknown, and bool [m, n].
        """
        shape = (len(first), len(second))
        if self.texts is None:
            alpha, known = np.zeros(shape, np.float32), np.zeros(shape, bool)
        else:
            alpha, known = self.texts.matrix(self._rows[first], self._rows[second]), np.ones(shape, bool)
        if self.scored is not None and len(self._keys):
            keys = self._key(first[:, None], second)
            places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            held = self._keys[places] == keys
            alpha, known = np.where(held, self._alpha[places], alpha), known | held
        return alpha, known

    def of_batch(self, batch: np.ndarray, own: slice, swap: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Rows `own` of the contrast matrix over `batch`: as `similarity`, scored neighbours included.

        A pure function of the table, the batch and the stored values: ranks agree on every entry.

        Args:
            batch: [n] pair numbers of the contrast batch.
            swap: rows are second texts and columns first texts. A pair's score is that of (first, second) all the same.
        """
        rows, columns = (batch, batch[own]) if swap else (batch[own], batch)
        first, second = self.pairs.text_a[rows], self.pairs.text_b[columns]
        alpha, known = self.similarity(first, second)
        if self.scored is not None and self.scored.neighbours:
            chosen = nearest_columns(self.pairs, rows, batch, self.scored.neighbours)
            row, column = np.nonzero(chosen[:, own] if swap else chosen)
            alpha[row, column] = self._scored(first[row], second[column])
            known[row, column] = True
        return (alpha.T.copy(), known.T.copy()) if swap else (alpha, known)

    def of_pairs(self) -> np.ndarray:
        """alpha of the table's own pairs, float32 [N]."""
        if self.scored is not None:
            return self._alpha[np.searchsorted(self._keys, self._key(self.pairs.text_a, self.pairs.text_b))]
        return self.texts.meaning.similarity(self.cosines(), self._name)

    def cosines(self) -> np.ndarray:
        """What the vectors alone say of the table's pairs, uncalibrated: float32 [N]."""
        return self.texts.cosines(self._rows[self.pairs.text_a], self._rows[self.pairs.text_b])

    def _name(self, pair: int) -> str:
        return f"pair {self.pairs.ids[pair]}"

    def off_diagonal(self, batches: Iterable[np.ndarray], size: int) -> np.ndarray:
        """alpha of known entries off the diagonal of contrast batches, at most `size` of them: float32 [k].

        Entries that are known to match are left out. Without a teacher of texts such entries are the only ones there
        are; with one, `TextTeacher.of_texts` of random texts serves as well and sees more of them.
        """
        found, left = [np.empty(0, np.float32)], size
        for batch in batches:
            alpha, known = self.of_batch(batch, slice(0, len(batch)))
            known &= (batch[:, None] != batch) & ~self.pairs.known_match(batch, batch)
            found.append(alpha[known][:left])
            left -= len(found[-1])
            if left == 0:
                break
        return np.concatenate(found)
