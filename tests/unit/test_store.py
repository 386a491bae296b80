"""The teacher's store: complete or absent, resumable, and never one teacher's vectors for another's."""

import hashlib
import json
import logging
import os
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from flipkd_dist import store as store_module
from flipkd_dist.store import Store, StoreSpec, text_key

SPEC = StoreSpec(teacher_fingerprint="f" * 32, pooling="mean", max_length=128, hidden_size=4)
TEXTS = [f"text {number}" for number in range(12)]


def vector_of(text, scale=1.0):
    """A vector that only this text has."""
    return np.random.default_rng(list(text.encode())).normal(size=4).astype(np.float32) * np.float32(scale)


def write(store, texts, scale=1.0):
    return store.write_shard(texts, np.stack([vector_of(text, scale) for text in texts]))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "teacher", SPEC)


@pytest.fixture
def full(store):
    """All texts in three shards, declared."""
    for start in (0, 4, 8):
        write(store, TEXTS[start : start + 4])
    store.publish()
    return store


def shards(store):
    return sorted(store.folder.glob("*.parquet"))


def test_vectors_come_back_in_the_order_asked(full):
    asked = [TEXTS[7], TEXTS[0], TEXTS[11], TEXTS[7], TEXTS[3]]
    vectors = full.open().vectors(asked)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, [vector_of(text) for text in asked])
    assert full.open().vectors([]).shape == (0, 4)


def test_many_keys_are_found_exactly(tmp_path):
    store = Store(tmp_path, SPEC)
    texts = [f"question {number}" for number in range(3000)]
    for start in range(0, 3000, 700):
        write(store, texts[start : start + 700])
    store.publish()
    assert store.missing([*texts, "absent"]) == ["absent"]
    assert np.array_equal(store.open().vectors(texts[::-1]), [vector_of(text) for text in texts[::-1]])
    assert len(store.stored_keys()) == 3000 and np.array_equal(np.sort(store.stored_keys()), store.stored_keys())


def test_key_is_the_hash_of_the_text():
    assert text_key("Überweisung 转账") == hashlib.blake2b("Überweisung 转账".encode(), digest_size=16).digest()


def test_an_absent_text_is_an_error_that_names_it(full):
    with pytest.raises(KeyError, match=r"1 of 2 texts.*'never seen'"):
        full.open().vectors([TEXTS[0], "never seen"])


def test_shard_file(store):
    path = write(store, TEXTS[:3])
    schema = pq.read_schema(path)
    assert str(schema.field("key").type) == "fixed_size_binary[16]"
    assert str(schema.field("vector").type).startswith("fixed_size_list<") and "float" in str(
        schema.field("vector").type
    )
    assert json.loads(schema.metadata[b"flipkd"])["teacher_fingerprint"] == "f" * 32
    assert path.name.startswith(SPEC.key + "-")
    assert write(store, TEXTS[:3]) == path and shards(store) == [path]  # a repeated shard replaces itself


def test_a_new_store_is_empty_and_nothing_is_written(store):
    assert store.missing(TEXTS[:2] + TEXTS[:2]) == TEXTS[:2] and not store.is_complete(TEXTS)
    assert not store.folder.exists()


def test_missing_keeps_order_and_drops_repetitions(store):
    write(store, TEXTS[4:8])
    assert store.missing([TEXTS[9], TEXTS[5], TEXTS[1], TEXTS[9]]) == [TEXTS[9], TEXTS[1]]


def test_only_the_manifest_makes_it_complete(store):
    write(store, TEXTS)
    assert store.missing(TEXTS) == [] and not store.is_complete(TEXTS)
    with pytest.raises(KeyError):
        store.open().vectors(TEXTS)
    store.publish()
    assert store.is_complete(TEXTS) and not store.is_complete([*TEXTS, "new"])
    write(store, ["new"])
    assert not store.is_complete([*TEXTS, "new"])  # there, but not declared
    store.publish()
    assert store.is_complete([*TEXTS, "new"])


def test_manifest(full):
    manifest = json.loads((full.folder / "manifest.json").read_text())
    assert manifest["spec"] == vars(SPEC) and manifest["num_vectors"] == 12
    listed = [(shard["name"], shard["bytes"], shard["rows"]) for shard in manifest["shards"]]
    assert listed == [(path.name, path.stat().st_size, 4) for path in shards(full)]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"spec": {}}', "\x00"])
