"""Ray's head: whether it answers at all, and the end of a process whose head has gone.

Left alone, a process of a cluster without head waits for a minute and is then torn down with a page of C++. Imports ray
inside its functions.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from flipkd_dist.errors import HeadLost, UserError

EVERY_S = 2.0  # between two looks at the head
ANSWER_S = 3.0  # for a connection
LOST: list[str] = []  # the line, once the head of this process is lost
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"  # how long Ray's own processes wait for a head that has gone
RAYS_OWN_S = 60.0  # its default


def place(address: str) -> tuple[str, int] | None:
    """Host and port of RAY_ADDRESS; None where it names no place (`auto`)."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\]]+?)\]?:(\d+)", address)
    return (found[1], int(found[2])) if found else None


def answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S):
            return True
    except OSError:
        return False


def check_head(address: str) -> None:
    """Refuse in seconds an address at which nothing listens; Ray itself tries for a minute.

    Raises:
        UserError: names host, port and what to do.
    """
    found = place(address)
    if found and not answers(*found):
        raise UserError(
            f"RAY_ADDRESS: nothing answers at {found[0]}:{found[1]}: start the head there (`ray start --head "
            f"--port={found[1]}`), open the port, or unset RAY_ADDRESS to train on this machine"
        )


def refusal(address: str, error: Exception) -> UserError | None:
    """What the user can do about an error of joining the cluster; None where it is no mistake of theirs."""
    if address == "local":  # nothing was joined
        return None
    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        return UserError(f"RAY_ADDRESS: {text[:300]}: install the versions of the cluster at {address} here")
    if isinstance(error, ConnectionError | ValueError):
        return UserError(
            f"RAY_ADDRESS: no Ray head that lets us in at {address} ({text[:200]}): check the port, and that "
            "RAY_AUTH_MODE and the token are the head's (`ray start` takes ~/.ray/auth_token where there is one)"
        )
    return None


def patience_s() -> float:
    """How long a head may be gone: half of what Ray waits, so that the end is ours."""
    return float(os.environ.get(RECONNECT, RAYS_OWN_S)) / 2


def gone(host: str, port: int) -> str:
    return f"Ray's head at {host}:{port} is gone: start it, and run the same command again to go on"


def head_lost() -> HeadLost | None:
    """Why an error of Ray's or an interruption came, if the head is gone; asked after it."""
    if LOST:
        return HeadLost(LOST[0])
    import ray

    where = place(ray.get_runtime_context().gcs_address)
    return None if answers(*where) else HeadLost(gone(*where))


class HeadWatch(threading.Thread):
    """Looks whether the head answers, and calls `lost` once it has been gone for too long."""

    def __init__(self, host: str, port: int, lost: Callable[[str], None], every_s: float = EVERY_S):
        super().__init__(name="head-watch", daemon=True)
        self.host, self.port, self.lost, self.every_s, self.patience_s = host, port, lost, every_s, patience_s()

    def run(self) -> None:
        seen = time.monotonic()
        while time.monotonic() - seen < self.patience_s:
            time.sleep(self.every_s)
            if answers(self.host, self.port):
                seen = time.monotonic()
        self.lost(gone(self.host, self.port))


def end_with_head(address: str) -> None:
    """From now on the end of the head interrupts this process, which drives a run, as Ctrl-C does; see `head_lost`."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt  # the one exception of a handler that gets out of a call of Ray's

    def lost(line: str) -> None:
        LOST.append(line)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
        time.sleep(patience_s() / 2)  # to tell MLflow and to end
        print("flipkd:", line, file=sys.stderr, flush=True)
        os._exit(75)

    signal.signal(signal.SIGUSR2, interrupt)
    HeadWatch(*place(address), lost).start()


def die_with_head() -> None:
    """The same for a worker, of which nobody waits for a word: it must not train beside the run that goes on."""
    import ray

    HeadWatch(*place(ray.get_runtime_context().gcs_address), lambda _line: os._exit(1)).start()
