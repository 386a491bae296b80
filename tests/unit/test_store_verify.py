"""`flipkd store verify` and `stats`: every kind of damage is named, and only what is damaged is taken out."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from stores import SPEC, TEXTS, cut, delete, expected, flip, flip_vector, full_store, is_tidy, missing, shards, write

from flipkd_dist.cli import cli
from flipkd_dist.errors import UserError
from flipkd_dist.store import Store, StoreSpec
from flipkd_dist.store_keys import keys_of
from flipkd_dist.store_manifest import read_entries, write_entries
from flipkd_dist.store_shards import Shard, write_shard
from flipkd_dist.store_stats import stats
from flipkd_dist.store_verify import verify


@pytest.fixture
def store(tmp_path):
    return full_store(tmp_path / "run" / "teacher")


def one(store, suffix):
    (path,) = store.folder.glob(f"*.{suffix}")
    return path


def test_a_sound_store(store):
    run = store.folder.parent
    assert verify(run) == verify(store.folder) == []
    write(store, TEXTS[2:6])  # a text in two shards, not published
    assert verify(run) == []
    store.publish()
    assert verify(run) == []
    full_store(store.folder, StoreSpec(**{**vars(SPEC), "pooling": "cls"}), sign=-1)
    full_store(store.folder / "pairs")
    assert verify(run) == []


def flip_key(path):
    flip(path, path.read_bytes().find(keys_of([TEXTS[5]]).tobytes()) + 9)


def garbage(path):
    path.write_bytes(b"PAR1" * 100)


def other_name(path):
    path.rename(path.with_name(path.name.replace("a", "b").replace("1", "2")))


def of_shard(damage):
    return lambda store: damage(write(store, TEXTS[4:8]))


SHARD_DAMAGE = {
    "cut": cut,
    "deleted": delete,
    "a bit of a vector": lambda path: flip_vector(path, TEXTS[5]),
    "a bit of a key": flip_key,
    "garbage": garbage,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_a_damaged_shard_is_named_and_only_its_texts_are_scored_again(store, damage):
    path = write(store, TEXTS[4:8])
    SHARD_DAMAGE[damage](path)
    (line,) = verify(store.folder)
    assert line.startswith(f"{path}: ")
    assert verify(store.folder, repair=True) == [line] and not path.exists()
    assert verify(store.folder) == [] and is_tidy(store)
    assert missing(store, TEXTS) == TEXTS[4:8] and store.is_complete([*TEXTS[:4], *TEXTS[8:]])
    write(store, TEXTS[4:8])
    store.publish()
    assert verify(store.folder) == [] and np.array_equal(store.open().vectors(TEXTS), expected(TEXTS))


@pytest.mark.parametrize("where", ["row", "checksum of a row", "first half", "second half", "row number", "header"])
def test_a_damaged_index_is_named_and_built_again(store, where):
    rows, keys = one(store, "rows"), one(store, "keys")
    place = {
        "row": (rows, 4096 + 5 * 24),
        "checksum of a row": (rows, 4096 + 5 * 24 + 16),
        "first half": (keys, 4096 + 5 * 8),
        "second half": (keys, 4096 + 12 * 8 + 5 * 8),
        "row number": (keys, 4096 + 24 * 8 + 5 * 8),
        "header": (rows if len(where) % 2 else keys, 20),
    }
    flip(*place[where])
    (line,) = verify(store.folder)
    assert line.startswith(f"{rows}: the index")
    assert verify(store.folder, repair=True) == [line]
    assert verify(store.folder) == [] and is_tidy(store)
    assert np.array_equal(store.open().vectors(TEXTS), expected(TEXTS))


def test_an_index_with_more_than_its_shards(store):
    entries = read_entries(store.folder)
    entries[SPEC.key]["shards"].pop()
    write_entries(store.folder, entries)
    assert len(verify(store.folder, repair=True)) == 1 and verify(store.folder) == []


@pytest.mark.parametrize("suffix", ["rows", "keys"])
@pytest.mark.parametrize("damage", [cut, delete])
def test_an_index_file_that_is_cut_or_gone(store, suffix, damage):
    damage(one(store, suffix))
    assert len(verify(store.folder)) == 1
    verify(store.folder, repair=True)
    assert verify(store.folder) == [] and store.is_complete(TEXTS) and is_tidy(store)


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1, "stores": {"a": 1}}'])
def test_a_damaged_manifest(store, content):
    manifest = store.folder / "manifest.json"
    manifest.write_text(content)
    (line,) = verify(store.folder.parent)
    assert line.startswith(f"{manifest}: ")
    verify(store.folder, repair=True)
    assert verify(store.folder) == [] and store.is_complete(TEXTS)


@pytest.mark.parametrize("value", [np.nan, 2.0])
def test_numbers_that_cannot_be_vectors(store, value):
    vectors = expected(["odd", "even"]).astype(np.float16)
    vectors[1] *= np.float16(value)
    path = write_shard(store.folder, SPEC, Shard.of(keys_of(["odd", "even"]), vectors))
    assert verify(store.folder) == [f"{path}: vector 1 is not finite, or not of length 1"]


def test_shards_under_a_wrong_name(store):
    path = write(store, ["new"])
    wrong = path.rename(path.with_name(f"{SPEC.key}-0123456789abcdef.parquet"))
    foreign = shards(store)[0].parent / f"{'0' * 12}-0123456789abcdef.parquet"
    foreign.write_bytes(wrong.read_bytes())
    assert {line.split(":")[0] for line in verify(store.folder)} == {str(wrong), str(foreign)}
    verify(store.folder, repair=True)
    assert not wrong.exists() and not foreign.exists() and store.is_complete(TEXTS)


def test_shards_that_were_set_aside_are_removed(store):
    flip_vector(write(store, TEXTS[4:8]), TEXTS[5])
    store.publish(rebuild=True)
    (line,) = verify(store.folder)
    assert ".parquet.damaged: " in line
    verify(store.folder, repair=True)
    assert is_tidy(store) and verify(store.folder) == []


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1, "step": 5}))
    (tmp_path / "some-pairs.parquet").write_bytes(b"")
    for look in (verify, stats, lambda path: verify(path, repair=True)):
        with pytest.raises(UserError, match="no teacher's store there"):
            look(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_command_ends_with_1_where_something_is_damaged(store):
    def answer(*arguments):
        result = CliRunner().invoke(cli, ["store", *arguments])
        return result.exit_code, result.stdout

    run = str(store.folder.parent)
    assert answer("verify", run) == (0, "0 damaged\n")
    path = write(store, TEXTS[4:8])
    cut(path)
    code, said = answer("verify", run)
    assert code == 1 and str(path) in said and said.endswith("1 damaged\n")
    code, said = answer("verify", run, "--repair")
    assert code == 0 and str(path) in said and "mended" in said
    assert answer("verify", run) == (0, "0 damaged\n")
    write(store, TEXTS[4:8])
    code, said = answer("compact", run)
    assert (code, said) == (0, f"{store.folder}  {SPEC.key}: 3 shards are 1 now\n")
    code, said = answer("stats", run)
    assert code == 0 and "texts        12\n" in said and "1 of 1 shards" in said


def test_stats(store):
    spec = StoreSpec(**{**vars(SPEC), "prompt": "query: "})
    Store(store.folder, spec).write_shard(TEXTS[:2], expected(TEXTS[:2]))
    lines = stats(store.folder.parent)
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:10]}
    sizes = sum(path.stat().st_size for path in shards(store))
    index = one(store, "rows").stat().st_size + one(store, "keys").stat().st_size
    assert lines[0] == f"{store.folder}  {SPEC.key}"
    assert said["texts"] == "12" and said["shards"] == f"3, {sizes:,} bytes" and said["index"] == f"{index:,} bytes"
    assert said["vectors"] == "d = 6, float16" and said["fingerprint"] == "f" * 32 and said["pooling"] == "mean"
    assert said["published"] == "3 of 3 shards" and said["max"] == "length 128 tokens"
    assert any("'query: '" in line for line in lines) and any("2 (not published)" in line for line in lines)
    delete(one(store, "rows"))
    assert any("published" in line and "damaged" in line for line in stats(store.folder))
