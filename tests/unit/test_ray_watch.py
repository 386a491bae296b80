"""What the controller of Ray Train says and decides when workers fail or find no room; Ray is stood in for."""

import json
import time

import pytest
import torch.distributed as dist

from flipkd_dist import ray_watch
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import StoppedOnRequest, UserError, WorkerFailed
from flipkd_dist.failures import first_cause, note
from flipkd_dist.ray_watch import Watch, ended, is_exported
from flipkd_dist.run_folder import RunFolder, write_json

RESET = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
KILLED = "died (killed, or out of memory?)"


@pytest.fixture
def config(tmp_path) -> RunConfig:
    config = RunConfig(name="x", output_dir=str(tmp_path), distributed={"num_workers": [1, 4], "timeout_s": 100})
    config.run_dir.mkdir()
    return config


@pytest.fixture
def watch(config) -> Watch:
    watch = Watch(config, ["train", "evaluate"], "abc", {"CPU": 2.0, "GPU": 1.0}, None)
    watch.starting()
    watch.started({0: "node1", 1: "node2"})
    return watch


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only by `sleep`, and by adding to them."""
    passed = [1000.0]
    monkeypatch.setattr(ray_watch.time, "monotonic", lambda: passed[0])
    monkeypatch.setattr(ray_watch.time, "sleep", lambda seconds: passed.__setitem__(0, passed[0] + seconds))
    return passed


def free() -> list[dict[str, float]]:
    return [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 4.0}]


def test_a_killed_worker_is_the_cause_not_the_peer_that_noticed_first(watch, config):
    note(config.run_dir, 0, RESET)
    watch.failed({0: RESET}, {1: KILLED})
    assert str(first_cause(config.run_dir)) == f"rank 1 on node2: {KILLED}" == str(watch.cause)
    assert not watch.cause.final


def test_an_error_that_nobody_could_note_bears_the_name_of_its_host(watch, config):
    watch.failed({1: OSError("no space left")}, {})
    assert str(watch.cause) == "rank 1 on node2: OSError: no space left" and not watch.cause.final


def test_what_a_restart_would_meet_again_ends_the_run(watch, config):
    note(config.run_dir, 1, UserError("data.train: line 3: no label: correct it"))
    with pytest.raises(UserError, match=r"^data.train: line 3: no label: correct it$"):
        watch.failed({1: UserError("data.train: line 3: no label: correct it")}, {})
    watch.starting()
    with pytest.raises(WorkerFailed, match=r"^rank 0 on node1: ValueError: seven: .*failures has the traceback$"):
        watch.failed({0: ValueError("seven")}, {})


def test_a_meeting_that_cannot_work_ends_the_run_and_one_that_a_worker_did_not_survive_does_not(watch, config):
    gone = UserError("10.0.0.1:29500: rank 0 went away during the rendezvous: look at what it says")
    gone.__cause__ = dist.DistStoreError("wait timeout after 300000ms")
    note(config.run_dir, 1, gone)
    watch.failed({1: gone}, {0: KILLED})
    assert watch.cause.error == KILLED and not watch.cause.final
    watch.starting()
    note(config.run_dir, 1, gone)
    watch.failed({1: gone}, {})  # the end of rank 0 is not known yet
    assert not watch.cause.final
    watch.starting()
    wrong = UserError("rank 1 on node2: GLOO_SOCKET_IFNAME: eth7 is no interface with an address here")
    note(config.run_dir, 1, wrong)
    with pytest.raises(UserError, match=r"^rank 1 on node2: GLOO_SOCKET_IFNAME: eth7 is no interface"):
        watch.failed({1: wrong}, {})


def test_a_new_attempt_forgets_the_notes_of_the_one_before(watch, config):
    watch.failed({}, {1: KILLED})
    watch.starting()
    note(config.run_dir, 0, RESET)
    watch.failed({0: RESET}, {})
    assert watch.cause.rank == 0


def test_a_restart_is_one_line_with_its_place_and_count(watch, config, said):
    RunFolder(config).metric_log.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 9)))
    watch.updated("Running", True, free)
    watch.failed({}, {1: KILLED})
    for state in ("Restarting", "Scheduling", "Running", "Running"):
        watch.updated(state, True, free)
    write_json(config.run_dir / "stages.json", {"exported": "abc"})
    write_json_to(RunFolder(config).adapter / "flipkd.json")
    watch.failed({}, {0: "its node was taken away"})
    watch.updated("Preempting", False, free)
    watch.updated("Restarting", False, free)
    watch.updated("Running", True, free)
    watch.updated("Restarting", True, free)
    cause = f"rank 1 on node2: {KILLED}"
    assert said == [
        f"train: {cause}, after step 8: started again from step 0 (restart 1 of 3)",
        "train: a node is to be taken away: a checkpoint is written before it goes",
        "evaluate: rank 0 on node1: its node was taken away: started again",
        "evaluate: rank 0 on node1: its node was taken away: started again (restart 2 of 3)",
    ]
    assert RunFolder(config).save.exists()


def write_json_to(path) -> None:
    path.parent.mkdir()
    write_json(path, {})


def test_workers_that_find_no_room_say_what_is_missing_and_end(watch, config, clock, said):
    watch.updated("Running", True, free)
    with pytest.raises(StoppedOnRequest, match=r"run the same command again to go on$"):
        for _ in range(200):
            watch.updated("Restarting", True, free)
    assert 1100 <= clock[0] <= 1122  # looked at every minute
    [_, told] = said
    assert (
        "no room for 1 workers of 2 CPU and 1 GPU since 60 s; 2 CPU, 4 GPU are free on 2 nodes of the Ray cluster"
        in told
    )


def test_a_start_that_takes_long_is_no_lack_of_room(watch, clock):
    for _ in range(300):
        watch.updated("Rescheduling", True, lambda: [{"CPU": 3.0, "GPU": 1.0}])
    assert clock[0] > 1200


def test_another_number_of_workers_is_said(watch, said):
    watch.started({0: "node1"})
    assert said == ["train: goes on with 1 of at most 4 workers"]


def test_workers_that_never_had_room_are_the_users_mistake(config, clock):
    watch = Watch(config, ["train"], "abc", {"CPU": 2.0}, None)
    with pytest.raises(
        UserError, match=r"distributed.num_workers: no room .* add nodes or raise distributed.timeout_s"
    ):
        for _ in range(200):
            watch.updated("Initializing", True, free)


def test_the_end_of_all_restarts_names_the_setting(watch, config):
    watch.failed({}, {1: KILLED})
    assert f"{ended(watch.cause, config)}" == (
        f"rank 1 on node2: {KILLED}: no restart is left of distributed.max_failures = 3: "
        "run the same command again to go on"
    )


def test_a_training_is_left_out_only_where_its_adapter_lies(config):
    folder = RunFolder(config)
    folder.mark_done("exported", "abc")
    assert not is_exported(folder, "abc")
    write_json_to(folder.adapter / "flipkd.json")
    assert is_exported(folder, "abc")
    assert not is_exported(folder, "other") and not is_exported(folder, None)


def test_time_counts_from_when_the_workers_were_lost(watch, clock):
    clock[0] += 1e6
    watch.updated("Running", True, free)
    watch.updated("Restarting", True, free)
    assert time.monotonic() - watch.since < 5


def test_before_ray_changes_the_number_of_workers_they_save(watch, config, clock, monkeypatch):
    """The controller waits for the checkpoint, as long as a collective may take, and for nothing once that is over."""
    save = RunFolder(config).save
    asked = []

    def wait(seconds):
        clock[0] += seconds
        asked.append(save.exists())
        if len(asked) == 3:
            save.unlink()  # as rank 0 does when the checkpoint is complete

    monkeypatch.setattr(ray_watch.time, "sleep", wait)
    watch.updated("Resizing", True, free)
    assert asked == [True] * 3
    watch.updated("Scheduling", True, free)
    assert not save.exists()
    watch.updated("Running", True, free)

    before = clock[0]
    monkeypatch.setattr(ray_watch.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    watch.updated("Resizing", True, free)  # nobody answers
    assert 100 <= clock[0] - before < 101 and not save.exists()
    watch.updated("Running", True, free)

    write_json(config.run_dir / "stages.json", {"exported": "abc"})
    (config.run_dir / "adapter").mkdir()
    (config.run_dir / "adapter" / "flipkd.json").touch()
    before = clock[0]
    watch.updated("Resizing", True, free)  # the evaluation is all that runs
    assert clock[0] == before and not save.exists()


def test_a_worker_that_ray_ended_or_lost_is_no_end(watch, config):
    watch.failed({1: ValueError("no class of ours")}, {1: "was ended by Ray: its node had no memory left"})
    assert str(watch.cause).endswith("had no memory left") and not watch.cause.final


def test_a_start_that_fails_is_told_and_tried_only_as_often_as_max_failures_says(watch, said):
    reason = "RayActorError: No module named 'flipkd'"

    def fail() -> None:
        watch.updated("Rescheduling", True, free, reason)
        watch.updated("Rescheduling", True, free, reason)  # the same one, looked at again
        watch.updated("Scheduling", True, free)

    fail()
    watch.started({0: "node1", 1: "node2"})
    for _ in range(3):
        fail()
    assert said[-3:] == [
        f"train: the workers could not be started ({reason}): tried again ({number} of 3)" for number in (1, 2, 3)
    ]
    with pytest.raises(WorkerFailed, match=r"could not be started, 4 times in a row \(RayActorError: No module"):
        fail()


def test_a_stop_that_finds_no_room_for_its_word_comes_by_the_controller(watch):
    line = "no space left: step 20's checkpoint was not written"
    with pytest.raises(StoppedOnRequest, match=f"^{line}$"):
        watch.failed({0: StoppedOnRequest(line), 1: RESET}, {})


def test_where_a_worker_has_failed_nobody_waits_for_its_checkpoint(watch, config, clock):
    note(config.run_dir, 0, RESET)
    before = clock[0]
    watch.updated("Resizing", True, free)
    assert clock[0] == before and not RunFolder(config).save.exists()


def test_workers_that_need_nothing_have_room_on_any_node(config, clock):
    watch = Watch(config, ["train"], "abc", {"CPU": 0.0}, None)
    for _ in range(300):
        watch.updated("Scheduling", True, free)
    assert clock[0] > 1200