def test_a_damaged_manifest_is_no_manifest(full, content):
    (full.folder / "manifest.json").write_text(content)
    assert not full.is_complete(TEXTS) and full.missing(TEXTS) == []


def test_a_shard_of_another_size_than_declared_is_not_trusted(full):
    manifest = json.loads((full.folder / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] += 1
    (full.folder / "manifest.json").write_text(json.dumps(manifest))
    assert not full.is_complete(TEXTS)


def test_repeated_keys_are_harmless(full):
    write(full, TEXTS[2:6])
    full.publish()
    assert json.loads((full.folder / "manifest.json").read_text())["num_vectors"] == 12
    assert full.is_complete(TEXTS) and np.array_equal(full.open().vectors(TEXTS), [vector_of(text) for text in TEXTS])


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    where = content.find(vector_of(TEXTS[5]).tobytes())
    assert where > 0
    content[where] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
def test_a_damaged_shard_counts_as_missing_and_is_named(full, caplog, damage):
    path = next(path for path in shards(full) if text_key(TEXTS[5]) in pq.read_table(path)["key"].to_pylist())
    damage(path)
    with caplog.at_level(logging.WARNING, "flipkd_dist"):
        assert full.missing(TEXTS) == TEXTS[4:8]
    assert [path.name in record.getMessage() for record in caplog.records] == [True]
    assert not full.is_complete(TEXTS)
    with pytest.raises(KeyError):
        full.open().vectors(TEXTS)
    full.publish()  # does not declare it
    assert not full.is_complete(TEXTS) and full.is_complete(TEXTS[:4])
    write(full, TEXTS[4:8])
    full.publish()
    assert full.is_complete(TEXTS)


def test_a_deleted_shard_counts_as_missing(full):
    shards(full)[0].unlink()
    assert not full.is_complete(TEXTS) and len(full.missing(TEXTS)) == 4


@pytest.mark.parametrize(
    "change", [dict(teacher_fingerprint="0" * 32), dict(pooling="cls"), dict(max_length=64), dict(dtype="float64")]
)
def test_another_teacher_starts_afresh_and_leaves_the_first_alone(full, change):
    before = {path: path.read_bytes() for path in shards(full)}
    other = Store(full.folder, StoreSpec(**{**vars(SPEC), **change}))
    assert other.spec.key != SPEC.key
    assert other.missing(TEXTS) == TEXTS and not other.is_complete(TEXTS) and not other.is_complete([])
    write(other, TEXTS, scale=-1.0)
    other.publish()
    assert np.array_equal(other.open().vectors(TEXTS), [-vector_of(text) for text in TEXTS])
    assert {path: path.read_bytes() for path in before} == before
    assert full.missing(TEXTS) == [] and not full.is_complete(TEXTS)  # the one manifest is the other's now
    full.publish()
    assert np.array_equal(full.open().vectors(TEXTS), [vector_of(text) for text in TEXTS])


def test_a_shard_under_another_teachers_name_is_not_used(full, caplog):
    other = Store(full.folder, StoreSpec(**{**vars(SPEC), "pooling": "cls"}))
    for path in shards(full):
        path.rename(path.with_name(path.name.replace(SPEC.key, other.spec.key)))
    assert other.missing(TEXTS) == TEXTS and "specification" in caplog.text


@pytest.mark.parametrize("killed_at", ["fsync", "replace"])
def test_a_write_that_is_killed_leaves_no_shard(store, monkeypatch, killed_at):
    write(store, TEXTS[:4])

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, killed_at, kill)
        with pytest.raises(KeyboardInterrupt):
            write(store, TEXTS[4:])
    assert len(list(store.folder.glob("*.tmp"))) == 1 and len(shards(store)) == 1
    assert store.missing(TEXTS) == TEXTS[4:]
    write(store, TEXTS[4:])
    store.publish()
    assert store.is_complete(TEXTS) and not list(store.folder.glob("*.tmp"))


def test_a_manifest_that_is_killed_leaves_the_old_one(full, monkeypatch):
    write(full, ["new"])
    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            full.publish()
    assert full.is_complete(TEXTS) and not full.is_complete(["new"])


def test_files_are_synced_before_they_get_their_name(store, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(store_module.os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(store_module.os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write(store, TEXTS)
    assert calls == ["fsync", "replace", "fsync"]


def test_a_store_travels_to_a_worker(full):
    assert pickle.loads(pickle.dumps(full)).is_complete(TEXTS)
