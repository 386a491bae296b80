"""Which entries of a contrast matrix are worth a cross-encoder's time: those whose texts share most words.

Shapes: m rows (first texts of pairs), n columns (second texts of pairs), V different words.
"""

import re
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from flipkd_dist.pairs import PairTable

WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def words_of(text: str) -> set[str]:
    """The words of a text (Chinese: its characters), lower-cased."""
    return set(WORD.findall(text.lower()))


def _incidence(texts: Sequence[set[str]], codes: dict[str, int]) -> csr_array:
    """[texts, V], 1 where the text has the word."""
    columns = [codes.setdefault(word, len(codes)) for words in texts for word in sorted(words)]
    starts = np.cumsum([0, *map(len, texts)])
    return csr_array((np.ones(len(columns), np.int64), columns, starts), shape=(len(texts), max(len(codes), 1)))


def overlaps(texts_a: Sequence[str], texts_b: Sequence[str]) -> np.ndarray:
    """Jaccard overlap of the words of every text with those of every other: float64 [m, n]."""
    words_a, words_b = [words_of(text) for text in texts_a], [words_of(text) for text in texts_b]
    codes: dict[str, int] = {}
    _incidence([*words_a, *words_b], codes)  # so that both have a column for every word
    common = (_incidence(words_a, codes) @ _incidence(words_b, codes).T).toarray()
    sizes_a, sizes_b = (np.array([len(words) for words in side], np.int64) for side in (words_a, words_b))
    return common / np.maximum(sizes_a[:, None] + sizes_b - common, 1)


def nearest_columns(pairs: PairTable, rows: np.ndarray, columns: np.ndarray, count: int) -> np.ndarray:
    """The `count` columns of each row with the highest word overlap: bool [m, n]; ties go to the earlier column.

    The row's own pair and known matches are not chosen, the losses do not use them. A row's choice depends on no other
    row, so that ranks agree on it whatever they own.

    Args:
        rows, columns: [m], [n] pair numbers: first texts of the rows, second texts of the columns.
    """
    shared = overlaps([pairs.texts[i] for i in pairs.text_a[rows]], [pairs.texts[j] for j in pairs.text_b[columns]])
    candidate = (rows[:, None] != columns) & ~pairs.known_match(rows, columns)
    order = np.argsort(np.where(candidate, -shared, np.inf), axis=1, kind="stable")[:, :count]
    chosen = np.zeros(candidate.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen & candidate
