"""Vectors that stay: whole parts survive a kill, and nothing of another search is taken."""

import json

import numpy as np
import pytest

from flipkd_dist.errors import UserError
from flipkd_dist.kept_vectors import STATE, VECTORS, kept_vectors

FACTS = {"fingerprint": "abc", "max_length": 7}
EXPECTED = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


def parts_of(asked, killed_at=10):
    def parts(first):
        asked.append(first)
        for start in range(first, 10, 4):
            if start >= killed_at:
                raise KeyboardInterrupt
            yield EXPECTED[start : start + 4]

    return parts


def test_what_was_done_is_not_done_again(tmp_path):
    asked = []
    with pytest.raises(KeyboardInterrupt):
        kept_vectors(tmp_path / "kept", FACTS, (10, 3), parts_of(asked, killed_at=4))
    for before in (4, 10):
        vectors, found = kept_vectors(tmp_path / "kept", FACTS, (10, 3), parts_of(asked))
        assert found == before and np.array_equal(vectors, EXPECTED)
    assert asked == [0, 4, 10]
    assert np.array_equal(np.load(tmp_path / "kept" / VECTORS), EXPECTED)


def test_a_kill_before_the_first_part(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        kept_vectors(tmp_path, FACTS, (10, 3), parts_of([], killed_at=0))
    assert np.array_equal(kept_vectors(tmp_path, FACTS, (10, 3), parts_of([]))[0], EXPECTED)


def test_vectors_of_another_search(tmp_path):
    kept_vectors(tmp_path, FACTS, (10, 3), parts_of([]))
    for facts, shape, what in (({**FACTS, "max_length": 8}, (10, 3), "max_length"), (FACTS, (10, 4), "shape")):
        with pytest.raises(UserError, match=rf"--vectors .*another search \({what}\): name another folder"):
            kept_vectors(tmp_path, facts, shape, parts_of([]))
    assert np.array_equal(np.load(tmp_path / VECTORS), EXPECTED)


def test_files_that_are_not_ours(tmp_path):
    (tmp_path / VECTORS).write_bytes(b"of mine")
    with pytest.raises(UserError, match=r"without a readable documents\.json"):
        kept_vectors(tmp_path, FACTS, (10, 3), parts_of([]))
    assert (tmp_path / VECTORS).read_bytes() == b"of mine"
    (tmp_path / STATE).write_text(json.dumps({**FACTS, "shape": [10, 3], "rows": 10}))
    with pytest.raises(UserError, match="is damaged: remove"):
        kept_vectors(tmp_path, FACTS, (10, 3), parts_of([]))
