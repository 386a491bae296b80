"""What Ray's clusters do to a training: workers killed, the head lost, two clusters on a machine."""

import json
import os
import random
import socket
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from gang import run_gang
from ray_cluster import Head, head, wait_until
from safetensors.torch import load_file
from test_run import FLIPKD, call, tiny_config
from tiny import fill_store

from flipkd_dist.config import load_config
from flipkd_dist.metric_log import last_step
from flipkd_dist.train import train

pytestmark = pytest.mark.system
STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    file = tiny_config(tmp_path_factory.mktemp("faults"))
    values = yaml.safe_load(file.read_text())
    values["train"] |= {"max_steps": STEPS, "save_steps": 4, "eval_steps": 15, "logging_steps": 1}
    values["student"]["lora_dropout"] = 0.1
    values["distributed"]["timeout_s"] = 300
    values["teacher"]["store_path"] = str(file.parent / "store")
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def undisturbed(config) -> dict[str, np.ndarray]:
    """The weights of a run that nothing happened to, in two processes without Ray; the teacher's store is filled."""
    run = load_config(config, ["name=undisturbed"])
    fill_store(run)
    run.run_dir.joinpath("config.yaml").write_text(run.to_yaml())
    run_gang(2, train, run)
    return weights(run.run_dir)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in load_file(folder / "adapter/adapter_model.safetensors").items()}


