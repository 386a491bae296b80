"""A process of a launcher that is killed, stands still or fails: the others end in time and name it."""

import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gang import run_gang
from ray_cluster import free_port
from test_resume_parity import prepared, run_config  # noqa: F401, a fixture
from tqdm import tqdm

from flipkd_dist.config import RunConfig, validate
from flipkd_dist.step import TrainingStep
from flipkd_dist.workbench import build

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "deepspeed_train.py"
TIMEOUT_S = 15
MARGIN_S = 60  # of a loaded machine
PATIENT_S = 5 * MARGIN_S  # a timeout_s that plays no part


def _launched(rank: int, size: int, config: str, environment: dict, errors: str, sabotage) -> None:
    """What a launcher starts, in a fork."""
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(torch.get_num_threads())
    sys.stderr = open(errors, "w")  # noqa: SIM115, until the end
    os.dup2(sys.stderr.fileno(), 2)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    sys.argv = [str(SCRIPT), config]
    if sabotage is not None:
        sabotage(rank)
    code = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        code = end.code
    sys.stderr.flush()
    os._exit(code or 0)


class Launched:
    """Processes that train, as a launcher would start them, each with its stderr in a file."""

    def __init__(self, config: RunConfig, size: int, sabotage=None):
        self.folder, context = config.run_dir, multiprocessing.get_context("fork")
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        file = str(self.folder / "config.yaml")
        self.members = [
            context.Process(
                target=_launched, args=(rank, size, file, environment, str(self.errors(rank)), sabotage), daemon=True
            )
            for rank in range(size)
        ]
        for member in self.members:
            member.start()

    def errors(self, rank: int) -> Path:
        return self.folder / f"stderr-{rank}"

    def last_line(self, rank: int) -> str:
        text = self.errors(rank).read_text()
        assert "Traceback" not in text
        return text.splitlines()[-1]

    def wait_for_step(self, step: int) -> None:
        file, until = self.folder / "metrics.jsonl", time.monotonic() + 120
        while not (file.exists() and f'"step": {step},' in file.read_text()):
            alive = time.monotonic() < until and all(member.is_alive() for member in self.members)
            assert alive, [self.errors(rank).read_text() for rank in range(len(self.members))]
            time.sleep(0.01)

    def code(self, rank: int, within_s: float) -> int:
        self.members[rank].join(within_s)
        assert not self.members[rank].is_alive(), "it hangs"
        return self.members[rank].exitcode

    def end(self) -> None:
        for member in self.members:
            member.kill()
            member.join(5)


@pytest.fixture
def launch(prepared, request):  # noqa: F811
    started = []

    def start(size: int = 2, sabotage=None, timeout_s: float = TIMEOUT_S) -> Launched:
        config = run_config(prepared, re.sub(r"\W", "-", request.node.name), size)
        values = config.model_dump()
        values["train"] |= {"max_steps": 2000, "save_steps": 1000, "eval_steps": 1000, "logging_steps": 1}
        values["distributed"]["timeout_s"] = timeout_s
        values["tracking"]["mlflow_tracking_uri"] = f"sqlite:///{prepared.output_dir}/mlflow.db"  # made once
        config = validate(values, "test")
        (config.run_dir / "config.yaml").write_text(config.to_yaml())
        started.append(Launched(config, size, sabotage))
        return started[-1]

    yield start
    for launched in started:
        launched.end()


def test_a_killed_process_is_named_at_once(launch):
    """Rank 0, which holds the store as well."""
    launched = launch(timeout_s=PATIENT_S)
    launched.wait_for_step(2)
    start = time.monotonic()
    os.kill(launched.members[0].pid, signal.SIGKILL)
    assert launched.code(1, MARGIN_S) == 1
    print(f"killed rank 0: ended after {time.monotonic() - start:.1f} s:", launched.last_line(1))
    host = os.uname().nodename
    assert launched.last_line(1).startswith(
        f"flipkd: rank 1 on {host}: lost rank 0 on {host}, which left no word: killed, hung, or its machine is gone "
    )
    assert "run the same command again" in launched.last_line(1)


def test_a_process_that_stands_still_ends_the_others_after_timeout_s(launch):
    launched = launch()
    launched.wait_for_step(2)
    start = time.monotonic()
    os.kill(launched.members[1].pid, signal.SIGSTOP)
    assert launched.code(0, TIMEOUT_S + MARGIN_S) == 1
    print(f"stopped rank 1: ended after {time.monotonic() - start:.1f} s:", launched.last_line(0))
    assert "lost rank 1 on" in launched.last_line(0) and "left no word" in launched.last_line(0)


def _timeouts(config: RunConfig) -> tuple[set[float], int]:
    build(config)
    groups = dist.distributed_c10d._world.pg_map
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}, len(groups)


def test_no_group_waits_longer_than_timeout_s(prepared):  # noqa: F811
    """DeepSpeed makes groups of its own."""
    for timeouts, number in run_gang(2, _timeouts, run_config(prepared, "timeouts", 2)):
        assert number > 1 and timeouts == {60.0}


def _fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        TrainingStep.prepare = lambda *_: 1 / 0  # in this fork alone


def test_the_one_that_fails_is_the_cause_and_is_said_once(launch):
    launched = launch(sabotage=_fail_on_rank_1)
    assert [launched.code(rank, 120) for rank in (0, 1)] == [1, 1]
    host = os.uname().nodename
    cause = f"rank 1 on {host}: ZeroDivisionError: division by zero"
    assert launched.last_line(1).startswith(f"flipkd: {cause}")
    assert "flipkd: " not in launched.errors(0).read_text()  # said once on a host
    assert "1 / 0" in (launched.folder / "failures" / "rank-00001.txt").read_text()
