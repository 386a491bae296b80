"""Batches by tokens: every pair once, within their limits, one first text side by side; windows that are bounded."""

import itertools

import numpy as np
import pytest

from flipkd_dist.prompt import EncodedPair, EncodedText
from flipkd_dist.token_batches import (
    PATHS_PER_TOKEN,
    WINDOW_CHARACTERS,
    WINDOW_PAIRS,
    BatchLimits,
    text_batches,
    token_batches,
    windows,
)

PREFIX = 7


def pair(first: list[int], second: int) -> EncodedPair:
    """A pair with this first text, and `second` tokens behind it (separator, second text, suffix)."""
    return EncodedPair([*first, *range(second)], slice(0, len(first)), slice(len(first) + 1, len(first) + second - 1))


def random_pairs(count: int, num_firsts: int, seed: int = 0) -> list[EncodedPair]:
    generator = np.random.default_rng(seed)
    firsts = [[1000 + n, *range(generator.integers(1, 30))] for n in range(num_firsts)]
    return [pair(firsts[generator.integers(num_firsts)], int(generator.integers(3, 60))) for _ in range(count)]


def computed(batch: list[EncodedPair], shared: bool) -> int:
    """Tokens of a forward, counted another way than by the code."""
    if not shared:
        return len(batch) * (PREFIX + max(len(one.ids) for one in batch))
    heads = {tuple(one.ids[: one.text_b.start]) for one in batch}  # first text and separator
    return PREFIX + sum(map(len, heads)) + sum(len(one.ids) - one.text_b.start for one in batch)


def paths(batch: list[EncodedPair]) -> int:
    return len(batch) * (PREFIX + max(len(one.ids) for one in batch))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_firsts", [1, 9, 300])
@pytest.mark.parametrize("limits", [BatchLimits(300, 512), BatchLimits(2000, 512), BatchLimits(2000, 5)])
def test_every_pair_stands_once_in_a_batch_within_the_limits(shared, num_firsts, limits):
    pairs = random_pairs(400, num_firsts)
    batches = token_batches(pairs, PREFIX, limits, shared)
    assert sorted(itertools.chain(*batches)) == list(range(400))
    fill = []
    for batch in batches:
        members = [pairs[number] for number in batch]
        assert len(batch) <= limits.pairs and computed(members, shared) <= limits.tokens
        assert paths(members) <= PATHS_PER_TOKEN * limits.tokens
        room = (computed(members, shared) / limits.tokens, paths(members) / PATHS_PER_TOKEN / limits.tokens)
        fill.append(max(*room, len(batch) / limits.pairs))
    assert np.mean(fill[:-1]) > 0.75  # not one pair a batch


def test_a_pair_above_the_limit_goes_alone():
    pairs = [pair([1], 5), pair([2], 500), pair([3], 5)]
    assert token_batches(pairs, PREFIX, BatchLimits(100, 10)) == [[1], [0, 2]]
    assert token_batches(pairs, PREFIX, BatchLimits(1, 10)) == [[1], [0], [2]]


def test_one_first_text_stands_side_by_side():
    firsts = [[n, *range(40)] for n in (5, 6, 7, 8)]
    pairs = [pair(firsts[n % 4], 30) for n in range(400)]
    # Room for one first text and its 100 pairs; in their own order each batch would hold all four.
    batches = token_batches(pairs, PREFIX, BatchLimits(PREFIX + 42 + 100 * 29, 512), shared=True)
    assert sum(computed([pairs[n] for n in batch], True) for batch in batches) < 4 * (PREFIX + 42) + 400 * 29 + 300
    assert sum(len({pairs[n].ids[0] for n in batch}) - 1 for batch in batches) <= 4


def test_a_first_text_that_was_cut_is_another_text():
    whole, cut = pair([1, 2, 3, 4], 4), pair([1, 2, 3], 4)
    [batch] = token_batches([whole, cut, whole], PREFIX, BatchLimits(PREFIX + 5 + 4 + 3 * 3, 512))
    assert sorted(batch) == [0, 1, 2]
    assert len(token_batches([whole, cut, whole], PREFIX, BatchLimits(PREFIX + 5 + 4 + 3 * 3 - 1, 512))) == 2


def test_nothing_gives_no_batch():
    assert token_batches([], PREFIX, BatchLimits()) == []


def test_windows_are_bounded_and_read_no_further():
    read = 0

    def texts():
        nonlocal read
        for read in range(1, 3 * WINDOW_PAIRS):  # noqa: B007
            yield "a"

    given = windows(texts(), len, lambda _: 1)
    assert len(next(given)) == WINDOW_PAIRS and read == WINDOW_PAIRS + 1
    assert sum(map(len, given)) == 2 * WINDOW_PAIRS - 1

    third = "x" * (WINDOW_CHARACTERS // 3)
    items = [third, third, third, third, 4 * third, "y", "z"]
    cut = list(windows(items, len, lambda _: 1))
    assert cut == [[third] * 3, [third], [4 * third], ["y", "z"]]
    lists = [10, WINDOW_PAIRS, 0, 5, 2 * WINDOW_PAIRS, 1]
    assert list(windows(lists, lambda _: 0, lambda n: n)) == [[10], [WINDOW_PAIRS, 0], [5], [2 * WINDOW_PAIRS], [1]]
    assert list(windows([], len, len)) == []


@pytest.mark.parametrize(("shared", "own_prefix"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("limits", [BatchLimits(300, 512), BatchLimits(2000, 5)])
def test_every_text_stands_once_in_a_batch_within_the_limits(shared, own_prefix, limits):
    lengths = np.random.default_rng(0).integers(2, 60, 300)
    texts = [EncodedText([0] * length, slice(0, length - 1)) for length in lengths]
    batches = text_batches(texts, PREFIX, limits, shared, own_prefix)
    assert sorted(itertools.chain(*batches)) == list(range(300))
    fill = []
    for batch in batches:
        own = lengths[batch]
        tokens = own.sum() + PREFIX * (len(batch) if own_prefix else 1) if shared else len(batch) * (PREFIX + own.max())
        paths = len(batch) * (PREFIX + own.max())
        assert tokens <= limits.tokens and paths <= PATHS_PER_TOKEN * limits.tokens and len(batch) <= limits.pairs
        fill.append(max(tokens / limits.tokens, paths / PATHS_PER_TOKEN / limits.tokens, len(batch) / limits.pairs))
    assert np.mean(fill[:-1]) > 0.75
    assert text_batches([], PREFIX, limits) == []
    assert text_batches(texts[:2], PREFIX, BatchLimits(1)) in ([[0], [1]], [[1], [0]])
