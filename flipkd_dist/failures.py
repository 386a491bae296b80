"""What each process of a run noted when it failed, and which of the notes is the cause of the others.

A lost process makes its peers fail in their next collective: their errors are consequences, and are noted as such.
"""

import os
import re
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from flipkd_dist.config import without_credentials
from flipkd_dist.errors import PeerFailed, StoppedOnRequest, UserError
from flipkd_dist.run_folder import read_json, write_json, write_whole

HOSTS = "hosts.json"  # the host of each rank of the attempt that runs
LONGEST = 500  # characters of an error in a line
# Of gloo, NCCL and the store. Both raise plain RuntimeErrors, of which only the text tells.
PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted|abort)|broken pipe|timed? ?out|timeout|failed to recv|"
    r"ncclRemoteError|remote process exited|gloo/transport",
    re.IGNORECASE,
)
OWN_FAULT = re.compile(r"out of memory|cuda error|invalid (usage|argument)", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    rank: int
    host: str
    time: float  # seconds since 1970, by that host's clock
    error: str  # one line
    final: bool  # a restart would meet it again
    lost_peer: bool  # a consequence of another process's end
    user: bool = False  # the user's mistake: the line says what to do

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.error}"


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error is that of a collective whose peer went away or did not come in time, or quotes a peer's."""
    if isinstance(error, PeerFailed):
        return True
    if not isinstance(error, dist.DistError) and type(error) is not RuntimeError:
        return error.__cause__ is not None and is_lost_peer(error.__cause__)
    return bool(PEER_GONE.search(str(error))) and not OWN_FAULT.search(str(error))


def is_final(error: BaseException) -> bool:
    """Whether a restart would meet the error again; machines, disks and networks may do better the next time."""
    if isinstance(error, torch.OutOfMemoryError | PeerFailed):
        return True
    return not (isinstance(error, OSError | torch.AcceleratorError) or is_lost_peer(error))


def one_line(error: BaseException) -> str:
    """The error in a line without credentials: a user's mistake as it is said, else with its kind."""
    text = without_credentials(" ".join(str(error).split()))[:LONGEST]
    return text if isinstance(error, UserError | PeerFailed) else f"{type(error).__name__}: {text}"


def note(folder: Path, rank: int, error: BaseException) -> Failure:
    """Write `folder/failures/rank-00001.json`, and the traceback beside it; nothing is raised where that fails.

    Args:
        folder: the run folder; one that is not there is not made.
    """
    failure = failure_of(rank, error)
    record(folder, failure, "".join(traceback.format_exception(error)))
    return failure


def failure_of(rank: int, error: BaseException) -> Failure:
    """What there is to say of an error that ends the work of this process now."""
    user = isinstance(error, UserError)
    return Failure(rank, socket.gethostname(), time.time(), one_line(error), is_final(error), is_lost_peer(error), user)


def record(folder: Path, failure: Failure, details: str = "") -> None:
    """Write a note, and the details beside it; nothing is raised where that fails."""
    file = _notes(folder) / f"rank-{failure.rank:05d}.json"
    with suppress(OSError):  # a full disk must not hide the error
        file.parent.mkdir(exist_ok=True)
        write_json(file, asdict(failure))
        if details:
            write_whole(file.with_suffix(".txt"), without_credentials(details))


@contextmanager
def noting(folder: Path, rank: int, size: int | None = None) -> Iterator[None]:
    """Note the error that ends a process's work; a polite end is none. Its note of an earlier attempt goes first.

    Args:
        size: the number of processes, if known: rank 0 removes the notes of ranks that are no more.
    """
    for file in _notes(folder).glob("rank-*"):
        noted = int(file.stem.removeprefix("rank-"))
        if noted == rank or (rank == 0 and size is not None and noted >= size):
            file.unlink(missing_ok=True)
    try:
        yield
    except StoppedOnRequest:
        raise
    except Exception as error:
        note(folder, rank, error)
        raise


def introduce(folder: Path, hosts: list[str]) -> None:
    """Write the host of every rank, so that one which is lost without a word can be named with it; rank 0 calls it."""
    with suppress(OSError):
        _notes(folder).mkdir(exist_ok=True)
        write_json(_notes(folder) / HOSTS, hosts)


def with_hosts(folder: Path, ranks: list[int]) -> str:
    """`rank 1 on node7, rank 3 on node8`, and of many the first ones."""
    hosts = read_json(_notes(folder) / HOSTS) or []
    named = [f"rank {rank} on {hosts[rank]}" if rank < len(hosts) else f"rank {rank}" for rank in ranks[:8]]
    return ", ".join(named) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def failures(folder: Path) -> list[Failure]:
    """All notes of a run folder, oldest first; what cannot be read is passed over."""
    found = []
    for file in _notes(folder).glob("rank-*.json"):
        with suppress(TypeError):  # broken, or of another version
            found.append(Failure(**read_json(file)))
    return sorted(found, key=lambda failure: (failure.time, failure.rank))


def first_cause(folder: Path) -> Failure | None:
    """The oldest note that is no consequence of another, else the oldest; None where nobody noted anything."""
    found = failures(folder)
    return next((failure for failure in found if not failure.lost_peer), found[0] if found else None)


def forget(folder: Path) -> None:
    """Remove the notes of an earlier attempt; one process calls it, before the others begin."""
    for file in (*_notes(folder).glob("rank-*"), _notes(folder) / HOSTS):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's file is in it, or it is not there
        os.rmdir(_notes(folder))


def _notes(folder: Path) -> Path:
    return folder / "failures"
