"""Notes of failing processes: the cause is told from its consequences."""

import json
import os
import time

import pytest
import torch
import torch.distributed as dist

from flipkd_dist import failures
from flipkd_dist.errors import PeerFailed, StoppedAtOnce, StoppedOnRequest, UserError
from flipkd_dist.failures import first_cause, forget, is_final, is_lost_peer, note, noting

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234"
LOST = [
    RuntimeError(GLOO),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation"),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"),
    dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    dist.DistNetworkError("failed to recv, got 0 bytes"),
]
OWN = [
    ValueError("Connection closed by peer"),
    RuntimeError("no LoRA-B tensor of 2 layers moved"),
    UserError("data.train: timeout"),
    dist.DistBackendError("NCCL error: CUDA error: out of memory, connection closed by peer"),
    OSError("Connection reset by peer"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_peer_is_known_by_its_error(error):
    assert is_lost_peer(error) and not is_final(error)


@pytest.mark.parametrize("error", OWN, ids=str)
def test_an_own_fault_is_no_lost_peer(error):
    assert not is_lost_peer(error)


def test_an_error_made_from_a_lost_peers_is_one_too():
    try:
        raise KeyError("x") from RuntimeError(GLOO)
    except KeyError as error:
        assert is_lost_peer(error) and not is_final(error)


def test_what_a_restart_would_meet_again_is_final():
    assert is_final(UserError("x")) and is_final(RuntimeError("the adapter answers as its base does"))
    assert is_final(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_final(OSError(5, "Input/output error"))
    assert not is_final(torch.AcceleratorError("uncorrectable ECC error"))


def test_the_cause_is_the_oldest_note_that_is_no_consequence(tmp_path, monkeypatch):
    clock = iter([10.0, 11.0, 12.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(failures.socket, "gethostname", lambda: "node7")
    note(tmp_path, 0, RuntimeError(GLOO))
    assert first_cause(tmp_path).rank == 0  # the best that is known
    note(tmp_path, 2, ValueError("the second\nfault"))
    note(tmp_path, 1, ValueError("the third"))
    assert str(first_cause(tmp_path)) == "rank 2 on node7: ValueError: the second fault"
    assert not (cause := first_cause(tmp_path)).lost_peer and cause.final and not cause.user


def test_a_note_holds_one_line_and_the_traceback_lies_beside_it(tmp_path):
    with pytest.raises(UserError), noting(tmp_path, 1):
        raise UserError("data.train: x.jsonl: line 3:\n no label: add it")
    values = json.loads((tmp_path / "failures" / "rank-00001.json").read_text())
    assert values.keys() == {"rank", "host", "time", "error", "final", "lost_peer", "user"}
    assert values["error"] == "data.train: x.jsonl: line 3: no label: add it" and values["user"] and values["final"]
    assert "test_failures.py" in (tmp_path / "failures" / "rank-00001.txt").read_text()


@pytest.mark.parametrize("polite", [StoppedOnRequest, StoppedAtOnce])
def test_a_polite_end_is_not_noted(tmp_path, polite):
    with pytest.raises(polite), noting(tmp_path, 0):
        raise polite("stopped")
    assert first_cause(tmp_path) is None and not (tmp_path / "failures").exists()


def test_notes_of_an_earlier_attempt_are_forgotten(tmp_path):
    forget(tmp_path)
    note(tmp_path, 0, ValueError("old"))
    forget(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_process_that_starts_takes_back_its_own_note_and_rank_0_those_of_ranks_that_are_no_more(tmp_path):
    for rank in range(4):
        note(tmp_path, rank, ValueError("old"))
    with noting(tmp_path, 1, 3):
        assert [failure.rank for failure in failures.failures(tmp_path)] == [0, 2, 3]
    with noting(tmp_path, 0, 3):
        assert [failure.rank for failure in failures.failures(tmp_path)] == [2]


def test_a_note_that_cannot_be_written_or_read_hides_nothing(tmp_path):
    (tmp_path / "failures").write_text("a file")
    with pytest.raises(ValueError, match="own"), noting(tmp_path, 0):
        raise ValueError("own")
    (tmp_path / "failures").unlink()
    note(tmp_path, 3, ValueError("whole"))
    (tmp_path / "failures" / "rank-00000.json").write_text('{"rank": 0')
    (tmp_path / "failures" / "rank-00001.json").write_text('{"rank": 1, "colour": "red"}')
    assert [failure.rank for failure in failures.failures(tmp_path)] == [3]


def test_credentials_of_an_address_are_in_no_note(tmp_path):
    try:
        raise ConnectionError("https://me:hunter2@mlflow:5000/api: refused")
    except ConnectionError as error:
        noted = note(tmp_path, 0, error)
    assert noted.error == "ConnectionError: https://mlflow:5000/api: refused"
    written = [file.read_text() for file in (tmp_path / "failures").iterdir()]
    assert len(written) == 2 and not any("hunter2" in text for text in written)


def test_a_failure_that_another_rank_quotes_is_not_the_cause(tmp_path):
    """Not even where it is noted first; a restart would meet it again all the same."""
    quoted = PeerFailed("ValueError: wrong (rank 0 on a)")
    note(tmp_path, 1, quoted)
    time.sleep(0.01)
    note(tmp_path, 0, ValueError("wrong"))
    assert (first_cause(tmp_path).rank, is_final(quoted)) == (0, True)
