"""The pool on Ray: whatever is killed, the store ends as an undisturbed one, bit for bit; room, failures, nodes."""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from deadly_teacher import BrokenSource, DeadlySource
from ray_cluster import wait_until
from tiny import save_student, sentences
from tiny_teacher import save_tiny_teacher

from flipkd_dist import ray_pool, ray_storage
from flipkd_dist.config import TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import fingerprint
from flipkd_dist.ray_pool import map_on_actors
from flipkd_dist.score import score, score_shards_here
from flipkd_dist.store import Store, StoreSpec
from flipkd_dist.teacher import Teacher
from flipkd_dist.teacher_source import FolderPart, TeacherSource

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]
NUM_TEXTS, SHARD = 2048, 64  # texts; the pool makes 32 shards of them
TEXTS = sentences(NUM_TEXTS, seed=3, shortest=8, longest=20)
WIDE = dict(hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768)  # 0.1 s a shard


def make_source(folder: Path, kind=TeacherSource, **settings) -> TeacherSource:
    settings = TeacherConfig(model_name_or_path=str(folder), max_length=32, **settings)
    spec = StoreSpec(fingerprint(folder), "mean", 32, 192)
    return kind(settings, (FolderPart(folder, None, spec),), (1.0,), spec)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), **WIDE)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> dict[str, bytes]:
    """The shards of a store that was filled without workers."""
    store = Store(tmp_path_factory.mktemp("undisturbed"), make_source(model).spec)
    score(TEXTS, store, score_shards_here(Teacher(model, "mean", 32), store))
    return files(store.folder)


@pytest.fixture(scope="module")
def cluster():
    """A local cluster of two CPUs in processes of its own, so that a driver may die and the cluster stay."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
    yield cluster
    import ray

    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def one_retry(monkeypatch):
    """A shard may end two actors: each of them costs a start."""
    monkeypatch.setattr(ray_pool, "RETRIES", 1)


@pytest.fixture
def joined(cluster):
    import ray

    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment()})
    return cluster


def environment() -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def scorers() -> list[psutil.Process]:
    """The processes of this cluster's scoring actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::Scorer"):
                found.append(process)
    return found


def fill(source: TeacherSource, folder: Path, at=None, do=None, texts=TEXTS, timeout_s=200.0) -> Store:
    """Score on the pool; `do` is called when `at` texts are done."""
    store, done = Store(folder, source.spec), 0

    def mapper(shards):
        nonlocal done, do
        for count in map_on_actors(source, store, timeout_s, shards):
            done += count
            yield count
            if do is not None and done >= at:
                do()
                do = None

    score(texts, store, mapper)
    return store


def kill_one() -> None:
    victims = scorers()
    random.choice(victims).kill()


