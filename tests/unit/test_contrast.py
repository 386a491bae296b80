"""Rows of the contrast matrix against the rulings, entry by entry."""

import numpy as np
import pytest
import torch
from tiny import ArrayReader, PairReader, sentences, signals_of, unit_vectors

from flipkd_dist.calibration import Meaning
from flipkd_dist.contrast import ContrastRows, contrast_rows
from flipkd_dist.losses import contrastive_sum, distance_sum, mcl_margins
from flipkd_dist.order import rows_of_rank
from flipkd_dist.pairs import PairTable
from flipkd_dist.signals import PairTeacher, TeacherSignals, TextTeacher

FIELDS = ("labels", "teacher_similarity", "keep", "anchor", "negative", "positive_column", "off_diagonal")


def table(pairs, num_texts: int) -> PairTable:
    """Pairs as (first text, second text, label, first group, second group) in numbers; group -1 is none."""
    text_a, text_b, label, group_a, group_b = np.array(pairs, dtype=np.int64).T
    texts, ids = sentences(num_texts, seed=4), [str(i) for i in range(len(pairs))]
    return PairTable(texts, text_a, text_b, label, ids, [""] * len(pairs), group_a, group_b)


def crowded(num_pairs: int, seed: int, num_texts: int = 9) -> PairTable:
    """Few texts and few groups, so that pairs meet each other's texts, groups and positives."""
    generator = np.random.default_rng(seed)
    texts = generator.integers(num_texts, size=(num_pairs, 2))
    groups = generator.integers(-1, 5, size=(num_pairs, 2))
    labels = generator.integers(2, size=(num_pairs, 1))
    return table(np.concatenate([texts, labels, groups], axis=1), num_texts)


def reference(pairs, say, batch, threshold, swap):
    """FlipKD, Eq 3, and the rulings: lists of lists, every entry on its own.

    Args:
        say: from the places in the batch of a first and a second text to the teacher's similarity, None if unknown.
    """
    found = {name: [] for name in FIELDS}
    positives = [{a, b} for a, b, y in zip(pairs.text_a, pairs.text_b, pairs.label, strict=True) if y == 1]
    first = (pairs.text_b, pairs.group_b) if swap else (pairs.text_a, pairs.group_a)
    second = (pairs.text_a, pairs.group_a) if swap else (pairs.text_b, pairs.group_b)
    for place, i in enumerate(batch):
        similarity, keep, negative, off_diagonal = [], [], [], []
        for other_place, j in enumerate(batch):
            row, column = first[0][i], second[0][j]
            alpha = say(other_place, place) if swap else say(place, other_place)
            unknown = alpha is None
            alpha = 0.0 if unknown else alpha
            on_diagonal = place == other_place
            match = on_diagonal and pairs.label[i] == 1
            same_group = first[1][i] == second[1][j] and first[1][i] != -1
            known = not on_diagonal and (row == column or same_group or {row, column} in positives)
            noise = False
            if threshold is not None:
                noise = (match and alpha < threshold) or (not match and alpha >= 1 - threshold)
            similarity.append(alpha)
            keep.append(not noise and not known and not unknown)
            negative.append(keep[-1] and not on_diagonal)
            off_diagonal.append(not on_diagonal and not known and not unknown)
        found["labels"].append(pairs.label[i])
        found["teacher_similarity"].append(similarity)
        found["keep"].append(keep)
        found["anchor"].append(pairs.label[i] == 1 and keep[place])
        found["negative"].append(negative)
        found["positive_column"].append(place)
        found["off_diagonal"].append(off_diagonal)
    return {name: np.array(value) for name, value in found.items()}


def compare(rows: ContrastRows, expected: dict) -> list[float]:
    """Equal entry by entry; the shares of kept, off-diagonal and anchoring entries."""
    for name in FIELDS:
        np.testing.assert_allclose(getattr(rows, name).numpy(), expected[name], atol=1e-6, err_msg=name)
    return [rows.keep.float().mean(), rows.off_diagonal.float().mean(), rows.anchor.float().mean()]


