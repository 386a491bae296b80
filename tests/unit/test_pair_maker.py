"""Pairs made of grouped texts, and groups split without leakage."""

import itertools
import logging
from collections import Counter

import numpy as np
import pytest

from flipkd_dist import pair_maker
from flipkd_dist.errors import UserError
from flipkd_dist.grouped_texts import distinct_texts, normalise, split_texts
from flipkd_dist.pair_maker import make_pairs

GROUPS, SIZE = 6, 5
TEXTS = [f"text {row} of group {row // SIZE}" for row in range(GROUPS * SIZE)]
NAMES = [f"g{row // SIZE}" for row in range(GROUPS * SIZE)]
ROW = {text: row for row, text in enumerate(TEXTS)}
THIRDS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def on_a_circle(texts):
    """A toy teacher: text by text one step along a circle, so that near rows are near in angle."""
    angle = np.array([ROW[text] for text in texts]) * 2 * np.pi / len(TEXTS)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def steps_apart(pair):
    """How far the two texts of a pair are apart on the circle."""
    apart = abs(ROW[pair["text_a"]] - ROW[pair["text_b"]])
    return min(apart, len(TEXTS) - apart)


def of_kind(pairs, kind):
    return [pair for pair in pairs if pair["kind"] == kind]


@pytest.mark.parametrize(
    "text, same", [("Top-up, please!", "top  UP please"), (" \nOÙ?", "où"), ("what\u2019s", "what's"), ("?", " ? ")]
)
def test_normalise_equates(text, same):
    assert normalise(text) == normalise(same) != ""


@pytest.mark.parametrize("text, other", [("costs $5", "costs £5"), ("?", "!"), ("कि", "क"), ("ab", "a b")])
def test_normalise_keeps_apart(text, other):
    assert normalise(text) != normalise(other)


def test_distinct_texts():
    texts = ["One!", "two", "one", "ONE", "three", "Two?", "four", "two"]
    groups = ["a", "a", "a", "a", "b", "b", "b", "b"]
    assert distinct_texts(texts, groups) == ([0, 4, 6], 2, 3)