def test_an_actor_is_killed_in_the_middle(joined, model, undisturbed, tmp_path):
    store = fill(make_source(model), tmp_path, NUM_TEXTS // 4, kill_one)
    assert files(tmp_path) == undisturbed and store.is_complete(TEXTS)
    wait_until(lambda: not scorers(), "the actors have ended")  # they end with the pool


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_an_actor_is_killed_at_random(joined, model, undisturbed, tmp_path, seed):
    at = random.Random(seed).randrange(NUM_TEXTS)
    fill(make_source(model), tmp_path, at, kill_one)
    assert files(tmp_path) == undisturbed


@pytest.mark.soak
def test_all_actors_killed_more_often_than_a_shard_may_be(joined, model, undisturbed, tmp_path):
    """Deaths are counted for each shard, not for the pool."""
    source, store, kills = make_source(model), Store(tmp_path, make_source(model).spec), 0

    def mapper(shards):
        nonlocal kills
        for done, count in enumerate(map_on_actors(source, store, 200.0, shards)):
            yield count
            if done % 4 == 0 and kills < 6:
                for process in scorers()[:1]:
                    process.kill()
                    kills += 1

    score(TEXTS, store, mapper)
    assert kills == 6 and files(tmp_path) == undisturbed


def test_a_shard_that_kills_its_actors_ends_as_one_line(joined, one_retry, model, tmp_path):
    texts = [f"{text} number {i}" for i, text in enumerate(TEXTS[:600])]
    texts[300] = "the bomb " * 30
    with pytest.raises(RuntimeError, match=r"a shard of 64 texts, the first of them 'the bomb .*ended 2 actors"):
        fill(make_source(model, DeadlySource, num_workers=1), tmp_path, texts=texts)


def test_what_goes_wrong_in_an_actor_comes_out(joined, one_retry, model, tmp_path):
    with pytest.raises(UserError, match=r"^teacher\.prompt: it holds a mistake: remove it$"):
        fill(make_source(model, DeadlySource, num_workers=1), tmp_path, texts=[*TEXTS[:100], "a mistake"])
    with pytest.raises(RuntimeError, match=r"^teacher actor: ValueError: a bug of ours$"):
        fill(make_source(model, DeadlySource, num_workers=1), tmp_path, texts=["a bug"])
    with pytest.raises(RuntimeError, match=r"a shard of 1 texts, .*ended 2 actors \(.*Stale file handle\)"):
        fill(make_source(model, DeadlySource, num_workers=1), tmp_path, texts=["a stale text"])
    with pytest.raises(UserError, match=r"^teacher folder: 3 weights are missing: get it again$"):
        fill(make_source(model, BrokenSource, num_workers=1), tmp_path)
    wait_until(lambda: not scorers(), "the actors have ended")


def test_the_pool_grows_where_there_is_room_and_no_further(joined, model, tmp_path):
    source, seen, at_draws, end = make_source(model, num_workers=[1, 8]), [], [], time.monotonic() + 200

    def shards():
        """As long as one actor works alone, and some more for a third to come."""
        while time.monotonic() < end and seen.count(2) < 30:
            at_draws.append(len(scorers()))
            yield TEXTS[:SHARD]

    for _ in map_on_actors(source, Store(tmp_path, source.spec), 200.0, shards()):
        seen.append(len(scorers()))
    # The first is drawn before any actor runs, the next two for the first actor, alone; there are two CPUs.
    assert at_draws[:3] == [0, 1, 1] and max(seen) == 2, (at_draws, seen)


def test_without_room_one_line_says_so(joined, model, tmp_path):
    with pytest.raises(UserError, match=r"no scoring actor started within .*one needs 64 CPU, the Ray .* 2 CPU free"):
        fill(make_source(model, num_cpus_per_worker=64), tmp_path, timeout_s=2.0)


def test_shards_are_drawn_as_they_are_needed_and_actors_end_when_the_pool_is_closed(joined, model, tmp_path):
    drawn = []

    def shards():
        for first in range(0, NUM_TEXTS, SHARD):
            drawn.append(first)
            yield TEXTS[first : first + SHARD]

    source = make_source(model, num_workers=2)
    results = map_on_actors(source, Store(tmp_path, source.spec), 200.0, shards())
    for num_done in range(1, 8):
        next(results)
        assert len(drawn) <= num_done + 2 * 2 + 2  # in flight, done but not yet told, and the next
    results.close()
    wait_until(lambda: not scorers(), "the actors have ended")


def test_threads_of_an_actor_are_its_cpus(joined, model, tmp_path):
    import ray

    from flipkd_dist.scorer import Scorer

    class Asked(Scorer):
        def threads(self):
            import torch

            return torch.get_num_threads(), os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"]

    source = make_source(model, num_cpus_per_worker=2)
    actor = ray.remote(Asked).options(num_cpus=2).remote()
    ray.get(actor.load.remote(source, Store(tmp_path, source.spec), "cpu"))
    assert ray.get(actor.threads.remote()) == (2, "2", "true")  # the last is false in the environment of the pool
    ray.kill(actor)


DRIVER = """
import sys, pickle, ray
import test_pool
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": test_pool.environment()})
test_pool.fill(test_pool.make_source(test_pool.Path(sys.argv[2])), test_pool.Path(sys.argv[3]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_driver_is_killed_at_random_and_the_cluster_stays(cluster, model, undisturbed, tmp_path, seed):
    """Its actors may still be writing when the next driver starts."""
    command = [sys.executable, "-c", DRIVER, cluster.address, str(model), str(tmp_path)]
    options = dict(env={**os.environ, **environment()}, stderr=subprocess.PIPE, text=True)
    killed = subprocess.Popen(command, **options)
    many = random.Random(seed).randrange(1, len(undisturbed))
    wait_until(lambda: len(files(tmp_path)) >= many or killed.poll() is not None, "shards")
    killed.kill()
    killed.communicate()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    again = subprocess.run(command, **options, timeout=200)
    assert again.returncode == 0, again.stderr[-2000:]
    assert files(tmp_path) == undisturbed
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


@pytest.fixture(scope="module")
def run_config(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with (folder / "pairs.jsonl").open("w") as file:
        for number, (text_a, text_b) in enumerate(zip(TEXTS[::2], TEXTS[1::2], strict=True)):
            file.write(json.dumps({"text_a": text_a, "text_b": text_b, "label": number % 2}) + "\n")
    values = {
        "name": "killed",
        "output_dir": str(folder / "runs"),
        "data": {"train": str(folder / "pairs.jsonl")},
        "teacher": {"model_name_or_path": str(model), "max_length": 32},
        "student": {
            "model_name_or_path": str(save_student(folder / "student")),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
        },
        "loss": {"threshold": None},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def flipkd_score(config: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "flipkd_dist", "score", str(config), *overrides]
    options = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | environment()
    return subprocess.Popen(command, env=options, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_everything_is_killed_in_the_middle_of_flipkd_score(run_config, undisturbed):
    """The driver, its actors and Ray itself at once, as when the machine goes down."""
    folder = run_config.parent / "runs" / "killed" / "teacher"
    killed = flipkd_score(run_config)
    wait_until(lambda: len(files(folder)) >= 5 or killed.poll() is not None, "five shards")
    family = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
    for process in family:
        process.kill()
    killed.communicate()
    psutil.wait_procs(family, timeout=20)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 5 <= len(before) < len(undisturbed) and not (folder / "manifest.json").exists()

    again = flipkd_score(run_config)
    said = again.communicate(timeout=200)[1]
    assert again.returncode == 0, said[-3000:]
    assert files(folder) == undisturbed
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())  # none twice
    num_new = NUM_TEXTS - SHARD * len(before)
    assert f"{num_new} of {NUM_TEXTS} texts are new" in said and "teacher similarity of 1,024" in said


@pytest.mark.soak
def test_a_node_is_lost(model, undisturbed, tmp_path, joined):
    second = joined.add_node(num_cpus=2, object_store_memory=100_000_000)
    joined.wait_for_nodes()
    try:
        source = make_source(model, num_workers=4)
        nodes = list(ray_storage._nodes())
        fill(source, tmp_path, NUM_TEXTS // 4, partial(joined.remove_node, second, allow_graceful=False))
        token = tmp_path / "token"
        token.write_text("it")
        assert sorted(ray_storage._ask_by_task(nodes, token, "it"), key=str) == [None, True]  # the second has left
        ray_storage.check_reached(tmp_path)
    finally:
        if second in joined.list_all_nodes():
            joined.remove_node(second)
    assert files(tmp_path) == undisturbed
