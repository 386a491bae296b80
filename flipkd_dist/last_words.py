"""What a failing process of a launcher says, and its exit code: the cause with rank and host, once on each host."""

import os
import re
import signal
import socket
import time
from pathlib import Path

from flipkd_dist.durable import storage_line, storage_reason
from flipkd_dist.errors import StoppedAtOnce, StoppedOnRequest, UserError
from flipkd_dist.failures import Failure, failures, first_cause, note, with_hosts

PATIENCE_S = 3.0  # a cause may be noted a little after its consequences
COURTESY_S = 1.0  # for the first process of a host to say what all of them have found
POLL_S = 0.1


def last_words(folder: Path, rank: int, size: int, error: BaseException) -> tuple[str | None, int]:
    """The line that this process says, or None where another one of its host does, and its exit code.

    Waits some seconds for the notes of others; signals of the launcher, which ends all once one has ended, are ignored.

    Args:
        folder: the run folder, which may not be there.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if isinstance(error, StoppedOnRequest | StoppedAtOnce):
        cause = first_cause(folder)  # the launcher ends the others where one has failed
        if cause is None or cause.rank == rank:
            return str(error) if first_here else None, 75
        return None, _code(cause)
    if (reason := storage_reason(error)) is not None and not isinstance(error, UserError):
        return storage_line(error, reason) + f" (rank {rank} on {socket.gethostname()})", 75
    own = next((one for one in failures(folder) if one.rank == rank), None) or note(folder, rank, error)
    if own.lost_peer:
        return _lost(folder, own, size)
    _wait(lambda: first_here or _said_by_another(folder, own), COURTESY_S)
    where = f" ({folder}/failures/rank-{rank:05d}.txt shows where)" if folder.is_dir() else ""
    line = own.error if own.user else f"{own}{where}"
    return None if not first_here and _said_by_another(folder, own) else line, _code(own)


def _code(failure: Failure) -> int:
    return 2 if failure.user else 1


def _lost(folder: Path, own: Failure, size: int) -> tuple[str | None, int]:
    """The words of a process that failed because another one did."""

    def cause() -> Failure | None:
        return next((one for one in failures(folder) if not one.lost_peer), None)

    def silent() -> list[int]:
        return sorted(set(range(size)) - {one.rank for one in failures(folder)})

    _wait(lambda: cause() is not None, PATIENCE_S)
    reason = re.sub(r"\[/\S+\] ?", "", own.error)[:150]  # without the place in gloo's source
    reason = reason.split(". This is")[0]
    again = "run the same command again to go on from the newest checkpoint"
    if (found := cause()) is not None:
        line = f"lost rank {found.rank} on {found.host}, which failed: {found.error}"
    elif missing := silent():
        line = (
            f"lost {with_hosts(folder, missing)}, which left no word: killed, hung, or its machine is gone "
            f"({reason}): {again}"
        )
    else:
        line = f"lost its peers, and none of them knows why ({reason}): look at the network, then {again}"
    here = [one.rank for one in failures(folder) if one.host == own.host and one.lost_peer]
    spoken = own.rank == min([own.rank, *here]) and (found is None or found.host != own.host)  # it speaks itself
    return f"rank {own.rank} on {own.host}: {line}" if spoken else None, 1 if found is None else _code(found)


def _said_by_another(folder: Path, own: Failure) -> bool:
    here = socket.gethostname()
    return any(one.rank < own.rank and one.host == here and one.error == own.error for one in failures(folder))


def _wait(condition, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(POLL_S)
