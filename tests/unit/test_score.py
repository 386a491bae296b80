"""Scoring does what is missing and nothing else."""

import logging

import numpy as np
import pytest
from tiny_teacher import TEXTS, save_tiny_teacher

from flipkd_dist import score as score_module
from flipkd_dist import text_stream
from flipkd_dist.model_files import fingerprint
from flipkd_dist.score import score, score_shard, score_shards_here, survey
from flipkd_dist.store import Store, StoreSpec
from flipkd_dist.teacher import Teacher


class CountingTeacher:
    """A teacher that remembers what it encoded; `fails_after` texts it is killed."""

    def __init__(self, fails_after=10**9, value=1.0):
        self.encoded, self.fails_after, self.value, self.num_truncated = [], fails_after, value, 0

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


@pytest.fixture
def small_shards(monkeypatch):
    """Windows of 20 texts in 4 shards."""
    monkeypatch.setattr(text_stream, "MULTIPLE", 1)
    monkeypatch.setattr(text_stream, "SHARDS_PER_WINDOW", 4)
    monkeypatch.setattr(text_stream, "WINDOW", 20)


def test_every_unique_text_once(store):
    teacher = CountingTeacher()
    summary = score_with(teacher, store, MANY + MANY[:10])
    assert (summary.num_texts, summary.num_new) == (40, 40)
    assert sorted(teacher.encoded) == sorted(MANY)
    assert np.array_equal(store.open().vectors(MANY)[:, 0], [len(text) for text in MANY])


def test_an_unchanged_rerun_does_nothing_and_says_so(store, caplog):
    score_with(CountingTeacher(), store)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in store.folder.iterdir()}

    teacher = CountingTeacher()
    with caplog.at_level(logging.INFO, "flipkd_dist"):
        summary = score_with(teacher, store)
    assert not teacher.encoded
    assert (summary.num_texts, summary.num_new) == (40, 0)
    assert "all 40 texts are there, nothing to do" in caplog.text
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in store.folder.iterdir()} == before


def test_new_texts_are_added_to_the_old(store):
    score_with(CountingTeacher(), store, MANY[:30])
    teacher = CountingTeacher()
    assert score_with(teacher, store).num_new == 10
    assert sorted(teacher.encoded) == sorted(MANY[30:]) and store.is_complete(MANY)


def test_after_a_kill_only_the_missing_are_encoded(store, small_shards):
    killed = CountingTeacher(fails_after=25)
    with pytest.raises(KeyboardInterrupt):
        score_with(killed, store)
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


def test_a_truncated_shard_is_scored_again(store, small_shards, caplog):
    score_with(CountingTeacher(), store)
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


def files(store):
    return {path.name: path.read_bytes() for path in store.folder.glob("*.parquet")}


@pytest.mark.parametrize("done", [(), (0,), (1, 3), (0, 2, 5), (3, 6)])
def test_a_rerun_after_a_kill_makes_the_very_same_files(store, small_shards, tmp_path, done):
    """Workers finish in any order: shards `done` were complete when everything was killed."""

    def killed(shards):
        for number, shard in enumerate(shards):
            if number in done:
                yield score_shard(CountingTeacher(), store, 64, shard).num_texts
        raise KeyboardInterrupt

    undisturbed = Store(tmp_path / "undisturbed", store.spec)
    for folder in (undisturbed, store):  # some texts were there before: shards without them
        score_with(CountingTeacher(), folder, MANY[3:30:7])
    score_with(CountingTeacher(), undisturbed)
    with pytest.raises(KeyboardInterrupt):
        score(MANY, store, killed)
    assert len(files(store)) == 4 + len(done) < len(files(undisturbed))
    score_with(CountingTeacher(), store)
    assert files(store) == files(undisturbed)


def test_workers_end_when_scoring_is_interrupted(store, small_shards, monkeypatch):
    ended = []

    def mapper(shards):
        try:
            for shard in shards:
                yield len(shard)
        finally:
            ended.append(True)

    class Bar(score_module.tqdm):
        def update(self, n=1):
            if n:
                raise KeyboardInterrupt

    monkeypatch.setattr(score_module, "tqdm", Bar)
    workers = []
    with pytest.raises(KeyboardInterrupt):
        score(MANY, store, lambda shards: workers.append(mapper(shards)) or workers[0])
    assert ended == [True]


def test_the_stream_is_read_no_further_than_the_mapper_asks(store, small_shards):
    read = []

    def texts():
        for number in range(1000):
            read.append(number)
            yield f"text {number}"

    def two_shards(shards):
        yield sum(len(next(shards)) for _ in range(2))

    assert score(texts(), store, two_shards).num_new == 10
    assert len(read) == 20  # one window


def test_few_texts_and_none(store):
    assert score_with(CountingTeacher(), store, MANY[:1]).num_new == 1
    assert score_with(CountingTeacher(), store, []).num_texts == 0


def test_spellings_of_one_text_are_one_text_and_stored_normalised(store):
    teacher = CountingTeacher()
    summary = score_with(teacher, store, ["a  b", "a b", " a b "])
    assert summary.num_texts == 1 and teacher.encoded == ["a b"]


def test_a_mapper_that_loses_texts_is_noticed(store):
    with pytest.raises(AssertionError, match="0 of 40"):
        score(MANY, store, lambda shards: (0 for _ in shards))
    assert not (store.folder / "manifest.json").exists()


def test_progress_is_counted_in_texts_those_that_are_there_at_once(store, small_shards, monkeypatch):
    score_with(CountingTeacher(), store, MANY[:20])
    seen = []

    class Bar(score_module.tqdm):
        def update(self, n=1):
            seen.append((n, self.total))
            return super().update(n)

    monkeypatch.setattr(score_module, "tqdm", Bar)
    score_with(CountingTeacher(), store, total=40)
    assert seen == [(20, 40), (0, 40), *[(5, 40)] * 4]


def test_survey_counts_unique_texts_and_knows_what_is_there(store):
    assert survey(MANY + MANY, store) == (40, False)
    score_with(CountingTeacher(), store, MANY[:39])
    assert survey(MANY, store) == (40, False)
    score_with(CountingTeacher(), store)
    assert survey(iter(MANY), store) == (40, True)


def test_survey_shows_that_it_goes_on(store, monkeypatch):
    shown = []

    class Bar(score_module.tqdm):
        def close(self):
            shown.append((self.desc, self.unit, self.n))
            super().close()

    monkeypatch.setattr(score_module, "tqdm", Bar)
    survey(MANY + MANY, store)
    assert shown[0] == ("check", " texts", 80)


def test_with_a_real_encoder(tmp_path):
    folder = save_tiny_teacher(tmp_path / "model")
    teacher = Teacher(folder, "mean", 32)
    store = Store(tmp_path / "teacher", StoreSpec(fingerprint(folder), "mean", 32, teacher.hidden_size))
    score_with(teacher, store, TEXTS)
    assert np.abs(store.open().vectors(TEXTS) - teacher.encode(TEXTS, 64)).max() < 5e-4  # float16
