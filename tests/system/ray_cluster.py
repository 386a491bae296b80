"""A Ray head of a test's own, on ports and in folders that nobody else uses."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

START_S = 120
# `ray start` takes ~/.ray/auth_token where there is one, and who joins by an address does not.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_gcs_rpc_server_reconnect_timeout_s": "16", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Head:
    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(folder), "RAY_ADDRESS": self.address}

    def start(self) -> None:
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        ports = [f"--port={self.port}", f"--ray-client-server-port={free_port()}"]
        options = ["--num-cpus=2", "--include-dashboard=false", f"--temp-dir={self.folder}", "--disable-usage-stats"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", *ports, *options]
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=START_S)

    def family(self, name: str = "") -> list[psutil.Process]:
        """Its processes: those that name its folder, and their children."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and any(str(self.folder) in part for part in process.cmdline()):
                    found |= {one.pid: one for one in [process, *process.children(recursive=True)]}
            except psutil.Error:
                continue
        return [process for process in found.values() if name in _title(process)]

    def end(self) -> None:
        family = self.family()
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(family, timeout=20)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


@contextmanager
def head() -> Iterator[Head]:
    """A head with two CPUs; all of its processes end with the context."""
    one = Head(Path(tempfile.mkdtemp(prefix="fk", dir="/tmp")))  # a short path: it holds sockets
    try:
        one.start()
        yield one
    finally:
        one.end()
        shutil.rmtree(one.folder, ignore_errors=True)


def wait_until(true, what: str, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
