"""The teacher's store: complete or absent, resumable, and never one teacher's vectors for another's."""

import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stores import (
    SPEC,
    TEXTS,
    cut,
    delete,
    expected,
    flip,
    flip_vector,
    full_store,
    is_tidy,
    killed_at,
    missing,
    shards,
    write,
)

from flipkd_dist import store as store_module
from flipkd_dist.errors import StoppedAtOnce, UserError
from flipkd_dist.store import Store, StoreSpec, pair_text
from flipkd_dist.store_compact import compact_store
from flipkd_dist.store_keys import keys_of
from flipkd_dist.store_manifest import write_entries
from flipkd_dist.store_shards import Shard, write_shard

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "teacher", SPEC)


@pytest.fixture
def full(tmp_path):
    return full_store(tmp_path / "teacher")


def manifest_of(store):
    return json.loads((store.folder / "manifest.json").read_text())["stores"][store.spec.key]


def index_file(store, suffix):
    (path,) = store.folder.glob(f"{store.spec.key}-*.{suffix}")
    return path


def test_vectors_come_back_in_the_order_asked(full):
    asked = [TEXTS[7], TEXTS[0], TEXTS[11], TEXTS[7], TEXTS[3]]
    vectors = full.open().vectors(asked)
    assert vectors.dtype == np.float32 and np.array_equal(vectors, expected(asked))
    assert np.allclose(np.sum(vectors**2, axis=1), 1, atol=2e-7)
    assert full.open().vectors([]).shape == (0, 6) and len(full.open()) == 12


def test_pair_scores_come_back_bit_for_bit(tmp_path):
    pairs = Store(tmp_path, StoreSpec("f" * 32, "cross-encoder", 128, 1, dtype="float32"))
    texts = [pair_text(text, "other") for text in TEXTS]
    scores = np.random.default_rng(0).normal(size=(12, 1)).astype(np.float32) * 10
    pairs.write_shard(texts, scores)
    pairs.publish()
    assert np.array_equal(pairs.open().vectors(texts[::-1]), scores[::-1])
    assert not pairs.is_complete([pair_text("other", TEXTS[0])])


def test_many_keys_are_found_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr("flipkd_dist.store_keys.CHUNK", 100)
    store = Store(tmp_path, SPEC)
    texts = [f"question {number}" for number in range(3000)]
    for start in range(0, 3000, 700):
        write(store, texts[start : start + 700])
    assert store.holds(iter(texts)).all() and missing(store, [*texts, "absent"]) == ["absent"]
    store.publish()
    assert missing(store, [*texts, "absent"]) == ["absent"]
    assert store.is_complete(iter(texts)) and not store.is_complete([*texts, "absent"])
    assert np.array_equal(store.open().vectors(texts[::-1]), expected(texts[::-1]))


