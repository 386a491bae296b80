"""Scoring does what is missing and nothing else."""

import logging

import numpy as np
import pytest
from tiny_teacher import TEXTS, save_tiny_teacher

from flipkd_dist import score as score_module
from flipkd_dist.model_files import fingerprint
from flipkd_dist.score import score, score_shards_here
from flipkd_dist.store import Store, StoreSpec
from flipkd_dist.teacher import Teacher


class CountingTeacher:
    """A teacher that remembers what it encoded; `fails_after` texts it is killed."""

    def __init__(self, fails_after=10**9, value=1.0):
        self.encoded, self.fails_after, self.value = [], fails_after, value

    def encode(self, texts, batch_size):
        if len(self.encoded) + len(texts) > self.fails_after:
            raise KeyboardInterrupt
        self.encoded += texts
        return np.array([[len(text), self.value] for text in texts], np.float32)


MANY = [f"{'x' * (number % 7)}{number}" for number in range(40)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, StoreSpec("f" * 32, "mean", 128, hidden_size=2, dtype="float32"))


def score_with(teacher, store, texts=MANY, **options):
    return score(texts, store, score_shards_here(teacher, store), **options)


def test_every_unique_text_once(store):
    teacher = CountingTeacher()
    summary = score_with(teacher, store, MANY + MANY[:10])
    assert (summary.num_texts, summary.num_new) == (40, 40) and summary.seconds > 0
    assert sorted(teacher.encoded) == sorted(MANY)
    assert np.array_equal(store.open().vectors(MANY)[:, 0], [len(text) for text in MANY])


def test_an_unchanged_rerun_does_nothing_and_says_so(store, caplog):
    score_with(CountingTeacher(), store)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in store.folder.iterdir()}

    def never(shards):
        raise AssertionError("nothing is missing")

    with caplog.at_level(logging.INFO, "flipkd_dist"):
        summary = score(MANY, store, never)
    assert (summary.num_texts, summary.num_new) == (40, 0)
    assert "all 40 texts are there, nothing to do" in caplog.text
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in store.folder.iterdir()} == before


def test_new_texts_are_added_to_the_old(store):
    score_with(CountingTeacher(), store, MANY[:30])
    teacher = CountingTeacher()
    assert score_with(teacher, store).num_new == 10
    assert sorted(teacher.encoded) == sorted(MANY[30:]) and store.is_complete(MANY)


def test_after_a_kill_only_the_missing_are_encoded(store):
    killed = CountingTeacher(fails_after=25)
    with pytest.raises(KeyboardInterrupt):
        score_with(killed, store, shard_size=5)
    assert len(killed.encoded) == 25 and not store.is_complete(killed.encoded)  # no manifest yet
    (store.folder / f"{store.spec.key}-0123456789abcdef.parquet.0a1b2c3d.tmp").write_bytes(b"PAR1 half a shard")
    teacher = CountingTeacher()
    assert score_with(teacher, store).num_new == 15
    assert sorted(killed.encoded + teacher.encoded) == sorted(MANY)
    assert store.is_complete(MANY) and not list(store.folder.glob("*.tmp"))


def test_killed_before_the_manifest(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score_with(CountingTeacher(), store)
    teacher = CountingTeacher()
    assert score_with(teacher, store).num_new == 0 and not teacher.encoded and store.is_complete(MANY)


def test_a_truncated_shard_is_scored_again(store, caplog):
    score_with(CountingTeacher(), store, shard_size=5)
    path = min(store.folder.glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:100])
    teacher = CountingTeacher()
    assert score_with(teacher, store).num_new == 5
    assert path.name in caplog.text and len(teacher.encoded) == 5 and store.is_complete(MANY)


def test_another_teacher_scores_everything_anew(store):
    score_with(CountingTeacher(), store)
    other = Store(store.folder, StoreSpec("0" * 32, "mean", 128, hidden_size=2, dtype="float32"))
    teacher = CountingTeacher(value=2.0)
    assert score_with(teacher, other).num_new == 40
    assert set(other.open().vectors(MANY)[:, 1]) == {2.0}


@pytest.mark.parametrize("workers, limit, sizes", [(1, 2048, [10] * 4), (2, 2048, [5] * 8), (2, 3, [3] * 13 + [1])])
def test_shards_give_every_worker_something_longest_first(store, workers, limit, sizes):
    seen = []

    def remember(shards):
        seen.extend(shards)
        return score_shards_here(CountingTeacher(), store)(shards)

    score(MANY, store, remember, num_workers=workers, shard_size=limit)
    assert [len(shard) for shard in seen] == sizes
    lengths = [len(text) for shard in seen for text in shard]
    assert lengths == sorted(lengths, reverse=True)


def test_few_texts_and_none(store):
    assert score_with(CountingTeacher(), store, MANY[:1], num_workers=8).num_new == 1
    assert score_with(CountingTeacher(), store, []).num_texts == 0


def test_a_mapper_that_loses_texts_is_noticed(store):
    with pytest.raises(AssertionError, match="0 of 40"):
        score(MANY, store, lambda shards: iter(()))
    assert not (store.folder / "manifest.json").exists()


def test_progress_is_counted_in_texts(store, monkeypatch):
    seen = []

    class Bar(score_module.tqdm):
        def update(self, n=1):
            seen.append((n, self.total))
            return super().update(n)

    monkeypatch.setattr(score_module, "tqdm", Bar)
    score_with(CountingTeacher(), store, shard_size=8)
    assert seen == [(8, 40)] * 5


def test_with_a_real_encoder(tmp_path):
    folder = save_tiny_teacher(tmp_path / "model")
    teacher = Teacher(folder, "mean", 32)
    store = Store(tmp_path / "teacher", StoreSpec(fingerprint(folder), "mean", 32, teacher.hidden_size))
    score_with(teacher, store, TEXTS, num_workers=2)
    assert np.abs(store.open().vectors(TEXTS) - teacher.encode(TEXTS, 64)).max() < 5e-4  # float16
