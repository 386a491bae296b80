"""Signals that ask a training to stop."""

import os
import signal
import sys
import time
import weakref
from contextlib import suppress

import pytest

from flipkd_dist import stop
from flipkd_dist.errors import StoppedAtOnce, UserError


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


def test_in_a_call_of_rays_it_is_an_interruption_and_comes_out_as_what_it_is(tmp_path, monkeypatch):
    """Ray lets a KeyboardInterrupt out at once, and turns any other exception of a handler into a late SystemError."""
    within, seen = {"__name__": "ray._private.worker", "os": os, "signal": signal}, []
    exec("def get():\n os.kill(os.getpid(), signal.SIGTERM)\n for _ in range(9): pass", within)
    with pytest.raises(StoppedAtOnce, match=r"^stopped by SIGTERM: run the same command again to go on$"):
        with stop.handling(stop.stop_at_once):
            try:
                within["get"]()
            except BaseException as error:
                seen.append(type(error))
                raise SystemError("an exception set") from error
    assert seen == [KeyboardInterrupt] and not stop.ASKED
    with pytest.raises(KeyboardInterrupt), stop.handling(stop.stop_at_once):
        raise KeyboardInterrupt  # of Ctrl-C


class Thing:
    pass


@pytest.mark.parametrize("module", ["sqlalchemy.event", "ray._private.worker"])
def test_a_request_that_comes_in_a_callback_is_not_lost(module):
    """Python drops whatever is raised there."""
    within = {"__name__": module, "os": os, "signal": signal}
    exec("def callback(_):\n os.kill(os.getpid(), signal.SIGTERM)\n for _ in range(9): pass", within)
    thing = Thing()
    reference = weakref.ref(thing, within["callback"])
    with pytest.raises(StoppedAtOnce, match=r"^stopped by SIGTERM: "), stop.handling(stop.stop_at_once):
        del thing
        assert reference() is None and stop.ASKED
        time.sleep(20)
    assert not stop.ASKED


def test_what_else_is_dropped_sends_no_signal(monkeypatch):
    """The end of a program is not interrupted by a destructor that fails then."""
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: dropped.append(found.exc_type))
    with pytest.raises(StoppedAtOnce), stop.handling(stop.stop_at_once):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            thing = Thing()
            reference = weakref.ref(thing, lambda _: 1 / 0)
            del thing
            assert reference() is None
            time.sleep(5 * stop.AGAIN_S)
    assert dropped == [ZeroDivisionError]


@pytest.mark.parametrize("begin", [lambda file: stop.StopRequest(file).listening(), lambda _: stop.handling(print)])
def test_a_request_that_a_library_swallows_ends_the_run_before_its_training(tmp_path, begin):
    """Of one run, and of the runs of a comparison."""
    with pytest.raises(StoppedAtOnce, match=r"^stopped by SIGUSR1: "), stop.handling(stop.stop_at_once):
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGUSR1)
        with begin(tmp_path / "stop"):
            raise AssertionError("it trains")


def test_a_mistake_that_is_found_after_a_swallowed_request_is_told():
    with pytest.raises(UserError, match=r"^data"), stop.handling(stop.stop_at_once):
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("data.train: is missing")


def test_the_work_of_a_swallowed_request_may_end_well():
    with stop.handling(stop.stop_at_once):
        with suppress(StoppedAtOnce):
            os.kill(os.getpid(), signal.SIGTERM)
    assert not stop.ASKED