@pytest.mark.parametrize("dim, seed", [(384, 0), (64, 1), (1024, 2)])
def test_the_error_of_a_cosine_is_within_the_bound(tmp_path, dim, seed):
    """docs/store.md: at most 2 arcsin(2^-11 + sqrt(d) 2^-25); for random vectors some 6e-4 / sqrt(2 d)."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(600, dim)).astype(np.float32)
    vectors[:200, 1:] *= 1e-4  # all weight in one number, the others below what float16 has full precision for
    vectors[200:300] = vectors[300:400] + 0.1 * vectors[200:300]  # near neighbours
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = Store(tmp_path, StoreSpec("f", "mean", 8, dim))
    texts = [f"text {number}" for number in range(600)]
    store.write_shard(texts, vectors)
    store.publish()
    read = store.open().vectors(texts).astype(np.float64)
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    error = np.abs(read @ read.T - exact @ exact.T)
    assert error.max() <= 2 * np.arcsin(2**-11 + np.sqrt(dim) * 2**-25) + 1e-6
    assert np.abs(np.sum(read**2, axis=1) - 1).max() < 1e-5  # a text's cosine with itself; 4e-4 as stored
    typical = np.sqrt(np.mean(error[400:, 400:][~np.eye(200, dtype=bool)] ** 2))
    assert 2e-4 < typical * np.sqrt(dim) < 4e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.9, 0.0])
def test_a_vector_that_is_not_one_is_refused(store, bad):
    vectors = expected(TEXTS[:3])
    vectors[1] *= bad
    with pytest.raises(UserError, match=r"length 1 for 'text 1'"):
        store.write_shard(TEXTS[:3], vectors)
    scores = Store(store.folder, StoreSpec("f", "mean", 8, 1, dtype="float32"))
    with pytest.raises(UserError, match="finite"):
        scores.write_shard(TEXTS[:1], np.array([[np.nan]], np.float32))
    assert not store.folder.exists()


def test_an_absent_text_is_an_error_that_names_it(full):
    with pytest.raises(KeyError, match=r"1 of 2 texts.*'never seen'"):
        full.open().vectors([TEXTS[0], "never seen"])


def test_a_new_store_is_empty_and_nothing_is_written(store):
    assert missing(store, TEXTS[:2] + TEXTS[:2]) == TEXTS[:2] and not store.is_complete(TEXTS)
    with pytest.raises(UserError, match="flipkd score"):
        store.open()
    assert not store.folder.exists()


def test_missing_keeps_order_and_drops_repetitions(store):
    write(store, TEXTS[4:8])
    assert missing(store, [TEXTS[9], TEXTS[5], TEXTS[1], TEXTS[9]]) == [TEXTS[9], TEXTS[1]]


def test_only_publishing_makes_it_complete(store):
    write(store, TEXTS)
    assert missing(store, TEXTS) == [] and not store.is_complete(TEXTS)
    with pytest.raises(UserError):
        store.open()
    store.publish()
    assert store.is_complete(TEXTS) and not store.is_complete([*TEXTS, "new"])
    write(store, ["new"])
    assert store.holds(["new", "newer", TEXTS[3]]).tolist() == [True, False, True]
    assert not store.is_complete([*TEXTS, "new"])  # there, but not declared
    store.publish()
    assert store.is_complete([*TEXTS, "new"])


def test_keys_of_new_shards_are_read_once_and_never_vectors(full, monkeypatch):
    read = []
    original = store_module.read_keys
    monkeypatch.setattr(store_module, "read_keys", lambda path, spec: read.append(path) or original(path, spec))
    monkeypatch.setattr(store_module, "read_shard", lambda *_: 1 / 0)
    for number in range(5):
        path = write(full, [f"new {number}"])
        assert full.holds([f"new {number}", f"new {number + 1}", TEXTS[0]]).tolist() == [True, False, True]
        assert full.holds([f"new {old}" for old in range(number + 1)]).all()
        assert read == [path], read
        read.clear()
    path.unlink()
    assert full.holds(["new 3", "new 4"]).tolist() == [True, False]


def test_manifest(full):
    entry = manifest_of(full)
    assert entry["spec"] == {**vars(SPEC)} and entry["num_vectors"] == 12
    listed = [(shard["name"], shard["bytes"], shard["rows"]) for shard in entry["shards"]]
    assert listed == [(path.name, path.stat().st_size, 4) for path in shards(full)]
    assert is_tidy(full)


def test_publishing_twice_changes_nothing(full):
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in full.folder.iterdir()}
    full.publish()
    Store(full.folder, SPEC).publish()
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in full.folder.iterdir()} == before


def test_an_open_reader_keeps_what_it_has(full):
    reader = full.open()
    write(full, ["new"])
    full.publish()
    assert is_tidy(full) and len(reader) == 12 and np.array_equal(reader.vectors(TEXTS), expected(TEXTS))
    assert full.open().vectors(["new"]).shape == (1, 6)


def test_opening_while_another_publishes_takes_the_new_index(full, monkeypatch):
    old = full.entry()
    write(full, ["new"])
    full.publish()
    entries = iter([old, full.entry()])
    monkeypatch.setattr(Store, "entry", lambda self: next(entries))
    assert len(full.open()) == 13


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "stores": []}', "\x00"]
)
def test_a_damaged_manifest_is_no_manifest_and_publishing_mends_it(full, content):
    (full.folder / "manifest.json").write_text(content)
    assert not full.is_complete(TEXTS) and missing(full, TEXTS) == []
    with pytest.raises(UserError):
        full.open()
    full.publish()
    assert full.is_complete(TEXTS) and is_tidy(full)


def test_a_manifest_cut_anywhere_never_serves(full):
    path = full.folder / "manifest.json"
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 7):
        path.write_text(whole[:length])
        assert not Store(full.folder, SPEC).is_complete(TEXTS[:1])
        with pytest.raises(UserError, match=r"manifest.json.*flipkd store verify --repair"):
            full.open()


def test_a_changed_digit_of_the_manifest_never_gives_a_wrong_vector(full):
    path = full.folder / "manifest.json"
    whole = path.read_text()
    for where in [where for where, letter in enumerate(whole) if letter.isalnum()][::3]:
        path.write_text(whole[:where] + ("1" if whole[where] != "1" else "2") + whole[where + 1 :])
        store = Store(full.folder, SPEC)
        try:
            assert np.array_equal(store.open().vectors(TEXTS), expected(TEXTS))
        except UserError:
            assert not store.is_complete(TEXTS)


def test_repeated_keys_are_harmless(full):
    write(full, TEXTS[2:6], sign=-1)
    full.publish()
    assert manifest_of(full)["num_vectors"] == 12 and sum(shard["rows"] for shard in manifest_of(full)["shards"]) == 16
    vectors = full.open().vectors(TEXTS)
    either = (vectors == expected(TEXTS)).all(1) | (vectors == expected(TEXTS, sign=-1)).all(1)
    assert full.is_complete(TEXTS) and either.all()


@pytest.mark.parametrize("damage", [cut, delete])
def test_a_shard_that_is_cut_or_gone_counts_as_missing(full, caplog, damage):
    path = write(full, TEXTS[4:8])
    damage(path)
    with caplog.at_level(logging.WARNING, "flipkd_dist"):
        assert missing(full, TEXTS) == TEXTS[4:8] and missing(full, TEXTS) == TEXTS[4:8]
    assert [path.name in record.getMessage() for record in caplog.records] == [True] * (damage is cut)  # said once
    assert not full.is_complete(TEXTS[:1])
    full.publish()  # does not declare it
    assert not full.is_complete(TEXTS) and full.is_complete(TEXTS[:4])
    write(full, TEXTS[4:8])
    assert missing(full, TEXTS) == []
    full.publish()
    assert np.array_equal(full.open().vectors(TEXTS), expected(TEXTS))


def test_a_flipped_bit_is_noticed_when_a_shard_is_published(full, caplog):
    flip_vector(write(full, TEXTS[4:8]), TEXTS[5])
    assert np.array_equal(full.open().vectors(TEXTS), expected(TEXTS))  # the index has its own copy
    full.publish(rebuild=True)
    assert "cannot be used" in caplog.text and missing(full, TEXTS) == TEXTS[4:8] and not full.is_complete(TEXTS)
    assert len(list(full.folder.glob("*.damaged"))) == 1
    write(full, TEXTS[4:8])
    full.publish()
    assert np.array_equal(full.open().vectors(TEXTS), expected(TEXTS))


def test_a_flipped_bit_of_a_key_is_noticed_without_reading_vectors(store, caplog):
    path = write(store, TEXTS[4:8])
    flip(path, path.read_bytes().find(keys_of([TEXTS[5]]).tobytes()) + 9)
    assert missing(store, TEXTS[4:8]) == TEXTS[4:8] and path.name in caplog.text


def test_vectors_of_other_keys_are_noticed(store, caplog):
    """Damage from before the file was written, which the checksums of its pages do not know of."""
    good = Shard.of(keys_of(TEXTS[:2]), expected(TEXTS[:2]).astype(np.float16))
    write_shard(store.folder, SPEC, Shard(good.keys, good.vectors[::-1], good.checksums))
    store.publish()
    assert "do not match their checksums" in caplog.text and not store.is_complete(TEXTS[:1])


def test_every_flipped_bit_of_the_index_is_noticed(full):
    """Never a wrong vector: the right one, an error that names the remedy, or "not there"."""
    outcomes = set()
    for suffix in ("rows", "keys"):
        path = index_file(full, suffix)
        for where in [*range(0, 200, 7), *range(4096, path.stat().st_size, 3)]:
            flip(path, where, bit=where % 8)
            try:
                assert np.array_equal(Store(full.folder, SPEC).open().vectors(TEXTS), expected(TEXTS)), where
                outcomes.add((suffix, "right"))
            except UserError as error:
                assert "flipkd store verify --repair" in str(error)
                outcomes.add((suffix, "damaged"))
            except KeyError:
                outcomes.add((suffix, "not there"))
            flip(path, where, bit=where % 8)
    assert outcomes == {("rows", "damaged"), ("keys", "damaged"), ("keys", "not there")}
    assert np.array_equal(full.open().vectors(TEXTS), expected(TEXTS))


def other_index(path):
    """The file of another store of the same size."""
    other = full_store(path.parent.parent / "other", sign=-1)
    path.write_bytes(index_file(other, path.suffix[1:]).read_bytes())


@pytest.mark.parametrize("suffix", ["rows", "keys"])
@pytest.mark.parametrize("damage", [cut, delete, other_index, lambda path: path.write_bytes(b"")])
def test_an_index_that_is_missing_cut_or_foreign_is_refused_and_built_again(full, suffix, damage):
    damage(index_file(full, suffix))
    assert not full.is_complete(TEXTS[:1]) and missing(full, TEXTS) == []
    with pytest.raises(UserError, match=rf"\.{suffix}: .*flipkd store verify --repair"):
        full.open()
    full.publish()
    assert np.array_equal(full.open().vectors(TEXTS), expected(TEXTS)) and is_tidy(full)


@pytest.mark.parametrize(
    "change",
    [
        dict(teacher_fingerprint="0" * 32),
        dict(pooling="cls"),
        dict(max_length=64),
        dict(prompt="query: "),
        dict(dtype="float32"),
    ],
)
def test_two_teachers_used_in_turn_stay_complete(full, change):
    before = {path: path.read_bytes() for path in full.folder.iterdir() if path.name != "manifest.json"}
    other = Store(full.folder, StoreSpec(**{**vars(SPEC), **change}))
    assert other.spec.key != SPEC.key and missing(other, TEXTS) == TEXTS and not other.is_complete([])
    with pytest.raises(UserError):
        other.open()
    full_store(full.folder, other.spec, sign=-1)
    assert np.abs(other.open().vectors(TEXTS) - expected(TEXTS, sign=-1)).max() < 1e-3
    assert {path: path.read_bytes() for path in before} == before
    assert full.is_complete(TEXTS) and np.array_equal(full.open().vectors(TEXTS), expected(TEXTS))
    write(full, ["new"])
    full.publish()
    assert other.is_complete(TEXTS) and full.is_complete([*TEXTS, "new"])


def test_a_vector_of_another_size_is_another_store(full):
    other = Store(full.folder, StoreSpec(**{**vars(SPEC), "hidden_size": 7}))
    assert missing(other, TEXTS) == TEXTS


def test_a_shard_under_another_teachers_name_is_not_used(full, caplog):
    other = Store(full.folder, StoreSpec(**{**vars(SPEC), "pooling": "cls"}))
    for path in shards(full):
        path.rename(path.with_name(path.name.replace(SPEC.key, other.spec.key)))
    assert missing(other, TEXTS) == TEXTS and "specification" in caplog.text
    other.publish()
    assert not other.is_complete(TEXTS[:1])


def test_a_kill_at_any_step_of_publish_leaves_the_old_or_the_new(full):
    steps, reader = 0, full.open()

    def add_one():
        write(full, ["new", f"new {steps}"])
        full.publish()

    while killed_at(steps + 1, add_one):
        steps += 1
        store = Store(full.folder, SPEC)
        assert store.is_complete(TEXTS) and np.array_equal(store.open().vectors(TEXTS), expected(TEXTS))
        assert np.array_equal(reader.vectors(TEXTS), expected(TEXTS))
        if store.holds(["new"])[0] and steps % 2:
            store.publish()
            assert store.is_complete(["new"]) and is_tidy(store)
    assert steps >= 9  # three files and a shard, each synced, named, its name synced
    full.publish()
    store = Store(full.folder, SPEC)
    assert is_tidy(store) and np.array_equal(store.open().vectors([*TEXTS, "new"]), expected([*TEXTS, "new"]))


def test_files_are_synced_before_they_get_their_name(store, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append(Path(names[1]).suffix), replace(*names)))
    write(store, TEXTS)
    store.publish()
    named = (
        "fsync",
        ".parquet",
        "fsync",
        "fsync",
        ".rows",
        "fsync",
        "fsync",
        ".keys",
        "fsync",
        "fsync",
        ".json",
        "fsync",
    )
    assert calls == list(named)


def test_a_store_travels_to_a_worker(full):
    full.holds(TEXTS)
    travelled = pickle.loads(pickle.dumps(full))
    assert travelled == full and travelled.is_complete(TEXTS)


MEASURE = """
import pathlib, sys
from flipkd_dist.store import Store, StoreSpec

