"""What a failing process says: the cause, once on each host, with its exit code."""

import errno
import signal
import socket
from dataclasses import asdict

import pytest

from flipkd_dist import last_words as module
from flipkd_dist.errors import StoppedAtOnce, StoppedOnRequest, UserError
from flipkd_dist.failures import Failure, introduce
from flipkd_dist.last_words import last_words
from flipkd_dist.run_folder import write_json

GONE = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:41")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "COURTESY_S", 0.0)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def noted(folder, rank, error="ValueError: x", host="there", lost_peer=False, user=False):
    (folder / "failures").mkdir(exist_ok=True)
    failure = Failure(rank, host, 1.0, error, True, lost_peer, user)
    write_json(folder / "failures" / f"rank-{rank:05d}.json", asdict(failure))


def test_a_cause_speaks_for_itself(tmp_path):
    line, code = last_words(tmp_path, 1, 2, ValueError("three\nlines"))
    assert code == 1
    assert line == f"rank 1 on here: ValueError: three lines ({tmp_path}/failures/rank-00001.txt shows where)"


def test_a_users_mistake_is_said_as_it_is(tmp_path):
    assert last_words(tmp_path, 1, 2, UserError("data.train: missing: name it")) == ("data.train: missing: name it", 2)
    assert last_words(tmp_path / "none", 0, 1, UserError("x")) == ("x", 2)
    assert not (tmp_path / "none").exists()


def test_what_all_of_a_host_have_found_is_said_once(tmp_path, monkeypatch):
    noted(tmp_path, 0, "x", "here", user=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert last_words(tmp_path, 1, 4, UserError("x")) == (None, 2)
    assert last_words(tmp_path, 2, 4, UserError("y")) == ("y", 2)  # its own
    noted(tmp_path, 0, "z", "there", user=True)
    assert last_words(tmp_path, 3, 4, UserError("z")) == ("z", 2)  # another host's


def test_the_lost_peer_that_failed_is_quoted(tmp_path):
    noted(tmp_path, 3, "ValueError: bad", "there")
    assert last_words(tmp_path, 0, 4, GONE) == (
        "rank 0 on here: lost rank 3 on there, which failed: ValueError: bad", 1
    )  # fmt: skip
    noted(tmp_path, 3, "data.train: missing", "there", user=True)
    assert last_words(tmp_path, 0, 4, GONE)[1] == 2
    noted(tmp_path, 3, "ValueError: bad", "here")
    assert last_words(tmp_path, 0, 4, GONE) == (None, 1)  # on its own host it speaks for itself


def test_those_that_left_no_word_are_named_with_their_hosts(tmp_path):
    introduce(tmp_path, ["here", "here", "there", "there"])
    noted(tmp_path, 2, lost_peer=True)
    line, code = last_words(tmp_path, 0, 4, GONE)
    assert code == 1 and line.startswith(
        "rank 0 on here: lost rank 1 on here, rank 3 on there, which left no word: killed, hung, or its machine is "
        "gone (RuntimeError: Connection closed by peer [::1]:41): "
    )


def test_one_process_of_a_host_speaks_of_a_loss(tmp_path):
    noted(tmp_path, 1, host="here", lost_peer=True)
    assert last_words(tmp_path, 2, 4, GONE) == (None, 1)
    assert last_words(tmp_path, 0, 4, GONE)[0] is not None


def test_where_all_have_lost_each_other_the_network_is_named(tmp_path):
    noted(tmp_path, 1, lost_peer=True)
    assert "none of them knows why" in last_words(tmp_path, 0, 2, GONE)[0]


@pytest.mark.parametrize("polite", [StoppedOnRequest, StoppedAtOnce])
def test_a_polite_end_is_75_unless_another_process_had_failed(tmp_path, monkeypatch, polite):
    assert last_words(tmp_path, 0, 2, polite("stopped")) == ("stopped", 75)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert last_words(tmp_path, 1, 2, polite("stopped")) == (None, 75)
    noted(tmp_path, 1)
    assert last_words(tmp_path, 0, 2, polite("stopped")) == (None, 1)


def test_a_full_disk_goes_on_by_the_same_command(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device", "/runs/x/stages.json")
    assert last_words(tmp_path, 0, 2, error) == (
        "no space left on device: /runs/x/stages.json: make room and run the same command again; what is complete "
        "stays (rank 0 on here)", 75
    )  # fmt: skip
