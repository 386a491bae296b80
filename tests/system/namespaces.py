"""Hosts that are network namespaces of this machine, on a switch of their own, with names, addresses and cables.

They share the machine's files, as hosts with a common file system do, and nothing of its network: a port that is free
in one is free whatever runs elsewhere.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

INTERFACE = "eth0"
_SERIAL = count()  # several sets of hosts in one process


@dataclass(frozen=True)
class Host:
    namespace: str
    name: str  # what `hostname` says there; every host of the set resolves it
    address: str

    @property
    def environment(self) -> dict[str, str]:
        """What collectives need to leave the loopback interface."""
        return {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}

    def command(self, *command: object) -> list[str]:
        """`command` as it is started here from outside; its process id is the one of the process that is started."""
        renamed = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.namespace, *renamed, *map(str, command)]

    def start(self, *command: object, env: Mapping[str, str] = os.environ, **options) -> subprocess.Popen:
        """A process on this host; `options` of `subprocess.Popen`."""
        return subprocess.Popen(self.command(*command), env={**env, **self.environment}, **options)

    def run(self, *command: object, env: Mapping[str, str] = os.environ, **options) -> subprocess.CompletedProcess:
        """A process on this host, and its end; `options` of `subprocess.run`."""
        options = {"capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run(self.command(*command), env={**env, **self.environment}, **options)

    def pids(self) -> list[int]:
        """Every process on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def crash(self, timeout_s: float = 20) -> None:
        """End every process on this host at once, as a loss of power does; the files stay."""
        deadline = time.monotonic() + timeout_s
        while pids := self.pids():  # one that was being started is met the next time
            for pid in pids:
                _kill(pid)
            assert time.monotonic() < deadline, f"{self.name}: still there: {pids}"
            time.sleep(0.05)

    def unplug(self) -> None:
        """Take the cable out: packets are lost without a word; the processes go on."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def plug(self) -> None:
        _ip("-n", self.namespace, "link", "set", INTERFACE, "up")


@contextmanager
def hosts(number: int = 2) -> Iterator[list[Host]]:
    """`number` hosts called node1, node2, ...; in the end their processes are killed and they are removed.

    Skips the test where the machine cannot make them.
    """
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: tests/system/install.sh, as root")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root (and tests/system/install.sh)")
    prefix = f"fk{os.getpid()}-{next(_SERIAL)}"
    made = [Host(f"{prefix}-{place}", f"node{place}", f"10.77.0.{place}") for place in range(1, number + 1)]
    try:
        try:
            _build(f"{prefix}-switch", made)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made: {' '.join(error.stderr.split())}")
        yield made
    finally:
        _remove(f"{prefix}-switch", made)


def _build(switch: str, made: Sequence[Host]) -> None:
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "switch", "type", "bridge")
    _ip("-n", switch, "link", "set", "switch", "up")
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made)
    for place, host in enumerate(made, start=1):
        _ip("netns", "add", host.namespace)
        port = f"port{place}"
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
        _ip("-n", switch, "link", "set", port, "master", "switch", "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
        own = _files(host)
        own.mkdir(parents=True)
        (own / "hosts").write_text(names)


def _remove(switch: str, made: Sequence[Host]) -> None:
    there = {line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()}
    for host in made:
        if host.namespace in there:
            host.crash()
            _ip("netns", "delete", host.namespace)
        shutil.rmtree(_files(host), ignore_errors=True)
    if switch in there:
        _ip("netns", "delete", switch)


def _files(host: Host) -> Path:
    """Where `ip netns exec` looks for what stands in for files of /etc."""
    return Path("/etc/netns") / host.namespace


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
