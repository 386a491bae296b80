"""`flipkd run` on Ray: stopped, killed, and run again, it ends with the adapter and the log of an undisturbed run."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from safetensors.torch import load_file
from test_run import FLIPKD, call, tiny_config

pytestmark = pytest.mark.system
STEPS = 40


def start(config: Path, *overrides: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return subprocess.Popen(
        [*FLIPKD, "run", str(config), *overrides], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    file = folder / "metrics.jsonl"
    while not (file.exists() and f'"step": {step},' in file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    file = tiny_config(folder)
    values = yaml.safe_load(file.read_text())
    values["train"] |= {"max_steps": STEPS, "save_steps": 3, "eval_steps": 20, "logging_steps": 1}
    values["student"]["lora_dropout"] = 0.1
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.soak
def test_stopped_then_killed_then_finished(config):
    folder = config.parent / "runs" / "tiny"
    stopped = start(config)
    wait_for_step(folder, 5, stopped)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=120)[1]
    assert stopped.returncode == 75, said[-3000:]
    assert "stopped on request with a complete checkpoint of step" in said.splitlines()[-1]

    killed = start(config)
    wait_for_step(folder, 20, killed)
    family = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
    for process in family:
        process.kill()
    killed.wait()
    psutil.wait_procs(family, timeout=20)
    assert not (folder / "adapter").exists()

    finished = call("run", config)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "train: resumed at step" in finished.stderr

    undisturbed = call("run", config, "name=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    weights = [
        load_file(path / "adapter/adapter_model.safetensors") for path in (folder, folder.parent / "undisturbed")
    ]
    for key, value in weights[0].items():
        np.testing.assert_array_equal(weights[1][key].numpy(), value.numpy())

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def test_a_worker_of_torchrun_is_asked_to_stop(config):
    """Its launcher ends the others as soon as one is gone: rank 0 has said what it has to say before."""
    folder, scored = config.parent / "runs" / "torchrun", call("score", config, "name=torchrun")
    assert scored.returncode == 0, scored.stderr[-3000:]
    script = str(Path(__file__).parents[2] / "launchers" / "deepspeed_train.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, script, str(config), "name=torchrun"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_step(folder, 3, process)
    workers = [child for child in psutil.Process(process.pid).children() if script in child.cmdline()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "flipkd: stopped on request with a complete checkpoint of step" in said
    status = "SELECT status FROM runs"
    assert sqlite3.connect(folder / "mlflow.db").execute(status).fetchall() == [("KILLED",)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0 and "train: resumed at step" in finished.stderr, finished.stderr[-3000:]
    assert sqlite3.connect(folder / "mlflow.db").execute(status).fetchall() == [("FINISHED",)]


def test_stopped_before_training(config):
    """While the teacher scores, or Ray starts: nothing is lost, and nothing waits."""
    folder = config.parent / "runs" / "early"
    process = start(config, "name=early")
    while not (folder / "config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said[-3000:]
    assert said.splitlines()[-1] == "flipkd: stopped by SIGTERM: run the same command again to go on"


@pytest.mark.soak
def test_each_step_stands_once_in_one_mlflow_run(config):
    from flipkd_dist.tracking import client

    mlflow = client(f"sqlite:///{config.parent / 'runs' / 'tiny' / 'mlflow.db'}")
    [tracked] = mlflow.search_runs([experiment.experiment_id for experiment in mlflow.search_experiments()])
    assert tracked.info.status == "FINISHED"
    steps = [point.step for point in mlflow.get_metric_history(tracked.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, STEPS + 1))
    validated = mlflow.get_metric_history(tracked.info.run_id, "validation_roc_auc")
    assert [point.step for point in validated] == [20, STEPS]
