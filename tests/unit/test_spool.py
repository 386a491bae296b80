"""The spool: what was logged is there after a kill, whole, in order; what is sent is known."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flipkd_dist.spool import Spool


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path)


def put_steps(spool: Spool, numbers, run: str = "r", to: str = "http://a") -> None:
    for number in numbers:
        spool.put(to=to, run=run, metrics={"loss": number / 3}, step=number)


def steps(spool: Spool, start: int = 0) -> list[int]:
    return [message["step"] for message, _ in spool.messages(start) if message]


def test_messages_keep_their_order_their_values_and_their_time(spool):
    before = int(time.time() * 1000)
    put_steps(spool, range(5))
    found = [message for message, _ in spool.messages()]
    assert [message["metrics"]["loss"] for message in found] == [number / 3 for number in range(5)]
    assert all(before <= message["time"] <= time.time() * 1000 for message in found)


def test_half_a_line_is_neither_read_nor_joined_with_the_next(spool):
    put_steps(spool, [1])
    with spool.path.open("ab") as file:
        file.write(b'{"time": 1, "to": "http://a", "ru')
    [(_, end)] = spool.messages()  # whoever writes it may go on
    assert steps(spool) == [1] and spool.next_batch(end) is None
    put_steps(spool, [2])
    assert steps(spool) == [1, 2]
    batches, start = [], 0
    while batch := spool.next_batch(start):
        batches.append([point[3] for point in batch.items])
        start = batch.end
    assert batches == [[1], [], [2]]


def test_a_kill_loses_nothing_that_was_logged(tmp_path):
    code = (
        "import sys, itertools; from pathlib import Path; from flipkd_dist.spool import Spool\n"
        "for n in itertools.count():\n"
        "    Spool(Path(sys.argv[1])).put(to='a', run='r', metrics={'x': 0.5}, step=n); print(n)"
    )
    child = subprocess.Popen([sys.executable, "-u", "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        said = [int(child.stdout.readline()) for _ in range(200)]
        child.send_signal(signal.SIGKILL)
        said += [int(line) for line in child.stdout.read().split()]
    finally:
        child.kill()
        child.wait()
    found = steps(Spool(tmp_path))
    assert found[: len(said)] == said and len(found) - len(said) in (0, 1)


def test_two_writers_do_not_mix_their_lines(spool):
    threads = [threading.Thread(target=put_steps, args=(spool, range(500), run)) for run in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A writer that sees half of the other's line ends it with a line break: at worst an empty line follows.
    found = [message for message, _ in spool.messages() if message is not None]
    for run in "ab":
        assert [message["step"] for message in found if message["run"] == run] == list(range(500))


def test_a_batch_is_of_one_run_and_one_kind_and_not_too_long(spool):
    put_steps(spool, range(1500))
    spool.put(to="http://a", run="r", status="FINISHED")
    put_steps(spool, [7], run="other")
    put_steps(spool, [8], run="other", to="http://b")
    sizes, start = [], 0
    while batch := spool.next_batch(start):
        sizes.append((batch.kind, batch.run, batch.to, len(batch.items)))
        start = batch.end
    assert sizes == [
        ("metrics", "r", "http://a", 1000),
        ("metrics", "r", "http://a", 500),
        ("status", "r", "http://a", 1),
        ("metrics", "other", "http://a", 1),
        ("metrics", "other", "http://b", 1),
    ]
    assert start == os.path.getsize(spool.path)


def test_what_is_sent_is_known_and_what_waits_is_counted(spool):
    assert not spool.waits() and spool.num_waiting() == 0
    put_steps(spool, range(3))
    spool.put(to="http://a", run="r", status="FINISHED")
    assert spool.waits() and spool.num_waiting() == 4
    [*_, (_, third), _] = spool.messages()
    spool.note_sent(third)
    assert Spool(spool.folder).sent == third and spool.num_waiting() == 1
    spool.note.write_text(json.dumps({"bytes": 10**9}))  # of a file that lost its end with the machine
    put_steps(Spool(spool.folder), [99])  # of the next process
    assert spool.waits() and steps(spool, spool.sent) == [99]


def test_what_is_noted_as_sent_is_on_the_disk(spool, monkeypatch):
    order, fsync = [], os.fsync

    def synced(file):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    put_steps(spool, [1])
    monkeypatch.setattr(os, "fsync", synced)
    spool.note_sent(10)
    assert order == ["mlflow-spool.jsonl", "mlflow-spool.sent.json.tmp"]


def test_the_beginning_of_a_line_is_nothing_to_wait_for(spool):
    put_steps(spool, [1])
    [(_, end)] = spool.messages()
    spool.note_sent(end)
    with spool.path.open("ab") as file:
        file.write(b'{"time": 1')
    assert not spool.waits()
    put_steps(spool, [2])
    assert spool.waits()


def test_a_full_disk_is_an_error_and_the_next_line_is_whole(small_disk):
    spool = Spool(small_disk)
    ballast = small_disk / "ballast"
    put_steps(spool, [1])
    with pytest.raises(OSError, match=r"[Nn]o space left"):
        with ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        put_steps(spool, range(2, 10**4))
    ballast.unlink(missing_ok=True)
    put_steps(spool, [99])
    assert steps(spool)[0] == 1 and steps(spool)[-1] == 99


def test_steps_of_a_run_by_metric(spool):
    put_steps(spool, [1, 2])
    put_steps(spool, [3], run="other")
    spool.put(to="http://a", run="r", metrics={"f1": 0.5}, step=2)
    assert spool.steps("r") == {"loss": {1, 2}, "f1": {2}}
