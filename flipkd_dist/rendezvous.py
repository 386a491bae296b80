"""Processes find each other at MASTER_ADDR:MASTER_PORT and try their connections: a mistake is a line, not a hang.

Every rank leaves its host and its addresses in the store; rank 0 says who did not come. Then each rank tries the next
one's addresses, so that every host is tried from another one; rank 0 says who could not be reached.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from flipkd_dist.errors import UserError
from flipkd_dist.interfaces import VARIABLES, AddressError, interfaces, own_addresses, shown

logger = logging.getLogger("flipkd_dist")
RESOLVE_S = 10.0  # a name may appear a little after its machine
CONNECT_S = 5.0  # to try one address; well below any timeout_s that is of use
FAREWELL_S = 3.0  # how long rank 0 keeps the store open so that all can read the verdict
_served: list[dist.Store] = []  # by `serve`: a store that nobody holds ends


def master() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: the launcher has not set them, or the port is none.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        name = "MASTER_PORT" if host else "MASTER_ADDR"
        raise UserError(f"{name}: not set by the launcher: export MASTER_ADDR and MASTER_PORT of the first host")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT: {port} is no port: take a free one from 1024 to 65535")
    return host, int(port)


def serve() -> int:
    """Serve a store at a free port, which is this process's until its end; `open_store` of rank 0 will find it."""
    _served.append(dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True))
    return _served[-1].port


def meet(backend: str, timeout_s: float) -> dist.Store:
    """A store that all ranks have reached, for `init_process_group`; their addresses have been tried.

    Args:
        backend: gloo or nccl: each has its own way to choose a network interface.
    Raises:
        UserError: on every rank that came, within `timeout_s` and a few seconds.
    """
    start = time.monotonic()
    rank, size, (host, port) = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), master()
    store = open_store(host, port, rank, start + timeout_s)
    # torchrun may keep its store through restarts; a node that joins it is none that counts, and changes the size.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"flipkd/{attempt}/{size}", store)
    Meeting(store, rank, size, f"{host}:{port}", start, timeout_s).hold(backend)
    store.set_timeout(timedelta(seconds=timeout_s))
    return dist.PrefixStore("group", store)


