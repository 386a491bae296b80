"""What tests of launching share: one small configuration, a Ray head with a job server, a comparison of adapters."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import yaml
from safetensors.torch import load_file
from test_run import tiny_config

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
TOKEN = secrets.token_hex(32)  # of the clusters of this test session; a token in the home folder is not touched
TOLERANCE = 1e-6  # of every weight, after AdamW's steps


def door_config(folder: Path) -> Path:
    """A training of two workers that every door can start; its runs have one teacher's store."""
    file = tiny_config(folder)
    values = yaml.safe_load(file.read_text())
    values["data"] = {key: values["data"][key] for key in ("train", "max_length")}
    values["teacher"]["store_path"] = str(folder / "store")
    values["train"] |= {"max_steps": 4, "save_steps": 1, "eval_steps": None, "logging_steps": 1}
    values["distributed"]["timeout_s"] = 120
    file.write_text(yaml.safe_dump(values))
    return file


def environment(**changes: str) -> dict[str, str]:
    """That of a user whose programs are those of this Python and whose package is this one."""
    ours = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**ours, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **changes}


def opened(command: Sequence[object], timeout_s: float = 500, **changes: str) -> subprocess.CompletedProcess:
    """A command that has to end well; one that takes too long ends with all that it started."""
    begun, words = time.monotonic(), list(map(str, command))
    process = subprocess.Popen(
        words, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = process.communicate(timeout=timeout_s)
    finally:
        end(process)
    done = subprocess.CompletedProcess(words, process.returncode, *said)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    print(f"{Path(words[0]).name} {time.monotonic() - begun:.0f} s")
    return done


def same_adapter(run: Path, other: Path) -> float:
    """The largest difference of a weight between the adapters of two run folders, which must be next to none."""
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, other))
    assert first.keys() == second.keys()
    learnt = [weight for name, weight in first.items() if "lora_B" in name]
    assert learnt and all(weight.abs().max() > 100 * TOLERANCE for weight in learnt)
    difference = max(float((weight - second[name]).abs().max()) for name, weight in first.items())
    assert difference <= TOLERANCE, f"{other}: the adapter differs from that of {run} by {difference:.2g}"
    print(f"{other.name}: {difference:.2g} from {run.name}")
    return difference


def free_ports(count: int) -> list[int]:
    """Different ones of this host, free a moment ago."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def ray_head(num_cpus: int = 2) -> Iterator[tuple[str, str]]:
    """A Ray cluster of one node: the addresses of its head and of its job server."""
    folder = tempfile.mkdtemp(prefix="fk", dir="/tmp")  # Ray's sockets need short paths
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
         "--disable-usage-stats", f"--num-cpus={num_cpus}", f"--temp-dir={folder}",
         *(f"--{name}={port}" for name, port in ports.items())],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        jobs = f"http://127.0.0.1:{ports['dashboard-port']}"
        _wait_for_jobs(jobs, head)
        yield f"127.0.0.1:{ports['port']}", jobs
    finally:
        end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_jobs(address: str, head: subprocess.Popen, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        assert head.poll() is None and time.monotonic() < deadline, "the Ray head has not started"
        try:
            urlopen(f"{address}/api/version", timeout=5).close()
            return
        except HTTPError:  # it asks for the token that Ray's own programs know
            return
        except OSError:
            time.sleep(0.3)


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that descends from it."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=10)
