"""Files that are whole or not there whenever the machine stops; a full disk said in one line."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flipkd_dist.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Turn a full disk or an exhausted quota into a UserError that names the folder and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        raise UserError(
            f"{folder}: no space left ({free:,.0f} MiB free; a quota may allow less): make room or write to "
            "another disk, then run again; what is complete stays"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make names that were given or taken away last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(file: BinaryIO, wait: bool) -> bool:
    """Take the lock of a file that is open for writing, as NFS wants it; False on a file system without locks.

    Raises:
        BlockingIOError: somebody else has it, and `wait` is not set.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name once it is complete and on the disk; nothing stays of one that failed.

    Raises:
        UserError: the disk is full.
    """
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # two writers of one file never share a draft
    with room_in(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                locked(file, wait=False)
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sweep(drafts: Iterable[Path]) -> None:
    """Remove the drafts of killed writers; one that is being written is locked and stays, any one without locks."""
    for draft in drafts:
        with suppress(BlockingIOError, FileNotFoundError):  # being written; finished meanwhile
            with draft.open("r+b") as file:
                if locked(file, wait=False):
                    draft.unlink()


@contextmanager
def one_at_a_time(folder: Path, refusal: str | None = None) -> Iterator[None]:
    """Wait until nobody else holds this folder, by the file `.lock` in it; without locks nothing is waited for.

    Args:
        refusal: the error to raise instead of waiting.
    Raises:
        UserError: the disk is full; `refusal`.
    """
    with room_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    with file:
        try:
            locked(file, wait=refusal is None)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield
