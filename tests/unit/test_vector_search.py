"""The nearest vectors: exact ones against a sorted list, ties, blocks, and FAISS against the exact ones."""

import errno

import numpy as np
import pytest

from flipkd_dist import vector_search
from flipkd_dist.vector_search import (
    ApproximateIndex,
    best_of,
    exact_search,
    keys,
    recall_against,
    scores_and_rows,
    vector_file,
)


def unit(count, width=16, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def sorted_lists(queries, vectors, top_k):
    """Query by query, with Python's own sort."""
    lists = []
    for query in queries.astype(np.float64):
        scores = np.array([np.float32(sum(query * vector)) for vector in vectors.astype(np.float64)])
        lists.append(sorted(range(len(vectors)), key=lambda row: (-scores[row], row))[:top_k])
    return np.array(lists)


@pytest.mark.parametrize("queries_of_a_block, cells", [(1024, 2**22), (3, 21), (4, 1)])
def test_exact_lists_with_equal_vectors_across_blocks(monkeypatch, queries_of_a_block, cells):
    monkeypatch.setattr(vector_search, "QUERIES", queries_of_a_block)
    monkeypatch.setattr(vector_search, "CELLS", cells)
    different = unit(25)
    vectors = different[np.random.default_rng(1).integers(25, size=100)]  # each about four times
    queries = np.concatenate([unit(7, seed=2), different[:3]])
    for top_k in (1, 10, 37):
        scores, rows = exact_search(queries, vectors, top_k)
        assert np.array_equal(rows, sorted_lists(queries, vectors, top_k))
        assert scores.dtype == np.float32 and (np.diff(scores, axis=1) <= 0).all()
        assert np.allclose(scores, np.einsum("qd,qkd->qk", queries, vectors[rows]), atol=1e-6)


def test_lists_are_no_longer_than_the_corpus():
    scores, rows = exact_search(unit(4), unit(3, seed=1), 10)
    assert scores.shape == rows.shape == (4, 3)
    assert exact_search(unit(0), unit(3), 2)[1].shape == (0, 2)


def test_keys_order_and_come_back():
    scores = np.array([[0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, 1e-40, -1e-40, -1.5]], np.float32)
    rows = np.array([[5, 2, 9, 2**32 - 2, 1, 7, 0, 3, 4]])
    found = best_of(keys(scores, rows), 9)
    back, order = scores_and_rows(found)
    expected = sorted(zip(scores[0].tolist(), rows[0].tolist(), strict=True), key=lambda one: (-one[0], one[1]))
    assert list(zip(back[0].tolist(), order[0].tolist(), strict=True)) == expected
    assert scores_and_rows(best_of(keys(scores, rows), 3))[1].tolist() == [[row for _, row in expected[:3]]]


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_index_finds_most_and_scores_exactly(kind):
    centres = unit(40, 32)
    draw = np.random.default_rng(3)
    vectors = centres[draw.integers(40, size=1000)] + draw.normal(0, 0.05, (1000, 32)).astype(np.float32)
    vectors = vectors[draw.integers(1000, size=3000)]  # each about three times
    queries = centres[:20] + np.float32(0.01)
    scores, rows = ApproximateIndex(kind, vectors).search(queries, 10)
    exact_scores, exact = exact_search(queries, vectors, 10)
    assert recall_against(rows, exact) > 0.9
    for own, values in zip(rows, scores, strict=True):
        assert sorted(range(10), key=lambda place: (-values[place], own[place])) == [*range(10)]
    same = rows == exact
    assert same.mean() > 0.5 and np.array_equal(scores[same], exact_scores[same])


def test_an_index_that_finds_too_few_ends_with_no_row():
    vectors = unit(1280, 8)
    index = ApproximateIndex("ivf", vectors)
    index.index.nprobe = 1
    scores, rows = index.search(unit(5, 8, seed=4), 1000)
    assert rows.shape == (5, 1000) and (rows[:, -1] == -1).all() and (rows[:, 0] >= 0).all()
    for own, values in zip(rows, scores, strict=True):
        found = (own >= 0).sum()
        assert len({*own[:found]}) == found and (own[found:] == -1).all() and np.isneginf(values[found:]).all()


def test_recall_counts_rows_whatever_their_order():
    assert recall_against(np.array([[3, 2, 1], [9, -1, -1]]), np.array([[1, 2, 3], [7, 8, 9]])) == pytest.approx(2 / 3)


def test_vectors_on_disk(tmp_path):
    with vector_file(tmp_path, 10, 4) as vectors:
        vectors[:] = unit(10, 4)
        assert np.array_equal(
            exact_search(unit(2, 4, 5), vectors, 3)[1], exact_search(unit(2, 4, 5), unit(10, 4), 3)[1]
        )
        assert not list(tmp_path.iterdir())  # nothing stays if the process is killed


def test_a_full_disk_is_told_before_the_work(small_disk):
    with pytest.raises(OSError) as full:
        with vector_file(small_disk, 100_000, 4):
            pass
    assert full.value.errno == errno.ENOSPC
