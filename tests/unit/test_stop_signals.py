"""Signals that ask a training to stop."""

import os
import signal

import pytest

from flipkd_dist import stop
from flipkd_dist.errors import StoppedAtOnce


def test_twice_in_a_moment_is_one_request(tmp_path):
    """As Slurm sends it; a checkpoint is still written."""
    with stop.StopRequest(tmp_path / "stop").listening() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.signalled and request.file.exists()


def test_asked_again_it_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "ONE_REQUEST_S", 0.0)
    with stop.StopRequest(tmp_path / "stop").listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedAtOnce, match="run the same command again"):
            os.kill(os.getpid(), signal.SIGTERM)
