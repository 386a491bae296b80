"""The sender: in order, once, whatever the server does; nobody waits for it, and little is said."""

import logging
import time

import pytest

from flipkd_dist import mlflow_sender
from flipkd_dist.mlflow_sender import Sender
from flipkd_dist.spool import Spool

HERE = "http://here"


class Server:
    """Takes messages; down, slow or choosy as told."""

    def __init__(self):
        self.taken, self.tries, self.is_down, self.delay_s = [], 0, False, 0.0
        self.bad, self.bad_fault = set(), "item"  # metrics or kinds that it does not take, whose fault it says that is
        self.most = 10**6  # items that it takes at once

    def send(self, run, kind, items):
        self.tries += 1
        time.sleep(self.delay_s)
        if self.is_down:
            raise ConnectionError("http://user:secret@here refused")
        if kind in self.bad or (kind == "metrics" and self.bad & {item[0] for item in items}):
            raise ValueError("bad name")
        if len(items) > self.most:
            raise ValueError("too slow")
        self.taken += [(run, kind, item) for item in items]

    def answers(self, run):
        return not self.is_down

    def fault(self, error):
        return self.bad_fault if isinstance(error, ValueError) else "unknown"

    @property
    def steps(self):
        return [item[3] for _, kind, item in self.taken if kind == "metrics"]


@pytest.fixture
def server(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="flipkd_dist")
    monkeypatch.setattr(mlflow_sender, "PAUSES_S", (0.02,))
    monkeypatch.setattr(mlflow_sender, "POLL_S", 0.005)
    return Server()


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path)


def log(spool, number, key="loss", to=HERE):
    spool.put(to=to, run="r", metrics={key: 0.5}, step=number)


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_kinds_go_in_order_and_once(spool, server):
    sender = Sender(spool, server, HERE)
    spool.put(to=HERE, run="r", status="RUNNING")
    for number in range(20):
        log(spool, number)
        sender.wake()
    spool.put(to=HERE, run="r", artifact="x")
    spool.put(to=HERE, run="r", status="FINISHED")
    assert sender.settle(5) == 0
    assert server.steps == list(range(20))
    kinds = [kind for _, kind, _ in server.taken]
    assert (kinds[0], kinds[-2], kinds[-1]) == ("status", "artifact", "status")
    assert Sender(spool, server, HERE).settle(5) == 0 and len(server.taken) == 23  # another process: nothing is left


def test_who_logs_does_not_wait_for_a_slow_server(spool, server):
    server.delay_s = 0.5
    sender, start = Sender(spool, server, HERE), time.monotonic()
    for number in range(100):
        log(spool, number)
        sender.wake()
    assert time.monotonic() - start < 10  # not 50
    assert sender.settle(20) == 0 and server.steps == list(range(100)) and server.tries < 20


def test_a_server_that_is_down_and_comes_back_is_said_once_each(spool, server, caplog):
    sender, server.is_down = Sender(spool, server, HERE), True
    for number in range(10):
        log(spool, number)
        sender.wake()
        time.sleep(0.01)
    until(lambda: server.tries > 3)
    server.is_down = False
    assert sender.settle(20) == 0 and server.steps == list(range(10))
    down, back = caplog.messages
    assert "http://here does not take what is logged" in down and "training goes on" in down
    assert "secret" not in down and "takes it again" in back


def test_what_cannot_be_sent_is_counted_in_bounded_time_and_goes_with_the_next_process(spool, server, caplog):
    server.is_down = True
    for number in range(12):
        log(spool, number)
    sender, start = Sender(spool, server, HERE), time.monotonic()
    assert sender.settle(0.3) == 12 and time.monotonic() - start < 20
    assert "secret" not in sender.trouble and "refused" in sender.trouble and not caplog.messages  # the caller says it
    other = Server()
    assert Sender(Spool(spool.folder), other, HERE).settle(20) == 0
    assert other.steps == list(range(12))


def test_patience_is_without_progress(spool, server):
    server.delay_s = 0.25
    for number in range(6):
        log(spool, number)
        spool.put(to=HERE, run="r", status="RUNNING")
    assert Sender(spool, server, HERE).settle(2.0) == 0  # 12 requests of 0.25 s


def test_a_bad_value_is_put_aside_and_holds_nothing_up(spool, server, caplog):
    server.bad = {"bad"}
    for number in range(50):
        log(spool, number, "bad" if number in (7, 31) else "loss")
    assert Sender(spool, server, HERE).settle(20) == 0
    assert sorted(server.steps) == [number for number in range(50) if number not in (7, 31)]
    refused = (spool.folder / "mlflow-refused.jsonl").read_text().splitlines()
    assert len(refused) == 2 and all("bad name" in line for line in refused)
    [said] = caplog.messages
    assert "mlflow-refused.jsonl" in said


def test_a_run_that_is_gone_is_given_up_with_one_request(spool, server):
    server.bad, server.bad_fault = {"loss"}, "run"
    for number in range(500):
        log(spool, number)
    assert Sender(spool, server, HERE).settle(20) == 0 and server.tries == 1