def cosine(pairs, vectors, batch):
    def say(place, other_place):
        one, other = vectors[pairs.text_a[batch[place]]], vectors[pairs.text_b[batch[other_place]]]
        return sum(float(x) * float(y) for x, y in zip(one, other, strict=True))

    return say


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.35, None])
def test_every_entry_against_the_rulings(threshold, swap):
    vectors = unit_vectors(9)
    seen = []
    for seed in range(6):
        pairs = crowded(20, seed)
        batch = np.random.default_rng(seed).permutation(20)[:14]
        rows = contrast_rows(signals_of(pairs, vectors), batch, slice(0, 14), threshold, swap)
        seen.append(compare(rows, reference(pairs, cosine(pairs, vectors, batch), batch, threshold, swap)))
    assert np.all(np.mean(seen, axis=0) > 0.05) and np.all(np.mean(seen, axis=0) < 0.95)  # nothing is trivial
    assert rows.labels.dtype == rows.positive_column.dtype == torch.int64 and rows.keep.dtype == torch.bool
    assert rows.teacher_similarity.dtype == torch.float32


def sigmoid(score):
    return 1 / (1 + np.exp(-score))


def scored_entries(pairs, batch, neighbours, also):
    """Which (first, second) places of the batch have a score, by brute force."""
    labelled = {(a, b) for a, b in zip(pairs.text_a, pairs.text_b, strict=True)} | {tuple(pair) for pair in also}
    known = set()
    for place, i in enumerate(batch):
        candidates = []
        for other_place, j in enumerate(batch):
            if (pairs.text_a[i], pairs.text_b[j]) in labelled:
                known.add((place, other_place))
            if i != j and not pairs.known_match(np.array([i]), np.array([j]))[0, 0]:
                one, other = (set(pairs.texts[n].split()) for n in (pairs.text_a[i], pairs.text_b[j]))
                candidates.append((-len(one & other) / len(one | other), other_place))
        known |= {(place, other_place) for _, other_place in sorted(candidates)[:neighbours]}
    return known


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("neighbours", "with_texts", "also"), [(0, False, 0), (3, False, 0), (2, True, 0), (0, True, 30), (0, False, 30)]
)
def test_entries_of_a_teacher_of_pairs(neighbours, with_texts, also, swap):
    """Scored entries speak for themselves, the bi-encoder for the rest, and without one the rest is in no loss."""
    seen, generator = [], np.random.default_rng(0)
    vectors, logits = unit_vectors(40), generator.normal(0, 2, size=(40, 40))
    for seed in range(4):
        pairs = crowded(60, seed, num_texts=40)
        batch, more = generator.permutation(60)[:14], generator.integers(40, size=(also, 2))
        scores = {(pairs.texts[a], pairs.texts[b]): logits[a, b] for a in range(40) for b in range(40)}
        scored = PairTeacher(PairReader(scores), Meaning("logit"), neighbours)
        texts = TextTeacher(ArrayReader(vectors)) if with_texts else None
        known = scored_entries(pairs, batch, neighbours, more)

        def say(place, other_place, pairs=pairs, batch=batch, known=known):
            if (place, other_place) in known:
                return sigmoid(logits[pairs.text_a[batch[place]], pairs.text_b[batch[other_place]]])
            return cosine(pairs, vectors, batch)(place, other_place) if with_texts else None

        signals = TeacherSignals(pairs, texts, scored, more)
        expected = reference(pairs, say, batch, 0.5, swap)
        whole = contrast_rows(signals, batch, slice(0, 14), 0.5, swap)
        seen.append([*compare(whole, expected), len(known) / 14])
        for share in (slice(0, 5), slice(5, 14), slice(14, 14)):  # a rank's own rows, whoever owns the others
            part = contrast_rows(signals, batch, share, 0.5, swap)
            assert all(torch.equal(getattr(part, name), getattr(whole, name)[share]) for name in FIELDS)
    kept, off_diagonal, anchors, known = np.mean(seen, axis=0)
    assert kept > 0.02 and 0.05 < anchors < 0.95 and known > 1 + 0.8 * neighbours
    assert off_diagonal > 0.6 if with_texts else off_diagonal < 0.4


