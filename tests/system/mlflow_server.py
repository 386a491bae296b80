"""A real `mlflow server` on a real PostgreSQL, on loopback, in folders and on ports of its own; ended by process id."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

OWNER = "postgres"  # the database refuses to run as root


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def program(name: str) -> Path:
    found = shutil.which(name) or max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), default=None)
    if found is None:
        pytest.skip(f"{name} is not installed: tests/system/install.sh, as root")
    return Path(found).resolve()


class Postgres:
    def __init__(self, folder: Path):
        self.folder, self.port, self.process = folder, free_port(), None
        self.user = {"user": OWNER, "group": OWNER} if os.getuid() == 0 else {}
        if self.user:
            shutil.chown(folder, OWNER, OWNER)
        command = [program("initdb"), "-D", folder / "data", "-U", "mlflow", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*command, "--locale=C"], check=True, stdout=subprocess.DEVNULL, cwd=folder, **self.user)

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", self.folder, "-c", "fsync=off"]
        with (self.folder / "log").open("ab") as log:
            command = [program("postgres"), "-D", self.folder / "data", *options]
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, **self.user)
        wait_for(lambda: reachable(self.port), self.process, self.folder / "log")

    def stop(self) -> None:
        """At once, with its sessions; the next start recovers."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(60)


class MlflowServer:
    def __init__(self, database: Postgres, folder: Path):
        self.database, self.folder, self.port, self.process = database, folder, free_port(), None
        self.uri, self.artifacts = f"http://127.0.0.1:{self.port}", folder / "artifacts"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.port, "--workers", 1]
        command += ["--backend-store-uri", self.database.uri, "--artifacts-destination", self.artifacts]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*map(str, command), "--serve-artifacts"],
                env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: answers(f"{self.uri}/health"), self.process, self.folder / "log")

    def kill(self) -> None:
        """The server and its worker, which are a process group of their own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


def reachable(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=2):
        return True
    return False


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


@contextmanager
def mlflow_server():
    """A running server; skips where PostgreSQL is not installed."""
    program("initdb")
    with ExitStack() as ends:  # each is called, whatever another one raises
        folder = Path(tempfile.mkdtemp(prefix="fk", dir="/tmp"))  # short, for the socket
        ends.callback(shutil.rmtree, folder)
        folder.chmod(0o755)
        for name in ("database", "server"):
            (folder / name).mkdir()
        database = Postgres(folder / "database")
        ends.callback(_end, database.stop)
        database.start()
        server = MlflowServer(database, folder / "server")
        ends.callback(_end, server.kill)
        server.start()
        yield server


def _end(stop: Callable[[], None]) -> None:
    with suppress(AttributeError, ProcessLookupError):  # never started, or ended by its test
        stop()