def check_finished(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = weights(folder)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    database = sqlite3.connect(folder / "mlflow.db")
    assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    steps = database.execute("SELECT step FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
    assert [step for (step,) in steps] == list(range(1, STEPS + 1))
    assert not (folder / "failures").exists() or not any((folder / "failures").iterdir())


class Command:
    """A `flipkd` command on a cluster, or on one of its own; what it says goes to a file."""

    def __init__(self, cluster: Head | None, verb: str, config: Path, *overrides: str):
        environment = {**(os.environ if cluster is None else cluster.environment), "OMP_NUM_THREADS": "1"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        if cluster is None:
            environment.pop("RAY_ADDRESS", None)
        self.file = Path(tempfile.mkstemp(suffix=".err", dir=config.parent)[1])
        with self.file.open("w") as stderr:
            command = [*FLIPKD, verb, str(config), *overrides]
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)

    @property
    def said(self) -> str:
        return self.file.read_text()

    def wait(self, timeout_s: float = 300) -> int:
        try:
            return self.process.wait(timeout_s)
        finally:
            self.end()

    def end(self) -> None:
        if self.process.poll() is None:
            family = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
            for process in family:
                process.kill()
            self.process.wait()

    def wait_until(self, true) -> None:
        try:
            wait_until(lambda: true() or self.process.poll() is not None, self.said[-3000:])
            assert self.process.poll() is None, self.said[-3000:]
        except BaseException:
            self.end()
            raise

    def workers(self) -> list[psutil.Process]:
        """Of a cluster of its own."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ray::RayTrainWorker" in " ".join(child.cmdline())]


def test_a_worker_then_the_head_are_lost(config, undisturbed):
    folder, host = config.parent / "runs" / "faulty", socket.gethostname()
    with head() as first:
        driver = Command(first, "train", config, "name=faulty")
        driver.wait_until(lambda: last_step(folder / "metrics.jsonl") >= 6)
        (folder / "save").touch()
        driver.wait_until(lambda: not (folder / "save").exists())  # a checkpoint was asked for, and is there
        workers = sorted(first.family("ray::RayTrainWorker"), key=lambda process: process.pid)
        assert len(workers) == 2
        workers[1].kill()
        began, at_death = time.monotonic(), last_step(folder / "metrics.jsonl")
        psutil.wait_procs(workers, timeout=100)  # the other one ends with the group
        driver.wait_until(lambda: last_step(folder / "metrics.jsonl") > max(12, at_death))
        print(f"a killed worker: {time.monotonic() - began:.0f} s until training was further than before")

        workers = first.family("ray::RayTrainWorker")
        [gcs] = first.family("gcs_server")
        gcs.kill()
        began = time.monotonic()
        code, said = driver.wait(150), driver.said
        print(f"the head lost: {time.monotonic() - began:.0f} s until the command ended")
        assert code == 75, said[-3000:]
        port = first.port
        end = f":{port} is gone: start it, and run the same command again to go on"
        assert said.splitlines()[-1].startswith("flipkd: Ray's head at ") and said.splitlines()[-1].endswith(end)
        [restart] = [line for line in said.splitlines() if "started again" in line]
        assert f"on {host}: died (killed, or out of memory?), after step" in restart
        assert "a checkpoint of step" in said
        assert restart.endswith("(restart 1 of 3)") and "Traceback" not in said.split("is gone")[0]
        assert not psutil.wait_procs(workers, timeout=60)[1]  # none trains on
        assert not (folder / "adapter").exists()

        refused = Command(first, "train", config, "name=faulty")
        assert refused.wait(60) == 2 and f"RAY_ADDRESS: nothing answers at 127.0.0.1:{port}: start" in refused.said

    with head() as second, head():
        finished = Command(second, "train", config, "name=faulty")
        assert finished.wait() == 0, finished.said[-3000:]
    assert "train: resumed at step" in finished.said
    assert "PreemptionWatcher" not in said + finished.said
    assert "multiple active Ray instances" not in finished.said  # the watch over its workers knows its own cluster
    check_finished(folder, undisturbed)


def test_what_a_restart_would_meet_again_is_said_at_once(config):
    failed = call("train", config, "name=idle", "train.learning_rate=1e-38", "train.max_steps=2")
    assert failed.returncode == 1
    assert "started again" not in failed.stderr and "Traceback" not in failed.stderr
    said = failed.stderr.splitlines()[-1]
    assert said.startswith(f"flipkd: rank 0 on {socket.gethostname()}: RuntimeError: "), failed.stderr[-3000:]
    assert "as its base does: train longer" in said


def test_an_interface_that_is_not_there_is_said_at_once(config, undisturbed, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    began = time.monotonic()
    refused = call("train", config, "name=nowhere")
    print(f"a wrong interface: {time.monotonic() - began:.0f} s until the command ended")
    assert refused.returncode == 2, refused.stderr[-3000:]
    wrong = f"flipkd: rank 0 on {socket.gethostname()}: GLOO_SOCKET_IFNAME: eth77 is no interface with an address here"
    assert refused.stderr.splitlines()[-1].startswith(f"{wrong}: take one of "), refused.stderr[-3000:]
    assert "started" not in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_five_kills_at_random_steps(config, undisturbed):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    generator, folder = random.Random(seed), config.parent / "runs" / f"killed-{seed}"
    steps = sorted(generator.sample(range(1, STEPS), 5))
    command = Command(None, "train", config, f"name={folder.name}", "distributed.max_failures=5")
    for step in steps:
        command.wait_until(lambda step=step: last_step(folder / "metrics.jsonl") >= step)
        began, workers = time.monotonic(), command.workers()
        generator.choice(workers).kill()
        psutil.wait_procs(workers, timeout=100)
        print(f"killed at step {step}, its group gone after {time.monotonic() - began:.0f} s")
    assert command.wait() == 0, command.said[-3000:]
    assert command.said.count("started again from step") == 5
    check_finished(folder, undisturbed)


@pytest.mark.soak
def test_no_restart_is_left(config):
    folder = config.parent / "runs" / "brittle"
    command = Command(None, "train", config, "name=brittle", "distributed.max_failures=0", "train.max_steps=4000")
    command.wait_until(lambda: last_step(folder / "metrics.jsonl") >= 5)
    began = time.monotonic()
    command.workers()[0].kill()
    assert command.wait() == 1
    print(f"ended {time.monotonic() - began:.0f} s after the kill")
    said = command.said.splitlines()[-1]
    assert said.startswith("flipkd: rank ") and f" on {socket.gethostname()}: died (killed, or out of memory?)" in said
    assert "no restart is left of distributed.max_failures = 0" in said


@pytest.mark.soak
def test_a_worker_that_stands_still_is_started_again(config, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "15")
    folder = config.parent / "runs" / "silent"
    command = Command(None, "train", config, "name=silent", "train.max_steps=600")
    command.wait_until(lambda: last_step(folder / "metrics.jsonl") >= 5)
    began, silent = time.monotonic(), command.workers()[0]
    silent.suspend()
    command.wait_until(lambda: "does not answer (hung, or its node cannot be reached?)" in command.said)
    noticed = time.monotonic() - began
    command.wait_until(lambda: "resumed at step" in command.said)
    print(f"noticed after {noticed:.0f} s, training again after {time.monotonic() - began:.0f} s")
    assert not silent.is_running() or silent.status() == psutil.STATUS_ZOMBIE
    assert command.wait() == 0, command.said[-3000:]


@pytest.mark.soak
def test_a_kill_after_training_does_not_train_again(config):
    folder = config.parent / "runs" / "evaluating"
    command = Command(None, "run", config, "name=evaluating")
    command.wait_until(lambda: "exported" in read(folder / "stages.json"))
    adapter = (folder / "adapter" / "flipkd.json").stat().st_mtime_ns
    command.workers()[0].kill()
    assert command.wait() == 0, command.said[-3000:]
    assert "evaluate: rank" in command.said and "train: the adapter is complete, skipped" in command.said
    assert (folder / "adapter" / "flipkd.json").stat().st_mtime_ns == adapter
    assert "test" in json.loads((folder / "metrics.json").read_text())


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
