"""What one rank's disk refuses, all ranks learn: they stop alike, and none waits for another."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flipkd_dist.durable import is_full, storage_reason
from flipkd_dist.errors import PeerFailed, UserError
from flipkd_dist.failures import one_line
from flipkd_dist.world import World

Result = TypeVar("Result")
QUOTED_AFTER_S = 1.0  # so that the rank that failed is the first to say so


class StorageFailed(Exception):
    """A disk is full or broken; the message is one line without a remedy."""

    def __init__(self, what: str, is_full: bool):
        super().__init__(what)
        self.is_full = is_full


@dataclass(frozen=True)
class Refusal:
    """How a rank's work failed."""

    line: str
    is_storage: bool
    is_full: bool
    is_user: bool = False


def together(world: World, where: Path, work: Callable[[], Result]) -> list[Result]:
    """Every rank works, and learns what each rank's work gave; where one fails, all raise. Every rank must call it.

    Args:
        where: what is being written, for the line.
    Raises:
        StorageFailed: on every rank, where a rank's disk has refused.
        UserError, RuntimeError: the rank's own error there, and on the others one that quotes it.
    """
    own, result, refusal = None, None, None
    try:
        result = work()
    except Exception as error:
        own, reason = error, storage_reason(error)
        line = one_line(error) if reason is None else f"{reason}: {where}"
        where_from = f"rank {world.rank} on {socket.gethostname()}"
        refusal = Refusal(f"{line} ({where_from})", reason is not None, is_full(reason), isinstance(error, UserError))
    results, all_refusals = zip(*world.gather_object((result, refusal)), strict=True)
    refusals = [one for one in all_refusals if one is not None]
    if not refusals:
        return list(results)
    if (storage := next((one for one in refusals if one.is_storage), None)) is not None:
        raise StorageFailed(storage.line, storage.is_full) from own
    if own is not None:
        raise own
    time.sleep(QUOTED_AFTER_S)
    raise (UserError if refusals[0].is_user else PeerFailed)(refusals[0].line)