@pytest.mark.parametrize("fault, settles", [("unknown", True), ("server", False)])
def test_an_unclear_error_is_tried_again_before_it_counts_as_a_refusal(spool, server, fault, settles):
    server.bad, server.bad_fault = {"bad"}, fault
    log(spool, 1, "bad")
    log(spool, 2)
    left = Sender(spool, server, HERE).settle(10 if settles else 1)
    assert (left == 0) == settles and server.steps == ([2] if settles else []) and server.tries >= 3


def test_a_server_that_answers_and_takes_nothing_is_waited_for_with_few_requests(spool, server):
    """As one whose database has become read-only."""
    server.bad, server.bad_fault = {"metrics"}, "unknown"
    for number in range(200):
        log(spool, number)
    assert Sender(spool, server, HERE).settle(0.3) == 200
    assert not (spool.folder / "mlflow-refused.jsonl").exists()
    server.bad = set()
    until(lambda: not spool.waits())
    assert sorted(set(server.steps)) == list(range(200))  # it may have come back while the points were tried by halves


def test_what_is_taken_in_smaller_parts_is_not_put_aside(spool, server):
    server.most, server.bad_fault = 60, "unknown"
    for number in range(200):
        log(spool, number)
    assert Sender(spool, server, HERE).settle(10) == 0 and sorted(set(server.steps)) == list(range(200))
    assert not (spool.folder / "mlflow-refused.jsonl").exists()


def test_two_doubtful_values_wait_rather_than_be_put_aside(spool, server):
    server.bad, server.bad_fault = {"bad"}, "unknown"
    for number in range(50):
        log(spool, number, "bad" if number in (7, 31) else "loss")
    assert Sender(spool, server, HERE).settle(0.5) == 50 and not (spool.folder / "mlflow-refused.jsonl").exists()


def test_a_doubtful_value_alone_waits_until_another_is_taken(spool, server):
    server.bad, server.bad_fault = {"bad"}, "unknown"
    log(spool, 1, "bad")
    sender = Sender(spool, server, HERE)
    assert sender.settle(0.3) == 1
    spool.put(to=HERE, run="r", status="RUNNING")
    assert sender.settle(0.3) == 2
    log(spool, 2)
    assert sender.settle(10) == 0 and set(server.steps) == {2}
    assert len((spool.folder / "mlflow-refused.jsonl").read_text().splitlines()) == 1


def test_an_artifact_that_is_not_taken_lets_the_rest_pass_and_waits(spool, server, caplog):
    server.bad, server.bad_fault = {"artifact"}, "unknown"
    sender = Sender(spool, server, HERE)
    for number in range(5):
        spool.put(to=HERE, run="r", artifact=f"file {number}", time=number)
        log(spool, number)
        sender.wake()
    spool.put(to=HERE, run="r", status="FINISHED")
    assert sender.settle(1.0) == 5  # just the artifacts
    assert server.steps == list(range(5)) and server.taken[-1][1] == "status"
    assert len([line for line in caplog.messages if "warning" in line]) <= 2 and len(caplog.messages) <= 3
    server.bad = set()
    assert sender.settle(10) == 0
    assert {item["artifact"] for _, kind, item in server.taken if kind == "artifact"} == {
        f"file {number}" for number in range(5)
    }


def test_a_full_disk_is_not_told_as_the_servers(spool, server, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "note_sent", full)
    log(spool, 1)
    sender = Sender(spool, server, HERE)
    sender.wake()
    until(lambda: server.tries > 2)
    [said] = caplog.messages
    assert f"{spool.folder} cannot be written" in said and HERE not in said and "No space left" in sender.trouble


def test_messages_to_another_server_are_put_aside(spool, server):
    log(spool, 1, to="http://there")
    log(spool, 2)
    assert Sender(spool, server, HERE).settle(20) == 0
    assert server.steps == [2] and "http://there" in (spool.folder / "mlflow-refused.jsonl").read_text()


def test_a_kill_between_sending_and_its_note_sends_the_very_same_again(spool, server, monkeypatch):
    log(spool, 1)
    real = Spool.note_sent

    def killed(*_):
        raise OSError("killed here")

    monkeypatch.setattr(Spool, "note_sent", killed)
    assert Sender(spool, server, HERE).settle(0.1) == 1
    until(lambda: server.taken)
    server.is_down = True  # it is gone
    monkeypatch.setattr(Spool, "note_sent", real)
    other = Server()
    assert Sender(Spool(spool.folder), other, HERE).settle(20) == 0
    assert other.taken == server.taken[:1]  # time and value too: a store that has it keeps it once


def test_two_senders_of_one_folder_take_turns(spool, server):
    server.delay_s = 0.005
    for number in range(30):
        log(spool, number)
        spool.put(to=HERE, run="r", status="RUNNING")
    senders = [Sender(Spool(spool.folder), server, HERE) for _ in range(2)]
    for sender in senders:
        sender.wake()
    assert all(sender.settle(20) == 0 for sender in senders)
    assert server.steps == list(range(30)) and len(server.taken) == 60
