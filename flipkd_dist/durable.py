"""Files that are whole or not there whenever the machine stops; a full disk said in one line."""

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flipkd_dist.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none

BROKEN = (errno.EIO, errno.ESTALE, errno.EROFS)  # a disk or a file server that fails
REFUSALS = (*FULL, *BROKEN)
# Writers in other languages, and SQLite, tell of it in words alone.
WORDS = re.compile(
    rf"(os error ({'|'.join(map(str, REFUSALS))})\b|disk is full|{'|'.join(os.strerror(code) for code in REFUSALS)})",
    re.IGNORECASE,
)

MEMORY = re.compile(r"/dev/shm|shared memory|\bNCCL\b")  # no disk, though it is said in the same words


def storage_reason(error: BaseException) -> str | None:
    """`no space left on device`, or how else a disk has refused; None where the error is of another kind."""
    if MEMORY.search(str(error)):
        return None
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return os.strerror(error.errno).lower()
    if found := WORDS.search(str(error)):
        code = found.group(2)
        return os.strerror(int(code)).lower() if code else found.group().lower().replace("disk is", "the disk is")
    return storage_reason(error.__cause__) if error.__cause__ is not None else None


def is_full(reason: str | None) -> bool:
    """Whether room helps against what `storage_reason` has found."""
    return reason is not None and not any(os.strerror(code).lower() == reason for code in BROKEN)


def storage_line(error: BaseException, reason: str) -> str:
    """What is said of it where nothing that was complete is lost."""
    place = getattr(error, "filename", None)
    remedy = "make room" if is_full(reason) else "look at the storage"
    return f"{reason}: {f'{place}: ' if place else ''}{remedy} and run the same command again; what is complete stays"


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


def sync_file(path: Path) -> None:
    """Make last what was appended to a file, and its name; nothing where no file is there yet.

    Raises:
        OSError: the disk is full or broken.
    """
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)


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
