"""`flipkd compare` on Ray: killed, stopped and run again, no finished run is repeated and none begins anew."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from test_run import FLIPKD, call, tiny_config

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
STEPS = 300  # about six seconds of a quiet core: a kill comes in time
TABLE = ("--rows", "overlap,teacher,lora_sup,flip", "--seeds", "2", "--jobs", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tiny_config(tmp_path_factory.mktemp("compare"))
    values = yaml.safe_load(file.read_text())
    values["train"] |= {"max_steps": STEPS, "save_steps": 10, "eval_steps": 150, "logging_steps": 1}
    values["distributed"] = {"num_workers": 1, "deepspeed": None}
    file.write_text(yaml.safe_dump(values))
    return file


def start(config: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    command = [*FLIPKD, "compare", str(config), *TABLE]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finished(folder: Path) -> set[str]:
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("rows/*/stages.json")}
    return {name for name, stages in found.items() if "row" in stages}


def wait_for_training(folder: Path, process: subprocess.Popen, num_finished: int) -> str:
    """The run that is training, with a checkpoint, while so many others are finished."""
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        done = finished(folder)
        begun = {path.parents[2].name for path in folder.glob("rows/*/checkpoints/step-*/manifest.json")} - done
        begun = {name for name in begun if not (folder / "rows" / name / "adapter").exists()}
        if len(done) >= num_finished and begun:
            return begun.pop()
        time.sleep(0.01)


def test_killed_then_stopped_then_finished_nothing_is_done_twice(config):
    folder = config.parent / "runs" / "tiny-compare"
    killed = start(config)
    hit = wait_for_training(folder, killed, 1)
    family = psutil.Process(killed.pid).children(recursive=True)
    workers = [process for process in family if "make_run" in process.name()]
    killed.kill()  # the driver alone: Ray ends the rest
    killed.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert workers and not alive
    [first] = finished(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "rows" / first).rglob("*") if path.is_file()}

    stopped = start(config)
    asked = wait_for_training(folder, stopped, 2)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=120)[1]
    assert stopped.returncode == 75, said[-3000:]
    assert "1 of 4 runs are finished already" in said
    assert (
        said.splitlines()[-1]
        == "flipkd: stopped on request with 2 of 4 runs finished: run the same command again to go on"
    )
    assert "complete checkpoint of step" in (folder / "rows" / asked / "run.log").read_text()

    last = call("compare", config, *TABLE)
    assert last.returncode == 0, last.stderr[-3000:]
    assert "2 of 4 runs are finished already" in last.stderr and len(finished(folder)) == 4
    assert before == {path: path.stat().st_mtime_ns for path in before}
    for name in (hit, asked):
        assert "train: resumed at step" in (folder / "rows" / name / "run.log").read_text()
    for path in folder.glob("rows/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    for row in ("overlap", "teacher", "lora_sup", "flip"):
        assert row in last.stdout


def test_its_runs_are_nested_in_one_mlflow_run(config):
    database = sqlite3.connect(config.parent / "runs/tiny-compare/mlflow.db")
    runs = dict(database.execute("SELECT run_uuid, name FROM runs WHERE status = 'FINISHED'").fetchall())
    parents = dict(database.execute("SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'").fetchall())
    [parent] = set(parents.values())
    assert runs.pop(parent) == "tiny-compare"
    assert runs.keys() == parents.keys() and len(runs) == 4


def test_a_finished_table_needs_no_cluster_and_another_row_only_its_own_runs(config):
    folder = config.parent / "runs" / "tiny-compare"
    before = finished(folder)
    again = call("compare", config, *TABLE)
    assert again.returncode == 0 and finished(folder) == before
    assert "finished already" not in again.stderr  # nothing was started
    failing = call("compare", config, *TABLE, "--set", "flip.distributed.timeout_s=0")
    assert failing.returncode == 2 and "row flip: distributed.timeout_s" in failing.stderr


@pytest.mark.soak
def test_workers_of_their_own_process_group_make_rows_too(config):
    """Two workers under ZeRO-3: what they say is in the run's log."""
    two = ("name=two", "distributed.num_workers=2", "distributed.deepspeed=ds_configs/zero3.json")
    options = ("train.per_device_train_batch_size=2", "train.max_steps=4", "train.eval_steps=2")
    found = call("compare", config, *two, *options, "--rows", "lora_sup", "--seeds", "1")
    assert found.returncode == 0, found.stderr[-3000:]
    [log] = (config.parent / "runs" / "two-compare").glob("rows/*/run.log")
    assert "train 4/4: loss" in log.read_text()


@pytest.mark.soak
def test_a_row_that_fails_leaves_the_others(config):
    """Its checkpoint folder cannot be made."""
    options = ("name=failing", "train.max_steps=4", "train.eval_steps=2")
    started = call("compare", config, *options, "--rows", "lora_sup,flip", "--seeds", "1")
    assert started.returncode == 0, started.stderr[-3000:]
    folder = config.parent / "runs" / "failing-compare"
    [flip] = folder.glob("rows/flip-*")
    (flip / "stages.json").unlink()
    for path in (*flip.glob("adapter/*"), *flip.glob("checkpoints/*/*")):
        path.unlink()
    for path in (flip / "adapter", *flip.glob("checkpoints/*"), flip / "checkpoints"):
        path.rmdir()
    (flip / "checkpoints").write_text("in the way")
    found = call("compare", config, *options, "--rows", "lora_sup,flip", "--seeds", "1")
    assert found.returncode == 1, found.stderr[-3000:]
    assert "failed: flip seed 42: " in found.stdout and "lora_sup" in found.stdout
    statuses = [
        run["status"] for row in json.loads((folder / "comparison.json").read_text())["rows"] for run in row["runs"]
    ]
    assert statuses == ["done", "failed"]
