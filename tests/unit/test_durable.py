"""Files that are whole or not there, drafts of killed writers, and a disk that is full."""

import errno
import fcntl
import os
import threading
from contextlib import nullcontext

import numpy as np
import pytest
from stores import SPEC, TEXTS, expected, full_store, is_tidy, shards, write

from flipkd_dist.durable import one_at_a_time, sweep, whole_file
from flipkd_dist.errors import UserError
from flipkd_dist.store import Store
from flipkd_dist.store_compact import compact_store


def test_a_file_is_there_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file"
    with whole_file(path) as file:
        file.write(b"all")
        assert not path.exists()
    assert path.read_bytes() == b"all" and os.listdir(path.parent) == ["file"]
    with pytest.raises(KeyboardInterrupt):
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"all" and os.listdir(path.parent) == ["file"]


def test_drafts_of_killed_writers_go_and_those_being_written_stay(tmp_path, monkeypatch):
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (sweep(tmp_path.glob("*.tmp")), replace(*names)))
    tmp_path.mkdir(exist_ok=True)
    left = tmp_path / "file.0a1b2c3d.tmp"
    left.write_bytes(b"half")
    with whole_file(tmp_path / "file") as file:
        file.write(b"all")
        sweep(tmp_path.glob("*.tmp"))
        assert not left.exists()
    assert (tmp_path / "file").read_bytes() == b"all"


def test_the_second_one_waits(tmp_path):
    entered = threading.Event()

    def second():
        with one_at_a_time(tmp_path):
            entered.set()

    thread = threading.Thread(target=second)
    with one_at_a_time(tmp_path):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(10)
    thread.join()


@pytest.fixture
def nfs(monkeypatch):
    """Locks as NFS has them: an exclusive one wants a descriptor that may write."""
    flock = fcntl.flock

    def strict(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", strict)


def test_locks_hold_on_nfs(nfs, tmp_path, monkeypatch):
    test_drafts_of_killed_writers_go_and_those_being_written_stay(tmp_path / "drafts", monkeypatch)
    test_the_second_one_waits(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_without_locks_nothing_is_waited_for_and_another_error_is_not_hidden(tmp_path, monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    draft = tmp_path / "file.0a1b2c3d.tmp"
    draft.write_bytes(b"half")
    for lock in (lambda: one_at_a_time(tmp_path), lambda: whole_file(tmp_path / "file")):
        with pytest.raises(OSError, match=os.strerror(code)) if code == errno.EIO else nullcontext(), lock():
            pass
    if code != errno.EIO:
        sweep([draft])
        assert draft.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", range(1, 4))
def test_a_full_disk_is_one_line_and_leaves_no_draft(tmp_path, monkeypatch, code, step):
    store = full_store(tmp_path)
    fsync, count = os.fsync, 0

    def full(file):
        nonlocal count
        count += 1
        if count == 2 * step - 1:  # of a file, not of its folder
            raise OSError(code, os.strerror(code))
        fsync(file)

    write(store, ["new"])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"^{tmp_path}: no space left .*make room[^\n]*$"):
        store.publish()
    assert is_tidy(store) and np.array_equal(store.open().vectors(TEXTS), expected(TEXTS))
    store.publish()
    assert store.is_complete(["new"])


def test_another_error_of_the_disk_stays_what_it_is(tmp_path, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        write(Store(tmp_path, SPEC), TEXTS)
    assert not os.listdir(tmp_path)


def test_on_a_disk_that_is_really_full(small_disk):
    store = full_store(small_disk / "teacher")
    (small_disk / "ballast").write_bytes(bytes(150_000))
    write(store, ["new"])
    for count in range(1, 100):
        try:
            write(store, [f"more {number}" for number in range(40 * count)])
        except UserError as error:
            assert "no space left (0 MiB free" in str(error)
            break
    else:
        raise AssertionError("never full")
    assert is_tidy(store)
    for fails in (store.publish, lambda: compact_store(store)):
        room = os.statvfs(small_disk)
        (small_disk / "rest").write_bytes(bytes(max(0, (room.f_bavail - 1) * room.f_frsize)))
        before = shards(store)
        with pytest.raises(UserError, match="make room"):
            fails()
        (small_disk / "rest").unlink()
        assert is_tidy(store) and shards(store) == before
        assert np.array_equal(store.open().vectors(TEXTS), expected(TEXTS))
    (small_disk / "ballast").unlink()
    store.publish()
    assert store.is_complete([*TEXTS, "new"])