def open_store(host: str, port: int, rank: int, deadline: float) -> dist.Store:
    """The store that rank 0 serves at `host:port`, or torchrun does."""
    here, served_elsewhere = socket.gethostname(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not served_elsewhere
    _resolve(host, port, deadline)
    if not serves:
        _await_listener(host, port, deadline)
    left_s = max(deadline - time.monotonic(), 1.0)
    found: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            timeout = timedelta(seconds=left_s)
            found.append(dist.TCPStore(host, port, None, serves, timeout, wait_for_workers=False, multi_tenant=True))
        except dist.DistError as error:
            found.append(error)

    thread = threading.Thread(target=connect, daemon=True)  # torch waits for ever where a stranger says nothing
    thread.start()
    thread.join(left_s)
    if found and isinstance(found[0], dist.Store):
        return found[0]
    if "EADDRINUSE" in str(found):
        line = f"MASTER_PORT: {port} is taken on {here}, the host of rank 0 ({host}:{port}): choose another"
    elif serves:
        line = (
            f"MASTER_ADDR: rank 0 listens on {here}, and {host}:{port} does not lead there: set MASTER_ADDR to an "
            "address of rank 0's host, and open MASTER_PORT"
        )
    else:
        line = f"MASTER_PORT: what listens at {host}:{port} is not rank 0 of this run: choose another"
    raise UserError(line)


def _resolve(host: str, port: int, deadline: float) -> None:
    until = min(deadline, time.monotonic() + RESOLVE_S)
    while True:
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until:
                raise UserError(
                    f"MASTER_ADDR: {host}:{port}: the name is not known on {socket.gethostname()} ({_reason(error)}): "
                    "set it to an address of rank 0's host"
                ) from None
            time.sleep(0.5)


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Wait until somebody listens; while torch waits it prints what the user need not see."""
    start = time.monotonic()
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(min(CONNECT_S, left), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                raise UserError(
                    f"MASTER_ADDR: {host}:{port} cannot be reached from {socket.gethostname()} within "
                    f"{time.monotonic() - start:.0f} s ({_reason(error)}): is rank 0 running there, and is MASTER_PORT "
                    "open to this host?"
                ) from None
            time.sleep(0.2)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).lower()


class Meeting:
    """One exchange over the store: all have come, and neighbours reach each other."""

    def __init__(self, store: dist.Store, rank: int, size: int, place: str, start: float, timeout_s: float):
        """`start` is when this rank began, by its monotonic clock."""
        self.store, self.rank, self.size, self.place = store, rank, size, place
        self.deadline, self.timeout_s = start + timeout_s, timeout_s

    def hold(self, backend: str) -> None:
        """
        Raises:
            UserError
        """
        own: dict[str, Any] = {"host": socket.gethostname(), "interfaces": shown(interfaces()), "error": None}
        listeners: list[_Listener] = []
        try:
            try:
                for address in own_addresses(backend):
                    listeners.append(_Listener(address, self._token(self.rank)))
            except AddressError as error:
                own["error"] = str(error)
            except OSError as error:
                own["error"] = f"{VARIABLES[backend]}: cannot listen at {address} ({_reason(error)}): take another"
            own["addresses"] = [listener.address for listener in listeners]
            self._put("came", own)
            self._agree("came", self._came)
            self._put("reached", self._try_next(own["host"], VARIABLES[backend]))
            sure = backend == "gloo" or bool(os.environ.get(VARIABLES[backend]))
            self._agree("reached", lambda: self._reached(sure))
        finally:
            for listener in listeners:
                listener.close()

    def _came(self) -> str | None:
        """What rank 0 finds: who is missing, or what one of them has found wrong by itself."""
        present, missing = self._wait_for("came")
        if missing:
            return (
                f"{ranks(missing)} did not come within {self.timeout_s:g} s to {self.place}: do all {self.size} "
                "processes run, and is MASTER_PORT open to their hosts?"
            )
        for rank, value in present.items():
            if value["error"]:
                return f"rank {rank} on {value['host']}: {value['error']}"
        return None

    def _reached(self, sure: bool) -> str | None:
        """What rank 0 finds: a rank that another one did not reach; only a warning where the interface is our guess."""
        present, missing = self._wait_for("reached")
        if missing:
            return f"{ranks(missing)} went away during the rendezvous at {self.place}: look at what they say"
        found = next((value for value in present.values() if value), None)
        if found and not sure:
            logger.warning("warning: %s", found)
            return None
        return found

    def _try_next(self, here: str, variable: str) -> str | None:
        """The complaint about the next rank's first address that does not lead there, if one does not."""
        other = (self.rank + 1) % self.size
        there = json.loads(self.store.get(f"came/{other}"))
        for host, port in there["addresses"]:
            try:
                with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
                    connection.settimeout(CONNECT_S)
                    if connection.recv(64) == self._token(other):
                        continue
                reason = "something else answers"
            except OSError as error:
                reason = _reason(error)
            return (
                f"rank {self.rank} on {here} cannot reach rank {other} on {there['host']} at {host}:{port} "
                f"({reason}): set {variable} to the interface that the hosts share, and open its ports "
                f"({there['host']} has {there['interfaces']})"
            )
        return None

    def _token(self, rank: int) -> bytes:
        return f"flipkd rank {rank} of {self.size}".encode()

    def _put(self, key: str, value: Any) -> None:
        self.store.set(f"{key}/{self.rank}", json.dumps(value))

    def _wait_for(self, key: str) -> tuple[dict[int, Any], list[int]]:
        """(value by rank, missing ranks) when all are there or the time is up."""
        names = [f"{key}/{rank}" for rank in range(self.size)]
        left = max(self.deadline - time.monotonic(), 2 * CONNECT_S if key == "reached" else 0.1)
        try:
            self.store.wait(names, timedelta(seconds=left))
        except dist.DistError:
            missing = [rank for rank, name in enumerate(names) if not self.store.check([name])]
            if missing:
                return {}, missing
        return {rank: json.loads(value) for rank, value in enumerate(self.store.multi_get(names))}, []

    def _agree(self, key: str, find: Callable[[], str | None]) -> None:
        """Rank 0 finds whether something is wrong, and every rank raises it."""
        if self.rank == 0:
            verdict = find()
            self.store.set(f"{key}/verdict", json.dumps(verdict))
            if verdict:
                self._see_off(key)
        else:
            left = max(self.deadline - time.monotonic(), 0) + 4 * CONNECT_S
            try:
                self.store.wait([f"{key}/verdict"], timedelta(seconds=left))
                verdict = json.loads(self.store.get(f"{key}/verdict"))
                self.store.add(f"{key}/read", 1)
            except dist.DistError as error:
                raise UserError(
                    f"{self.place}: rank 0 went away during the rendezvous: look at what it says"
                ) from error
        if verdict:
            raise UserError(verdict)

    def _see_off(self, key: str) -> None:
        """The store ends with rank 0: let those who came read the verdict first."""
        came = sum(self.store.check([f"{key}/{rank}"]) for rank in range(1, self.size))
        until = time.monotonic() + FAREWELL_S
        while self.store.add(f"{key}/read", 0) < came and time.monotonic() < until:
            time.sleep(0.05)


class _Listener:
    """Says its token to whoever connects."""

    def __init__(self, host: str, token: bytes):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.token, self.socket = token, socket.create_server((host, 0), family=family, backlog=16)
        self.address, self.closed = [host, self.socket.getsockname()[1]], False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                with closing(self.socket.accept()[0]) as connection:
                    connection.sendall(self.token)
            except OSError:
                if self.closed:
                    return

    def close(self) -> None:
        self.closed = True
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.socket.close()


def ranks(numbers: list[int]) -> str:
    """`rank 3`, `ranks 1, 3`, and of many the first ones."""
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}{more}"
