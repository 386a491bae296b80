"""Word overlap and the columns that are chosen by it; test_contrast.py holds the search by brute force."""

import numpy as np
import pytest
from tiny import pair_table

from flipkd_dist.evaluate import token_overlap
from flipkd_dist.neighbours import nearest_columns, overlaps, words_of
from flipkd_dist.pairs import PairTable


def table(texts_a, texts_b, label=None) -> PairTable:
    texts = list(dict.fromkeys([*texts_a, *texts_b]))
    first, second = (np.array([texts.index(text) for text in side]) for side in (texts_a, texts_b))
    count, none = len(texts_a), np.full(len(texts_a), -1)
    label = np.zeros(count, np.int64) if label is None else np.array(label)
    return PairTable(texts, first, second, label, [str(i) for i in range(count)], [""] * count, none, none)


def test_overlap_is_that_of_the_metrics_table():
    pairs = pair_table(30)
    first, second = ([pairs.texts[i] for i in side] for side in (pairs.text_a, pairs.text_b))
    np.testing.assert_allclose(np.diag(overlaps(first, second)), token_overlap(pairs))
    assert 0 < token_overlap(pairs).mean() < 0.5


def test_words_and_chinese_characters():
    assert words_of("My CARD, my-card 花呗还款") == {"my", "card", "花", "呗", "还", "款"}
    np.testing.assert_allclose(
        overlaps(["a b c", "花呗", "?!"], ["b c d", "花 x", "..."]), [[0.5, 0, 0], [0, 1 / 3, 0], [0, 0, 0]]
    )


def test_the_nearest_columns_come_first_and_ties_by_their_place():
    pairs = table(["a b", "c d", "e f", "g h"], ["x", "a b c", "b a", "y"])
    batch = np.arange(4)
    assert nearest_columns(pairs, batch, batch, 1)[0].tolist() == [False, False, True, False]
    assert nearest_columns(pairs, batch, batch, 2)[0].tolist() == [False, True, True, False]
    assert nearest_columns(pairs, batch, batch, 1)[2].tolist() == [
        True,
        False,
        False,
        False,
    ]  # nothing shared: the first
    moved = batch[::-1].copy()
    assert nearest_columns(pairs, moved, moved, 1)[3].tolist() == [False, True, False, False]


def test_own_pairs_and_known_matches_are_not_chosen():
    pairs = table(["a b", "a b", "c d"], ["a b c", "b a", "c"], label=[0, 1, 0])
    batch = np.arange(3)
    chosen = nearest_columns(pairs, batch, batch, 3)
    assert chosen.tolist() == [[False, False, True], [True, False, True], [True, True, False]]  # "a b" matches "b a"


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 10), slice(4, 4)])
def test_a_row_does_not_depend_on_the_others(rows):
    pairs, batch = pair_table(24), np.random.default_rng(0).permutation(24)[:10]
    whole = nearest_columns(pairs, batch, batch, 3)
    assert np.array_equal(nearest_columns(pairs, batch[rows], batch, 3), whole[rows])
    assert whole.sum() == 30
