"""Two hosts under Ray, one of which is lost and returns: the training goes on with one, then with both again."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from gang import run_gang
from namespaces import Host, hosts
from safetensors.torch import load_file
from test_run import tiny_config
from tiny import fill_store

from flipkd_dist.config import RunConfig, load_config
from flipkd_dist.train import train

pytestmark = pytest.mark.system
STEPS = 60
SLOW_S = "2"  # a step, while hosts come and go
ROOT = Path(__file__).parents[2]
NODE_ID = """
import sys, ray
ray.init(logging_level="ERROR", log_to_driver=False)
print(next(node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == sys.argv[1]))
"""


def wait_for(found: Callable[[], object], what: str, driver: subprocess.Popen, said: Path, patience_s: float = 240):
    """What `found` gives, once it gives something."""
    deadline = time.monotonic() + patience_s
    while not (value := found()):
        assert driver.poll() is None and time.monotonic() < deadline, f"no {what}: {said.read_text()[-5000:]}"
        time.sleep(0.1)
    return value


def saved(folder: Path, workers: int, after: int) -> int:
    """The newest step beyond `after` whose checkpoint that many workers wrote, or 0."""
    for path in sorted(folder.glob("checkpoints/step-*/manifest.json"), reverse=True):
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError):  # removed meanwhile
            continue
        if manifest["world_size"] == workers and manifest["step"] > after:
            return manifest["step"]
    return 0


def start_ray(host: Host, env: dict[str, str], *options: str) -> None:
    """Ray's processes on a host with one CPU; they end with it."""
    fixed = (
        "--num-cpus=1",
        "--object-store-memory=100000000",
        "--disable-usage-stats",
        f"--node-ip-address={host.address}",
    )
    done = host.run(sys.executable, "-m", "ray.scripts.scripts", "start", *fixed, *options, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture
def config(tmp_path) -> tuple[Path, RunConfig]:
    """A configuration of one or two workers, its teacher's scores in place, and the same with two, trained."""
    file = tiny_config(tmp_path)
    values = yaml.safe_load(file.read_text())
    values["student"]["lora_dropout"] = 0.0
    values["train"] |= {"max_steps": STEPS, "learning_rate": 1e-3, "save_steps": 2, "eval_steps": STEPS}
    values["train"]["logging_steps"] = 1
    values["distributed"] = {"num_workers": [1, 2], "timeout_s": 60, "deepspeed": "ds_configs/zero3.json"}
    file.write_text(yaml.safe_dump(values))
    undisturbed = load_config(file, ["name=undisturbed", "distributed.num_workers=2"])
    fill_store(undisturbed)
    undisturbed.run_dir.joinpath("config.yaml").write_text(undisturbed.to_yaml())
    shutil.copytree(undisturbed.run_dir / "teacher", undisturbed.run_dir.parent / "tiny/teacher")
    load_config(file).run_dir.joinpath("config.yaml").write_text(load_config(file).to_yaml())
    return file, undisturbed


class Training:
    """`flipkd train` on two hosts of one CPU each, with slow steps; how long each part took."""

    def __init__(self, first: Host, second: Host, file: Path, folder: Path, short: str):
        self.first, self.second, self.folder, self.short = first, second, folder, short
        self.said, self.pace = file.parent / "said", file.parent / "pace"
        self.pace.write_text(SLOW_S)
        self.head = f"{first.address}:6379"
        self.env = {
            **{key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "SLOW_STEPS": str(self.pace),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",  # nobody else is on this network
            "FLIPKD_RESIZE_INTERVAL_S": "2",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
            # A host that is silent for so long is lost.
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "5",
        }
        self.marks = [("start", time.monotonic())]
        start_ray(first, self.env, "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={short}/1")
        self.join()
        command, env = [sys.executable, "-m", "slow_steps", "train", str(file)], {**self.env, "RAY_ADDRESS": self.head}
        with self.said.open("w") as out:
            self.driver = first.start(*command, env=env, stdout=out, stderr=out)
        self.mark("hosts are there")

    def mark(self, what: str) -> None:
        self.marks.append((what, time.monotonic()))

    def join(self) -> None:
        """The second host becomes a node of the cluster."""
        start_ray(self.second, self.env, f"--address={self.head}")

    def saved(self, workers: int, after: int) -> int:
        """The step beyond `after` of which that many workers have written a checkpoint."""
        what = f"checkpoint of {workers} workers"
        step = wait_for(lambda: saved(self.folder, workers, after), what, self.driver, self.said)
        self.mark(f"{what}, step {step}")
        return step

    def finish(self) -> str:
        """Let it run to its end; all that it said."""
        self.pace.write_text("0")
        assert self.driver.wait(timeout=240) == 0, self.said.read_text()[-5000:]
        self.mark("end")
        return self.said.read_text()


@contextmanager
def training(file: Path, folder: Path) -> Iterator[Training]:
    short = tempfile.mkdtemp(prefix="fk", dir="/tmp")  # Ray's sockets are named in it
    begun = None
    try:
        with hosts(2) as (first, second):
            begun = Training(first, second, file, folder, short)
            yield begun
    finally:
        shutil.rmtree(short, ignore_errors=True)
        if begun is not None:
            print(begun.said.read_text())
            for (_, before), (what, now) in pairwise(begun.marks):
                print(f"{now - before:6.1f} s: {what}")


def test_a_host_is_lost_and_returns(config):
    file, undisturbed = config
    run_gang(2, train, undisturbed)
    folder = undisturbed.run_dir.parent / "tiny"
    with training(file, folder) as run:
        two = run.saved(2, after=0)
        run.second.unplug()
        run.second.crash()
        one = run.saved(1, after=two)
        run.second.plug()
        run.join()
        run.mark("the second host is back")
        run.saved(2, after=one)
        words = run.finish()
    [asked] = set(re.findall(r"a checkpoint of step (\d+) is written, as asked", words))
    assert re.findall(r"resumed at step (\d+) of", words)[-1] == asked  # growing costs no step
    assert "resumed by 1 worker in place of 2: contrast batches of 8 pairs as before, in chunks of at most 4" in words
    assert "its node was lost" in words
    check(folder, undisturbed.run_dir)


@pytest.mark.soak
def test_a_node_is_announced_to_go(config):
    """As a spot machine's end is: its workers save before, and what follows counts as no failure."""
    file, undisturbed = config
    run_gang(2, train, undisturbed)
    folder = undisturbed.run_dir.parent / "tiny"
    with training(file, folder) as run:
        two = run.saved(2, after=0)
        nodes = [sys.executable, "-c", NODE_ID, run.second.address]
        found = run.first.run(*nodes, env={**run.env, "RAY_ADDRESS": run.head})
        node = found.stdout.split()[-1]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=20"]
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={run.head}"]
        done = run.first.run(*drain, f"--node-id={node}", *reason, env=run.env)
        assert done.returncode == 0, done.stdout + done.stderr
        run.mark("announced")
        last = run.saved(2, after=two)
        time.sleep(15)
        run.second.crash()
        run.mark("gone")
        run.saved(1, after=last)
        words = run.finish()
    assert "a node is to be taken away: a checkpoint is written before it goes" in words
    assert "(restart 1 of" not in words and "Traceback" not in words
    assert "its node was taken away" in words and "started again from step" in words
    check(folder, undisturbed.run_dir)


def check(folder: Path, undisturbed: Path) -> None:
    """The adapter and the log are those of two workers that nothing happened to."""
    from flipkd_dist.tracking import client

    found, wanted = (load_file(path / "adapter/adapter_model.safetensors") for path in (folder, undisturbed))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():  # the sums of other shares and chunks are rounded otherwise
        np.testing.assert_allclose(found[name].numpy(), value.numpy(), atol=1e-6, err_msg=name)
    logs = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder, undisturbed)
    ]
    ours, theirs = ([line for line in log if "loss" in line] for log in logs)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-4)
    mlflow = client(f"sqlite:///{folder / 'mlflow.db'}")
    [tracked] = mlflow.search_runs([experiment.experiment_id for experiment in mlflow.search_experiments()])
    assert tracked.info.status == "FINISHED"
    steps = [point.step for point in mlflow.get_metric_history(tracked.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, STEPS + 1))
