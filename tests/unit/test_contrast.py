"""Rows of the contrast matrix against the rulings, entry by entry."""

import numpy as np
import pytest
import torch
from tiny import unit_vectors

from flipkd_dist.contrast import ContrastRows, contrast_rows
from flipkd_dist.order import rows_of_rank
from flipkd_dist.pairs import PairTable

FIELDS = ("labels", "teacher_similarity", "keep", "anchor", "negative", "positive_column", "off_diagonal")


def table(pairs, num_texts: int) -> PairTable:
    """Pairs as (first text, second text, label, first group, second group) in numbers; group -1 is none."""
    text_a, text_b, label, group_a, group_b = np.array(pairs, dtype=np.int64).T
    texts, ids = [f"text {i}" for i in range(num_texts)], [str(i) for i in range(len(pairs))]
    return PairTable(texts, text_a, text_b, label, ids, [""] * len(pairs), group_a, group_b)


def crowded(num_pairs: int, seed: int) -> PairTable:
    """Few texts and few groups, so that pairs meet each other's texts, groups and positives."""
    generator = np.random.default_rng(seed)
    texts = generator.integers(9, size=(num_pairs, 2))
    groups = generator.integers(-1, 5, size=(num_pairs, 2))
    labels = generator.integers(2, size=(num_pairs, 1))
    return table(np.concatenate([texts, labels, groups], axis=1), 9)


def reference(pairs, vectors, batch, threshold, swap):
    """FlipKD, Eq 3, and the rulings: lists of lists, every entry on its own."""
    found = {name: [] for name in FIELDS}
    positives = [{a, b} for a, b, y in zip(pairs.text_a, pairs.text_b, pairs.label, strict=True) if y == 1]
    first = (pairs.text_b, pairs.group_b) if swap else (pairs.text_a, pairs.group_a)
    second = (pairs.text_a, pairs.group_a) if swap else (pairs.text_b, pairs.group_b)
    for place, i in enumerate(batch):
        similarity, keep, negative, off_diagonal = [], [], [], []
        for other_place, j in enumerate(batch):
            row, column = first[0][i], second[0][j]
            cosine = sum(float(x) * float(y) for x, y in zip(vectors[row], vectors[column], strict=True))
            on_diagonal = place == other_place
            match = on_diagonal and pairs.label[i] == 1
            same_group = first[1][i] == second[1][j] and first[1][i] != -1
            known = not on_diagonal and (row == column or same_group or {row, column} in positives)
            noise = False
            if threshold is not None:
                noise = (match and cosine < threshold) or (not match and cosine >= 1 - threshold)
            similarity.append(cosine)
            keep.append(not noise and not known)
            negative.append(keep[-1] and not on_diagonal)
            off_diagonal.append(not on_diagonal and not known)
        found["labels"].append(pairs.label[i])
        found["teacher_similarity"].append(similarity)
        found["keep"].append(keep)
        found["anchor"].append(pairs.label[i] == 1 and keep[place])
        found["negative"].append(negative)
        found["positive_column"].append(place)
        found["off_diagonal"].append(off_diagonal)
    return {name: np.array(value) for name, value in found.items()}


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.35, None])
def test_every_entry_against_the_rulings(threshold, swap):
    vectors = unit_vectors(9)
    seen = []
    for seed in range(6):
        pairs = crowded(20, seed)
        batch = np.random.default_rng(seed).permutation(20)[:14]
        rows = contrast_rows(pairs, vectors, batch, slice(0, 14), threshold, swap)
        expected = reference(pairs, vectors, batch, threshold, swap)
        for name in FIELDS:
            np.testing.assert_allclose(getattr(rows, name).numpy(), expected[name], atol=1e-6, err_msg=name)
        seen.append([rows.keep.float().mean(), rows.off_diagonal.float().mean(), rows.anchor.float().mean()])
    assert np.all(np.mean(seen, axis=0) > 0.05) and np.all(np.mean(seen, axis=0) < 0.95)  # nothing is trivial
    assert rows.labels.dtype == rows.positive_column.dtype == torch.int64 and rows.keep.dtype == torch.bool
    assert rows.teacher_similarity.dtype == torch.float32


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])
def test_the_ranks_rows_are_the_whole_in_parts(world_size, swap):
    pairs, vectors, batch = crowded(20, 7), unit_vectors(9), np.arange(3, 12)
    whole = contrast_rows(pairs, vectors, batch, slice(0, 9), 0.5, swap)
    shares = [rows_of_rank(9, rank, world_size) for rank in range(world_size)]
    parts = [contrast_rows(pairs, vectors, batch, share, 0.5, swap) for share in shares]
    for name in FIELDS:
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=0, atol=1e-6)
    assert [len(part.labels) for part in parts] == [share.stop - share.start for share in shares]
    assert all(part.keep.shape == (len(part.labels), 9) for part in parts)


