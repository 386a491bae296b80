"""Fewer and bigger shards: every text once, whenever the machine stops."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from stores import SPEC, TEXTS, expected, flip_vector, full_store, is_tidy, killed_at, missing, shards, write

from flipkd_dist.errors import UserError
from flipkd_dist.store import Store, StoreSpec
from flipkd_dist.store_compact import compact, compact_store

ROW = 6 * 2  # bytes of a vector


@pytest.fixture
def store(tmp_path):
    return full_store(tmp_path / "teacher")


def rows(store):
    return [pq.read_metadata(path).num_rows for path in shards(store)]


def check(store, texts=TEXTS):
    """Every text once in the shards, published, its vector bit for bit, nothing else in the folder."""
    assert sum(rows(store)) == len(texts) and is_tidy(store)
    assert Store(store.folder, SPEC).is_complete(texts)
    assert np.array_equal(store.open().vectors(texts), expected(texts))


@pytest.mark.parametrize("limit, sizes", [(100, [12]), (12, [12]), (8, [4, 8]), (5, [4, 4, 4]), (1, [4, 4, 4])])
def test_small_shards_become_big_ones(store, limit, sizes):
    before = store.open().vectors(TEXTS)
    assert compact_store(store, limit * ROW) == (3, len(sizes))
    assert sorted(rows(store)) == sizes
    check(store)
    assert np.array_equal(store.open().vectors(TEXTS), before)
    listed = [shard["name"] for shard in store.entry()["shards"]]
    assert listed == [path.name for path in shards(store)]


def test_a_second_time_does_nothing(store):
    compact_store(store)
    before = {path: path.stat().st_ino for path in store.folder.iterdir()}
    assert compact_store(store) == (1, 1)
    assert {path: path.stat().st_ino for path in store.folder.iterdir()} == before


def test_texts_that_stand_twice_are_kept_once(store):
    write(store, TEXTS[2:9])
    write(store, ["new", TEXTS[0]])
    write(store, [TEXTS[0], TEXTS[1]])
    assert missing(store, [*TEXTS, "new"]) == []
    compact_store(store, 4 * ROW)
    check(store, [*TEXTS, "new"])


def test_a_shard_that_holds_all_of_another_keeps_its_name(store):
    path = write(store, TEXTS)
    compact_store(store)
    assert shards(store) == [path]
    check(store)


def test_a_kill_at_any_step_loses_and_doubles_nothing(tmp_path):
    steps = 0
    while True:
        store = full_store(tmp_path / str(steps))
        reader = store.open()
        if not killed_at(steps + 1, lambda: compact_store(store, 8 * ROW)):  # noqa: B023
            break
        steps += 1
        fresh = Store(store.folder, SPEC)
        assert missing(fresh, TEXTS) == [] and fresh.is_complete(TEXTS)
        assert np.array_equal(fresh.open().vectors(TEXTS), expected(TEXTS))
        assert np.array_equal(reader.vectors(TEXTS), expected(TEXTS))
        if steps % 2:
            fresh.publish()  # what a run does that comes between
            assert np.array_equal(fresh.open().vectors(TEXTS), expected(TEXTS))
        compact_store(fresh, 8 * ROW)
        assert sorted(rows(fresh)) == [4, 8]
        check(fresh)
    assert steps >= 14  # a shard, three files of the index, three shards and two old files taken away


def test_what_fails_is_taken_back(store, monkeypatch):
    before = {path: path.stat().st_ino for path in store.folder.iterdir()}
    monkeypatch.setattr(Store, "publish_only", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compact_store(store)
    assert {path: path.stat().st_ino for path in store.folder.iterdir()} == before


def test_a_damaged_shard_is_named_and_nothing_is_touched(store):
    path = write(store, TEXTS[:4])
    flip_vector(path, TEXTS[2])
    before = sorted(os.listdir(store.folder))
    with pytest.raises(UserError, match=rf"{path}: is damaged .*verify --repair"):
        compact(store.folder)
    assert sorted(os.listdir(store.folder)) == before


def test_every_specification_of_a_run(tmp_path):
    full_store(tmp_path / "teacher")
    full_store(tmp_path / "teacher", StoreSpec(**{**vars(SPEC), "pooling": "cls"}))
    full_store(tmp_path / "teacher" / "pairs")
    lines = compact(tmp_path)
    assert len(lines) == 3 and all("3 shards are 1 now" in line for line in lines)