def private():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

store = Store(pathlib.Path(sys.argv[1]), StoreSpec("f", "mean", 8, 256))
before = private()
reader = store.open()
for start in range(0, 60000, 512):
    reader.vectors([f"text {number}" for number in range(start, start + 512)])
print(private() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_reader_has_nearly_no_memory_of_its_own(tmp_path):
    store = Store(tmp_path, StoreSpec("f", "mean", 8, 256))
    vectors = np.random.default_rng(0).random((65536, 256), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store.write_shard([f"text {number}" for number in range(65536)], vectors)
    store.publish()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8  # MiB; the index has 35


def test_the_name_of_a_shard_says_its_texts(store):
    path = write(store, TEXTS[:3])
    keys = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in TEXTS[:3])
    assert path.name == f"{SPEC.key}-{hashlib.blake2b(keys, digest_size=8).hexdigest()}.parquet"
    assert write(store, TEXTS[:3]) == path and shards(store) == [path]  # a repeated shard replaces itself


@pytest.mark.parametrize("kind", [StoppedAtOnce, OSError])
def test_what_comes_after_the_manifest_has_its_name_leaves_the_index_it_names(full, monkeypatch, kind):
    """A signal, or a failing sync of the folder, between the rename and the return."""
    before = {path.name for path in full.folder.glob("*.rows")}

    def late(*arguments):
        write_entries(*arguments)
        raise kind("too late")

    write(full, ["new"])
    monkeypatch.setattr(store_module, "write_entries", late)
    with pytest.raises(kind, match="too late"):
        full.publish()
    assert len({path.name for path in full.folder.glob("*.rows")} - before) == 1
    assert np.array_equal(full.open().vectors([*TEXTS, "new"]), expected([*TEXTS, "new"]))


def test_merged_shards_stay_where_the_manifest_names_them(full, monkeypatch):
    def late(*arguments):
        write_entries(*arguments)
        raise OSError("too late")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_entries", late)
        with pytest.raises(OSError, match="too late"):
            compact_store(full)
    assert full.is_complete(TEXTS) and np.array_equal(full.open().vectors(TEXTS), expected(TEXTS))
    compact_store(full)
    assert len(shards(full)) == 1 and is_tidy(full)
