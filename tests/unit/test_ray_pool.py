"""The pool's decisions, with a stand-in for Ray whose actors do at once what a test says; tests/system has Ray."""

import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from flipkd_dist import ray_pool
from flipkd_dist.config import TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.ray_pool import Pool
from flipkd_dist.scorer import Scorer
from flipkd_dist.store import Store, StoreSpec

SPEC = StoreSpec("f" * 32, "mean", 128, hidden_size=2, dtype="float32")
SHARDS = [[f"text {number}"] for number in range(12)]


class Encoder:
    """Cuts every text with a 3 in it."""

    def __init__(self):
        self.num_truncated = 0

    def encode(self, texts, batch_size):
        self.num_truncated += sum("3" in text for text in texts)
        if any("large" in text for text in texts):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return np.ones((len(texts), 2), np.float32)


@dataclass
class Source:
    settings: TeacherConfig

    def load(self, device):
        return Encoder()


@dataclass
class Reference:
    value: object = None
    is_ready: bool = True


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__("a long traceback")
        self.cause = cause


@dataclass
class FakeRay:
    """Calls are done at once, or never: where there is no room, where `hangs(method)` says so."""

    room: int = 2
    hangs: object = lambda method, arguments: False
    actors: list = field(default_factory=list)
    killed: int = 0
    asked: dict = field(default_factory=dict)  # options of the actor started last

    def module(self) -> dict[str, ModuleType]:
        ray = ModuleType("ray")
        ray.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        ray.cluster_resources = lambda: {"CPU": self.room}
        ray.available_resources = lambda: {"CPU": max(0, self.room - len(self.actors))}
        ray.remote, ray.wait, ray.get, ray.kill = self.remote, self.wait, self.get, self.kill
        return {"ray": ray, "ray.exceptions": ray.exceptions}

    def remote(self, kind):
        def options(**asked):
            self.asked = asked
            return SimpleNamespace(remote=lambda: self.start(kind()))

        return SimpleNamespace(options=options)

    def start(self, actor):
        placed = len(self.actors) < self.room
        self.actors.append(actor)

        def method(name):
            def remote(*arguments):
                if not placed or self.hangs(name, arguments):
                    return Reference(is_ready=False)
                try:
                    return Reference(getattr(actor, name, lambda: True)(*arguments))
                except Exception as error:
                    return Reference(RayTaskError(error))

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(actor=actor, **{name: method(name) for name in ("load", "score", "__ray_ready__")})

    def wait(self, references, num_returns=1, timeout=0, fetch_local=True):
        return [one for one in references if one.is_ready], None

    def get(self, reference):
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, handle):
        self.actors.remove(handle.actor)
        self.killed += 1


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A function from shards to (pool, Ray): with the settings of a teacher, and of FakeRay."""

    def make(shards=SHARDS, timeout_s=60.0, settings=None, **options) -> tuple[Pool, FakeRay]:
        ray = FakeRay(**options)
        for name, module in ray.module().items():
            monkeypatch.setitem(sys.modules, name, module)
        for name, stand_in in (("check_reached", lambda _: None), ("autoscales", lambda: False), ("POLL_S", 0)):
            monkeypatch.setattr(ray_pool, name, stand_in)
        teacher = TeacherConfig(model_name_or_path="x", max_length=16, **(settings or {}))
        return Pool(Source(teacher), Store(tmp_path / "teacher", SPEC), timeout_s, iter(shards)), ray

    return make


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes a second."""
    now = iter(range(10**9))
    monkeypatch.setattr(ray_pool.time, "monotonic", lambda: float(next(now)))


def test_every_shard_is_scored_and_texts_that_were_cut_are_told_once(made, caplog):
    pool, _ = made([*SHARDS, ["3", "13", "4"]])
    with caplog.at_level(logging.WARNING, "flipkd_dist"):
        assert sum(pool.run()) == 15
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 15 texts were cut to teacher.max_length = 16 tokens"
    ]
    assert pool.store.holds(text for shard in SHARDS for text in shard).all()