@pytest.mark.parametrize("encode", [None, on_a_circle])
@pytest.mark.parametrize("seed", range(3))
def test_every_pair_is_what_it_says(seed, encode):
    pairs = make_pairs(TEXTS, NAMES, seed, encode)
    group_of = dict(zip(TEXTS, NAMES, strict=True))
    for pair in pairs:
        assert list(pair) == ["id", "text_a", "text_b", "label", "kind", "group_a", "group_b"]
        assert pair["group_a"] == group_of[pair["text_a"]] and pair["group_b"] == group_of[pair["text_b"]]
        assert pair["label"] == (pair["group_a"] == pair["group_b"]) == (pair["kind"] == "positive")
        assert pair["text_a"] != pair["text_b"]
    count = len(TEXTS)
    expected = {"positive": 2 * count, "random": count} | ({"hard": count} if encode else {})
    assert Counter(pair["kind"] for pair in pairs) == expected
    assert len({frozenset((pair["text_a"], pair["text_b"])) for pair in pairs}) == len(pairs)
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    first_half = Counter(pair["kind"] for pair in pairs[: len(pairs) // 2])
    assert first_half["random"] > 5 and first_half["positive"] > 5  # shuffled


def test_pairs_depend_on_the_seed_alone():
    assert make_pairs(TEXTS, NAMES, 7, on_a_circle) == make_pairs(TEXTS, NAMES, 7, on_a_circle)
    assert make_pairs(TEXTS, NAMES, 7, on_a_circle) != make_pairs(TEXTS, NAMES, 8, on_a_circle)
    ids = lambda encode, kind: {pair["id"] for pair in of_kind(make_pairs(TEXTS, NAMES, 7, encode), kind)}  # noqa: E731
    assert all(ids(None, kind) == ids(on_a_circle, kind) for kind in ("positive", "random"))


@pytest.mark.parametrize("similarities_per_chunk", [1, 100, 2**23])
def test_hard_negatives_are_near(monkeypatch, similarities_per_chunk):
    monkeypatch.setattr(pair_maker, "SIMILARITIES_PER_CHUNK", similarities_per_chunk)
    pairs = make_pairs(TEXTS, NAMES, 1, on_a_circle, hard_negatives_per_text=2, neighbours=4)
    # The four nearest texts of other groups lie within SIZE + 1 steps; random pairs reach half-way round.
    assert len(of_kind(pairs, "hard")) > 30 and max(map(steps_apart, of_kind(pairs, "hard"))) <= SIZE + 1
    assert max(map(steps_apart, of_kind(pairs, "random"))) > SIZE + 3


def test_chunks_do_not_change_the_pairs(monkeypatch):
    whole = make_pairs(TEXTS, NAMES, 3, on_a_circle)
    monkeypatch.setattr(pair_maker, "SIMILARITIES_PER_CHUNK", 3 * len(TEXTS) + 1)
    assert make_pairs(TEXTS, NAMES, 3, on_a_circle) == whole


def test_hard_negatives_are_drawn_from_all_neighbours():
    found = Counter()
    for seed in range(60):
        pairs = make_pairs(TEXTS, NAMES, seed, on_a_circle, 1, 0, 1, neighbours=3)
        found.update(pair["text_b"] for pair in of_kind(pairs, "hard") if pair["text_a"] == TEXTS[SIZE])
    assert set(found) == {TEXTS[SIZE - 1], TEXTS[SIZE - 2], TEXTS[SIZE - 3]}  # text 5 is the first of its group


def test_random_negatives_are_uniform_over_other_groups():
    found = Counter()
    for seed in range(2000):
        pairs = make_pairs(TEXTS[:12], NAMES[:12], seed, None, 0, 1)
        found.update(pair["text_b"] for pair in pairs if pair["text_a"] == TEXTS[0])
    assert set(found) == set(TEXTS[5:12])
    assert max(found.values()) < 1.3 * 2000 / 7 and min(found.values()) > 0.7 * 2000 / 7


def test_small_groups_give_all_the_pairs_that_exist_and_no_more():
    texts, groups = list("abcdefg"), ["x"] * 4 + ["y"] * 2 + ["z"]
    pairs = make_pairs(texts, groups, 0, None, positives_per_text=9, random_negatives_per_text=9)
    made = {frozenset((pair["text_a"], pair["text_b"])) for pair in pairs}
    assert len(pairs) == len(made) and made == set(map(frozenset, itertools.combinations(texts, 2)))


def test_neighbours_never_come_from_the_own_group():
    pairs = make_pairs(TEXTS[:8], NAMES[:8], 0, on_a_circle, 0, 0, 9, neighbours=50)
    assert len(pairs) == SIZE * 3 and all(pair["group_a"] != pair["group_b"] for pair in pairs)


def test_one_group_gives_positives_alone():
    assert {pair["kind"] for pair in make_pairs(["a", "b"], ["x", "x"], 0, on_a_circle, 1, 1, 0)} == {"positive"}
    assert make_pairs([], [], 0) == []


def test_repeated_and_ambiguous_texts(caplog):
    with caplog.at_level(logging.WARNING):
        pairs = make_pairs([*TEXTS, "TEXT 0 of group 0.", TEXTS[1]], [*NAMES, "g0", "g5"], 0, None, 9, 9)
    used = {text for pair in pairs for text in (pair["text_a"], pair["text_b"])}
    assert used == set(TEXTS) - {TEXTS[1]} and "2 texts left out" in caplog.text


@pytest.mark.parametrize("by", ["text", "group"])
@pytest.mark.parametrize("seed", range(3))
def test_splits_share_nothing(by, seed):
    texts, groups = TEXTS * 2 + [text.upper() + "!" for text in TEXTS] + ["both", "Both?"], NAMES * 3 + ["g0", "g1"]
    splits = split_texts(texts, groups, {"train": 0.4, "validation": 0.3, "test": 0.3}, by, seed)
    spellings = {name: {normalise(texts[row]) for row in rows} for name, rows in splits.items()}
    for one, other in itertools.combinations(splits, 2):
        assert not spellings[one] & spellings[other]
        if by == "group":
            assert not {groups[row] for row in splits[one]} & {groups[row] for row in splits[other]}
    assert sorted(row for rows in splits.values() for row in rows) == list(range(len(TEXTS)))
    assert splits == split_texts(texts, groups, {"train": 0.4, "validation": 0.3, "test": 0.3}, by, seed)
    assert splits != split_texts(texts, groups, {"train": 0.4, "validation": 0.3, "test": 0.3}, by, seed + 1)


@pytest.mark.parametrize(
    "size, expected",
    [(100, [80, 10, 10]), (20, [16, 2, 2]), (6, [2, 2, 2]), (5, [3, 2, 0]), (3, [3, 0, 0]), (1, [1, 0, 0])],
)
def test_every_split_gets_two_of_a_group_that_has_enough(size, expected):
    texts, groups = [f"t{row}" for row in range(size)], ["g"] * size
    splits = split_texts(texts, groups, THIRDS, "text", 0)
    assert [len(rows) for rows in splits.values()] == expected
    splits = split_texts(texts, texts, THIRDS, "group", 0)  # groups are shared out as texts are
    assert [len(rows) for rows in splits.values()] == expected


@pytest.mark.parametrize("fractions", [{"train": 0.8, "test": 0.1}, {"train": 1.0, "test": 0.0}, {"a": 1.5, "b": -0.5}])
def test_shares_that_are_no_whole(fractions):
    with pytest.raises(UserError, match=r"^split .*must be above 0 and sum to 1: correct them$"):
        split_texts(TEXTS, NAMES, fractions, "text", 0)
