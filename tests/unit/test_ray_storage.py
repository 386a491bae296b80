"""A cluster whose nodes do not all see the run folder is refused, by name; nodes are asked by a stand-in."""

import errno
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from flipkd_dist import ray_storage
from flipkd_dist.errors import UserError
from flipkd_dist.ray_storage import check_reached, check_written, sees

NODES = {"1a": "head (10.0.0.1)", "2b": "worker (10.0.0.2)"}


def test_one_node_is_not_asked(tmp_path):
    check_reached(tmp_path / "teacher", {"1a": "head"}, ask=None)
    assert not (tmp_path / "teacher").exists()


def test_every_node_that_sees_the_token_passes_and_nothing_stays(tmp_path):
    asked = []

    def ask(nodes, path, content):
        asked.extend(nodes)
        return [sees(path, content, patience_s=0) for _ in nodes]

    check_reached(tmp_path / "teacher", NODES, ask)
    assert asked == ["1a", "2b"] and not list((tmp_path / "teacher").iterdir())


def test_a_node_with_a_disk_of_its_own_is_named(tmp_path):
    elsewhere = tmp_path / "disk of the worker"
    elsewhere.mkdir()

    def ask(nodes, path, content):
        return [sees(path, content, 0), sees(elsewhere / path.name, content, 0)]

    with pytest.raises(UserError, match=r"^output_dir: node worker \(10\.0\.0\.2\) .* does not see .*teacher.*: put "):
        check_reached(tmp_path / "teacher", NODES, ask)
    assert not list((tmp_path / "teacher").iterdir())


def test_another_content_under_the_name_is_not_the_token(tmp_path):
    (tmp_path / "token").write_text("another")
    assert not sees(tmp_path / "token", "mine", patience_s=0)


def test_a_slow_file_system_has_its_time(tmp_path):
    timer = threading.Timer(0.3, (tmp_path / "token").write_text, ["mine"])
    timer.start()
    assert sees(tmp_path / "token", "mine", patience_s=10)
    timer.join()


def test_a_node_that_has_left_is_told_and_not_waited_for(tmp_path, caplog):
    check_reached(tmp_path / "teacher", NODES, lambda nodes, path, content: [True, None])
    assert "node worker (10.0.0.2) has left the Ray cluster" in caplog.text


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"no space left .* make room"):
        check_reached(tmp_path / "teacher", NODES, ask=None)


class RayError(Exception):
    pass


class GetTimeoutError(RayError, TimeoutError):
    pass


@pytest.mark.parametrize(
    "fails, alive, expected",
    [(None, True, True), (GetTimeoutError, True, False), (RayError, True, False), (RayError, False, None)],
)
def test_what_a_node_does_not_say_is_no_if_it_lives(monkeypatch, tmp_path, fails, alive, expected):
    """A hung mount answers in no time, a dead node never; Ray is a stand-in."""
    monkeypatch.setattr(ray_storage, "ANSWER_S", 0.0)
    cancelled, patience = [], []

    def get(reference, timeout):
        patience.append(timeout)
        if reference == "2b" and fails:
            raise fails
        return True

    ray, strategies = ModuleType("ray"), ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node
    ray.exceptions = SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError)
    task = SimpleNamespace(
        options=lambda scheduling_strategy, **_: SimpleNamespace(remote=lambda *_: scheduling_strategy)
    )
    ray.remote, ray.get, ray.cancel = lambda _: task, get, lambda reference, force: cancelled.append(reference)
    node = dict(NodeManagerHostname="h", NodeManagerAddress="a")
    ray.nodes = lambda: [{**node, "NodeID": "1a", "Alive": True}, {**node, "NodeID": "2b", "Alive": alive}]
    for name, module in (("ray", ray), ("ray.exceptions", ray.exceptions), (strategies.__name__, strategies)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
    assert ray_storage._ask_by_task(["1a", "2b"], tmp_path, "it") == [True, expected]
    assert patience == [0.0, 0.0] and cancelled == (["2b"] if fails is GetTimeoutError else [])


def test_a_shard_of_another_node_has_its_time(tmp_path):
    timer = threading.Timer(0.3, (tmp_path / "shard").write_text, ["mine"])
    timer.start()
    check_written(tmp_path / "shard", "worker", patience_s=10)
    timer.join()
    with pytest.raises(UserError, match=r"^output_dir: node worker of the Ray cluster does not see "):
        check_written(tmp_path / "other", "worker", patience_s=0)