def test_a_shard_that_never_comes_here_names_its_node(made, monkeypatch):
    """The actor's node has a disk of its own."""
    write = Store.write_shard

    def elsewhere(store, texts, vectors):
        path = write(store, texts, vectors)
        path.rename(path.with_suffix(".elsewhere"))
        return path

    pool, _ = made()
    monkeypatch.setattr(ray_pool, "check_written", partial(ray_pool.check_written, patience_s=0.0))
    monkeypatch.setattr(Store, "write_shard", elsewhere)
    with pytest.raises(UserError, match=r"^output_dir: node \S+ of the Ray cluster does not see .*teacher, .*: put "):
        list(pool.run())


def test_a_shard_that_was_merged_since_is_there_all_the_same(made, monkeypatch):
    monkeypatch.setattr(ray_pool, "check_written", None)
    write = Store.write_shard

    def merged(store, texts, vectors):
        path = write(store, texts, vectors)
        write(store, [*texts, "another"], np.ones((len(texts) + 1, 2), np.float32))
        path.unlink()
        return path

    monkeypatch.setattr(Store, "write_shard", merged)
    assert sum(made()[0].run()) == 12


def test_an_actor_that_hangs_is_told_again_and_again(made, caplog, clock):
    asked = Counter()

    def hangs(method, arguments):
        asked[method] += 1
        return method == "score" and asked[method] > 4

    pool, _ = made(hangs=hangs, timeout_s=30.0)
    progress = pool.run()
    with caplog.at_level(logging.WARNING, "flipkd_dist"):
        assert [next(progress) for _ in range(4)] == [1] * 4
        looks, check = iter(range(80)), pool._check_silence

        def stops():
            check()
            if next(looks, None) is None:
                raise KeyboardInterrupt

        pool._check_silence = stops
        with pytest.raises(KeyboardInterrupt):
            next(progress)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) >= 2 and all("no shard has ended for" in line and "2 actors are at work" in line for line in said)
    times = [int(line.split(" for ")[1].split()[0]) for line in said]
    assert 30 <= times[0] < 40 and 60 <= times[1] < 70


def test_a_long_load_is_no_lack_of_room(made, caplog, clock):
    pool, _ = made(hangs=lambda method, _: method == "load", timeout_s=10.0)
    looks, check = iter(range(25)), pool._check_silence

    def stops():
        check()
        if next(looks, None) is None:
            raise KeyboardInterrupt

    pool._check_silence = stops
    with caplog.at_level(logging.WARNING, "flipkd_dist"), pytest.raises(KeyboardInterrupt):
        list(pool.run())
    assert "2 actors still load the model after 10 s" in caplog.text and "after 20 s" in caplog.text
    pool, _ = made(room=0, timeout_s=10.0)
    with pytest.raises(
        UserError, match=r"no scoring actor started within .*one needs 1 CPU, the Ray cluster has 0 CPU"
    ):
        list(pool.run())


def test_nodes_may_come_where_those_there_are_of_a_named_group(monkeypatch):
    """As Ray 2.60 tells of its nodes, those of `RAY_NODE_TYPE_NAME=head ray start --head` and of a plain one."""
    plain = {"NodeID": "8b91", "Alive": True, "Resources": {"CPU": 1.0}, "Labels": {"ray.io/node-id": "8b91"}}
    of_group = {**plain, "NodeID": "a55e", "Labels": {"ray.io/node-group": "head", "ray.io/node-id": "a55e"}}
    for nodes, grows in (([plain], False), ([plain, of_group], True), ([plain, {**of_group, "Alive": False}], False)):
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda nodes=nodes: nodes))
        assert ray_pool.autoscales() == grows