def masked(pairs, swap=False, batch=None) -> list[tuple[int, int]]:
    """Entries off the diagonal that are known matches, without the noise filter."""
    batch = np.arange(len(pairs)) if batch is None else np.array(batch)
    rows = contrast_rows(pairs, unit_vectors(len(pairs.texts)), batch, slice(0, len(batch)), None, swap)
    found = ~rows.off_diagonal & ~torch.eye(len(batch), dtype=torch.bool)
    assert torch.equal(rows.keep, ~found) and torch.equal(rows.negative, rows.off_diagonal)
    return [tuple(place) for place in found.nonzero().tolist()]


def test_known_matches_one_ruling_at_a_time():
    none = (-1, -1)
    assert masked(table([(0, 1, 0, *none), (2, 3, 0, *none)], 4)) == []
    assert masked(table([(0, 1, 0, *none), (2, 0, 0, *none)], 3)) == [(0, 1)]  # equal texts
    assert masked(table([(0, 1, 0, 5, 6), (2, 3, 0, 7, 5)], 4)) == [(0, 1)]  # equal groups
    positives = [(0, 1, 1, *none), (2, 3, 1, *none)]
    assert masked(table([*positives, (0, 3, 1, *none)], 4), batch=[0, 1]) == [(0, 1)]  # a positive outside the batch
    assert masked(table([*positives, (3, 0, 1, *none)], 4), batch=[0, 1]) == [(0, 1)]  # in the other order
    assert masked(table([*positives, (1, 2, 1, *none)], 4), batch=[0, 1]) == [(1, 0)]  # not (0, 3) through 1 and 2
    assert masked(table([*positives, (0, 3, 0, *none)], 4), batch=[0, 1]) == []  # a known negative stays


def test_swapped_rows_are_second_texts():
    pairs = table([(0, 1, 0, 5, -1), (2, 0, 0, -1, 6), (3, 4, 0, 6, 5)], 5)
    assert masked(pairs) == [(0, 1), (0, 2), (2, 1)]
    assert masked(pairs, swap=True) == [(1, 0), (1, 2), (2, 0)]


def test_the_filter_at_its_borders():
    """theta = 0.5 keeps a match at a cosine of exactly 0.5 and drops a mismatch there; labels count on the diagonal."""
    vectors = np.array([[1, 0], [0.5, 0.75**0.5], [0, 1]], dtype=np.float32)
    none = (-1, -1)
    for label, kept in ((1, True), (0, False)):
        rows = contrast_rows(table([(0, 1, label, *none)], 3), vectors, np.array([0]), slice(0, 1), 0.5)
        assert rows.keep.tolist() == [[kept]] and rows.anchor.tolist() == [kept]
        assert rows.negative.tolist() == [[False]]  # a labelled mismatch is nobody's contrastive negative
    far = contrast_rows(table([(0, 2, 1, *none)], 3), vectors, np.array([0]), slice(0, 1), 0.5)
    assert not far.keep.any() and not far.anchor.any()  # the teacher contradicts the label
    strict = contrast_rows(table([(0, 1, 1, *none)], 3), vectors, np.array([0]), slice(0, 1), 0.6)
    assert not strict.anchor.any()


def test_all_fields_move_together():
    rows = contrast_rows(crowded(6, 0), unit_vectors(9), np.arange(6), slice(2, 5), 0.5)
    moved = rows.to(torch.device("meta"))
    assert isinstance(moved, ContrastRows) and all(getattr(moved, name).is_meta for name in FIELDS)
