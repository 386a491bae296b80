"""What is asked of the cluster: resources by Ray's names, and how many runs at once."""

import os
import re
import sys

import pytest

from flipkd_dist import engine, ray_launch
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.ray_launch import resize_interval_s, runs_at_once, task_options
from flipkd_dist.run_folder import RunFolder
from flipkd_dist.world import World

SKIP = "RAY_DEDUP_LOGS_SKIP_REGEX"
SAID = (  # by Ray 2.60, when workers start
    "[2026-11-23 00:58:45,776 E 20569 20605] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: "
    "'bd8c0961ce8988c52d9d8c2c01000000' has constructor arguments in the object store and max_restarts > 0. If the "
    "arguments in the object store go out of scope or are lost, the actor restart will fail. See "
    "https://github.com/ray-project/ray/issues/53727 for more details."
)


@pytest.fixture
def skipped(monkeypatch, tmp_path):
    """What a stand-in for ray reads while it is imported, as Ray does, with these variables set."""
    (tmp_path / "ray.py").write_text(
        f"import os\nREAD = os.environ.get({SKIP!r})\ndef is_initialized():\n    return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray")

    def ask(**variables: str) -> str | None:
        monkeypatch.setattr(os, "environ", variables)
        ray_launch.join_or_start_ray(RunConfig(name="quiet"))
        return sys.modules["ray"].READ

    return ask


def test_a_line_of_rays_that_is_no_error_is_left_out(skipped):
    pattern = re.compile(skipped())
    assert pattern.search(SAID)
    others = ("PreemptionWatcher", "Teacher"), ("has constructor arguments", "died"), ("core_worker.cc", "train.py")
    for word, other in others:
        assert word in SAID and not pattern.search(SAID.replace(word, other))


@pytest.mark.parametrize(
    "variables, value", [({SKIP: "mine"}, "mine"), ({SKIP: ""}, ""), ({"FLIPKD_DEBUG": "1"}, None)]
)
def test_the_users_own_choice_of_lines_stays_and_with_debug_all_are_shown(skipped, variables, value):
    assert skipped(**variables) == value


def test_memory_is_no_resource_of_the_users_own():
    need = {"CPU": 2.0, "GPU": 0.5, "memory": 4e9, "a100": 1.0}
    assert task_options(need) == {"num_cpus": 2.0, "num_gpus": 0.5, "memory": 4e9, "resources": {"a100": 1.0}}
    assert task_options({}) == {"num_cpus": 0, "num_gpus": 0, "memory": None, "resources": {}}


@pytest.mark.parametrize(
    "grows, jobs, at_once", [(False, None, 2), (False, 8, 2), (False, 1, 1), (True, None, 2), (True, 8, 8)]
)
def test_a_cluster_that_can_grow_gets_as_many_runs_as_were_asked_for(monkeypatch, grows, jobs, at_once):
    room = {"small": 5, "large": 2}
    monkeypatch.setattr(ray_launch, "autoscales", lambda: grows)
    monkeypatch.setattr(ray_launch, "places", lambda config: room[config.name])
    assert runs_at_once([RunConfig(name=name) for name in room], jobs) == at_once


def test_how_often_room_for_more_workers_is_looked_for(monkeypatch):
    monkeypatch.delenv("FLIPKD_RESIZE_INTERVAL_S", raising=False)
    assert resize_interval_s() == 60
    monkeypatch.setenv("FLIPKD_RESIZE_INTERVAL_S", "2.5")
    assert resize_interval_s() == 2.5
    for wrong in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("FLIPKD_RESIZE_INTERVAL_S", wrong)
        with pytest.raises(UserError, match=f"^FLIPKD_RESIZE_INTERVAL_S = '{wrong}': not a number of seconds above 0"):
            resize_interval_s()


def test_a_stop_is_raised_where_the_disk_has_no_room_for_its_word(monkeypatch, tmp_path):
    """Ray Train would start workers again that failed to write the line."""
    monkeypatch.setattr(engine, "join_world", lambda *_: World())
    stopped = StoppedOnRequest("no space left: step 20's checkpoint was not written")

    def train(*_):
        raise stopped

    monkeypatch.setattr("flipkd_dist.train.train", train)
    config = RunConfig(name="full", output_dir=str(tmp_path))
    config.run_dir.mkdir()
    work = {"stages": ["train"], "trained": None, "mlflow_run_id": None}
    ray_launch._stages(config, work)
    assert RunFolder(config).stop.read_text() == str(stopped)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_launch, "write_whole", full)
    with pytest.raises(StoppedOnRequest, match="step 20's checkpoint was not written"):
        ray_launch._stages(config, work)