def test_a_batch_with_the_diagonal_alone_teaches_no_contrast():
    """L_MCL is exactly 0 without gradient, L_dist that of the diagonal."""
    pairs = table([(0, 1, 1, -1, -1), (2, 3, 1, -1, -1), (4, 5, 0, -1, -1)], 6)
    scores = {(pairs.texts[a], pairs.texts[b]): 0.9 - 0.3 * a / 2 for a, b in ((0, 1), (2, 3), (4, 5))}
    signals = TeacherSignals(pairs, scored=PairTeacher(PairReader(scores), Meaning("probability")))
    rows = contrast_rows(signals, np.array([0, 1, 2]), slice(0, 3), 0.5)
    assert rows.keep.tolist() == torch.eye(3).bool().tolist() and rows.anchor.tolist() == [True, True, False]
    assert not rows.off_diagonal.any() and not rows.negative.any()
    student = torch.tensor([[0.3, -1.0, 1.0], [0.2, 1.0, 0.1], [0.9, 0.0, 0.4]], requires_grad=True)
    margins = mcl_margins(rows.teacher_similarity, rows.positive_column, 0.06)
    total, counts = contrastive_sum(student, margins, rows.anchor, rows.negative, rows.positive_column)
    assert total.item() == 0.0 and counts.tolist() == [0, 2]
    total.backward()
    assert student.grad.abs().max() == 0
    distance = distance_sum(student, rows.teacher_similarity, rows.keep)
    torch.testing.assert_close(distance.item(), (0.9 - 0.3) ** 2 + (0.6 - 1) ** 2 + (0.3 - 0.4) ** 2)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])
def test_the_ranks_rows_are_the_whole_in_parts(world_size, swap):
    pairs, vectors, batch = crowded(20, 7), unit_vectors(9), np.arange(3, 12)
    whole = contrast_rows(signals_of(pairs, vectors), batch, slice(0, 9), 0.5, swap)
    shares = [rows_of_rank(9, rank, world_size) for rank in range(world_size)]
    parts = [contrast_rows(signals_of(pairs, vectors), batch, share, 0.5, swap) for share in shares]
    for name in FIELDS:
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=0, atol=1e-6)
    assert [len(part.labels) for part in parts] == [share.stop - share.start for share in shares]
    assert all(part.keep.shape == (len(part.labels), 9) for part in parts)


def masked(pairs, swap=False, batch=None) -> list[tuple[int, int]]:
    """Entries off the diagonal that are known matches, without the noise filter."""
    batch = np.arange(len(pairs)) if batch is None else np.array(batch)
    rows = contrast_rows(signals_of(pairs, unit_vectors(len(pairs.texts))), batch, slice(0, len(batch)), None, swap)
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
        rows = contrast_rows(signals_of(table([(0, 1, label, *none)], 3), vectors), np.array([0]), slice(0, 1), 0.5)
        assert rows.keep.tolist() == [[kept]] and rows.anchor.tolist() == [kept]
        assert rows.negative.tolist() == [[False]]  # a labelled mismatch is nobody's contrastive negative
    far = contrast_rows(signals_of(table([(0, 2, 1, *none)], 3), vectors), np.array([0]), slice(0, 1), 0.5)
    assert not far.keep.any() and not far.anchor.any()  # the teacher contradicts the label
    strict = contrast_rows(signals_of(table([(0, 1, 1, *none)], 3), vectors), np.array([0]), slice(0, 1), 0.6)
    assert not strict.anchor.any()


def test_all_fields_move_together():
    rows = contrast_rows(signals_of(crowded(6, 0), unit_vectors(9)), np.arange(6), slice(2, 5), 0.5)
    moved = rows.to(torch.device("meta"))
    assert isinstance(moved, ContrastRows) and all(getattr(moved, name).is_meta for name in FIELDS)