@pytest.mark.parametrize("scales, sizes", [(True, [1, 2, 4, 8, 9]), (False, [1, 2, 3, 4, 5, 6, 7, 8, 9])])
def test_with_an_autoscaler_the_pool_doubles(made, monkeypatch, scales, sizes):
    endless = ([f"text {number}"] for number in range(10**6))
    pool, _ = made(endless, room=100, settings={"num_workers": [1, 9]})
    monkeypatch.setattr(ray_pool, "autoscales", lambda: scales)
    seen = []
    grow = pool._grow
    pool._grow = lambda: (seen.append(len(pool.members)), grow())
    for _ in zip(pool.run(), range(100), strict=False):
        if len(pool.members) == 9:
            break
    assert list(dict.fromkeys([*seen, len(pool.members)])) == sizes


def test_an_error_of_the_disk_is_a_death_of_the_shard_and_others_go_on(made, monkeypatch, caplog):
    write, failed = Store.write_shard, Counter()

    def stale(store, texts, vectors):
        if texts == ["text 5"] and failed["stale"] < 2:
            failed["stale"] += 1
            raise OSError(116, "Stale file handle")
        return write(store, texts, vectors)

    monkeypatch.setattr(Store, "write_shard", stale)
    pool, ray = made()
    assert sum(pool.run()) == 12 and failed["stale"] == ray.killed == 2
    assert "an actor is gone, its shards are given out again ([Errno 116] Stale file handle)" in caplog.text


def test_a_full_gpu_names_the_setting(made):
    with pytest.raises(UserError, match=r"^teacher\.batch_size = 64: .*: lower it \(tried to allocate 2 GiB\)$"):
        list(made([["a large one"]])[0].run())


@pytest.mark.parametrize("threads, said", [(1, ("false", None)), (3, ("true", "3"))])
def test_the_tokenizer_has_the_threads_of_the_actor(monkeypatch, tmp_path, threads, said):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(os, "environ", {"TOKENIZERS_PARALLELISM": "false"})
    source = Source(TeacherConfig(model_name_or_path="x", num_cpus_per_worker=threads))
    Scorer().load(source, Store(tmp_path, SPEC), "cpu")
    assert (os.environ["TOKENIZERS_PARALLELISM"], os.environ.get("RAYON_NUM_THREADS")) == said


@pytest.mark.parametrize(
    ("settings", "in_cluster", "gpus"),
    [
        ({}, 2, 1.0),
        ({}, 0, 0.0),
        ({"api_base": "http://127.0.0.1:8000/v1"}, 2, 0.0),  # the server has the GPU
        ({"num_gpus_per_worker": 0.25}, 2, 0.25),
        ({"num_gpus_per_worker": 0.0}, 2, 0.0),
        ({"resources_per_worker": {"spot": 0.0}}, 0, 0.0),  # none of it: no node has to offer it
    ],
)
def test_what_an_actor_takes(monkeypatch, settings, in_cluster, gpus):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": in_cluster}))
    found = ray_pool.actor_resources(TeacherConfig(num_cpus_per_worker=3, **settings))
    assert found == {"CPU": 3.0, **({"GPU": gpus} if gpus else {})}


def test_actors_ask_for_the_resources_of_their_own_nodes(made, monkeypatch):
    pool, ray = made(settings={"num_cpus_per_worker": 2, "resources_per_worker": {"teacher": 0.5, "memory": 4e9}})
    free = {"CPU": 64.0, "memory": 64e9, "teacher": 1.0}
    monkeypatch.setattr(sys.modules["ray"], "available_resources", lambda: free)
    assert sum(pool.run()) == 12
    asked = {key: ray.asked[key] for key in ("num_cpus", "num_gpus", "memory", "resources")}
    assert asked == {"num_cpus": 2.0, "num_gpus": 0, "memory": 4e9, "resources": {"teacher": 0.5}}
    assert pool._room() == 2  # by the scarcest of them, not by the CPUs


def test_where_no_node_offers_them_the_line_says_what_is_missing(made, clock):
    pool, _ = made(room=0, timeout_s=10.0, settings={"resources_per_worker": {"teacher": 1.0}})
    with pytest.raises(
        UserError, match=r"needs 1 CPU, 1 teacher, .* has 0 CPU, 0 teacher free: lower .*resources_per_"
    ):
        list(pool.run())
