"""Keys of texts: normalised, found among equal first halves, and checksums that notice what changes."""

import hashlib
import unicodedata

import numpy as np
import pytest

from flipkd_dist import store_keys
from flipkd_dist.store_keys import WORD, KeySet, checksums, chunks, find, keys_of, normalised, text_key, unique_order


def few_halves(count, seed=0, values=7):
    """Keys with many equal first words, many equal second ones and many repetitions, [count, 2]."""
    return np.random.default_rng(seed).integers(0, values, (count, 2)).astype(WORD)


def test_key_is_the_hash_of_the_text():
    assert text_key("Überweisung 转账") == hashlib.blake2b("Überweisung 转账".encode(), digest_size=16).digest()
    assert keys_of(["a", "b"]).tobytes() == text_key("a") + text_key("b") and keys_of([]).shape == (0, 2)


@pytest.mark.parametrize("text", ["a  b\t c\n", " a", "e\u0301te\u0301", "a \0 b", "e\u0301 \0  b", "", "\0", "ｱ　b"])
def test_short_ways_normalise_as_the_long_one(text):
    parts = unicodedata.normalize("NFC", text).split("\0")
    assert normalised(text) == "\0".join(" ".join(part.split()) for part in parts)


def test_equal_first_halves_are_told_apart():
    keys = few_halves(40)
    order = unique_order(keys)
    first, second = keys[order, 0], keys[order, 1]
    table = {tuple(key): place for place, key in enumerate(keys[order].tolist())}
    asked = few_halves(200, seed=1, values=9)
    position, found = find(first, second, asked)
    assert found.tolist() == [tuple(key) in table for key in asked.tolist()] and 0 < found.sum() < 200
    assert position[found].tolist() == [table[tuple(key)] for key in asked.tolist() if tuple(key) in table]


def test_equal_first_halves_are_found_in_any_order():
    keys = np.array([[3, 9], [5, 2], [5, 1], [5, 3], [8, 0]], WORD)
    position, found = find(keys[:, 0], keys[:, 1], keys[::-1])
    assert found.all() and position.tolist() == [4, 3, 2, 1, 0]
    assert not find(keys[:, 0], keys[:, 1], np.array([[5, 4], [9, 0], [0, 0], [8, 1]], WORD))[1].any()
    assert not find(keys[:0, 0], keys[:0, 1], keys)[1].any()


@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_each_key_once_and_the_earliest(count):
    keys = few_halves(count, values=12)
    order = unique_order(keys)
    earliest = {}
    for place, key in enumerate(keys.tolist()):
        earliest.setdefault(tuple(key), place)
    assert [tuple(key) for key in keys[order].tolist()] == sorted(earliest)
    assert order.tolist() == [earliest[key] for key in sorted(earliest)]


def test_a_set_of_keys_against_python():
    mine, truth = KeySet(), set()
    for step in range(60):
        new = np.random.default_rng(step).integers(0, 60, (5, 2)).astype(WORD)
        mine.add(new)
        truth |= set(map(tuple, new.tolist()))
        asked = np.random.default_rng(1000 + step).integers(0, 60, (50, 2)).astype(WORD)
        assert mine.holds(asked).tolist() == [key in truth for key in map(tuple, asked.tolist())]
    assert len(mine.runs) <= 8 and all(len(a) >= 2 * len(b) for a, b in zip(mine.runs, mine.runs[1:], strict=False))


def test_chunks_of_an_iterator():
    assert list(chunks(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]] and list(chunks([], 2)) == []


def test_a_checksum_sees_every_bit_and_the_key():
    random = np.random.default_rng(0)
    rows, keys = random.integers(0, 2**64, (3, 5), WORD), random.integers(0, 2**64, (3, 2), WORD)
    before = checksums(keys, rows)
    for array in (rows, keys):
        for place in np.ndindex(array.shape):
            for bit in range(64):
                array[place] ^= WORD.type(1 << bit)
                assert (checksums(keys, rows) != before).tolist() == [row == place[0] for row in range(3)]
                array[place] ^= WORD.type(1 << bit)


def test_a_checksum_sees_what_a_plain_sum_would_not():
    random = np.random.default_rng(0)
    rows, keys = random.integers(0, 2**64, (1, 96), WORD), keys_of(["a"])
    before = checksums(keys, rows)
    top = rows.copy()
    top[0, [3, 8]] ^= WORD.type(1 << 63)  # the signs of two numbers
    swapped = rows.copy()
    swapped[0, [3, 8]] = rows[0, [8, 3]]
    empty = np.zeros_like(rows)
    assert before != checksums(keys, top) and before != checksums(keys, swapped)
    assert checksums(keys, empty) != 0 and checksums(keys, empty) != checksums(keys_of(["b"]), empty)


def test_checksums_stay_what_they_are():
    """They stand in files: another version of this code has to find the same ones."""
    rows = np.arange(1500 * 3, dtype=WORD).reshape(1500, 3)
    sums = checksums(np.zeros((1500, 2), WORD), rows)
    alone = [checksums(np.zeros((1, 2), WORD), row[None])[0] for row in rows]
    assert sums.tolist() == [int(one) for one in alone]  # whatever else is computed at once
    assert hex(sums[1]) == "0x7e9ba8fee1981ea8"


@pytest.mark.parametrize("size", [1, 127, 128, 5000, 300_000])
@pytest.mark.parametrize("spread", ["even", "narrow", "equal", "low"])
def test_the_place_in_a_table_is_that_of_a_binary_search(size, spread):
    random = np.random.default_rng(size)
    high = {"even": 2**64, "narrow": 2**40, "equal": 1, "low": 2**20}[spread]
    table = np.sort(random.integers(0, high, size, dtype=np.uint64, endpoint=False))
    values = np.concatenate(
        [random.choice(table, 300), random.integers(0, 2**64, 300, dtype=np.uint64, endpoint=False)]
    )
    values = np.concatenate([values, np.array([0, 1, 2**64 - 1], np.uint64), table[[0, -1]]])
    assert np.array_equal(store_keys._lower_bound(table, values), np.searchsorted(table, values))
