"""A polite end: SIGTERM, SIGUSR1 or a file named `stop` in the run folder ends a training after its current step."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from flipkd_dist.errors import HeadLost, StoppedAtOnce

if TYPE_CHECKING:  # the command line uses this module before torch is imported
    from flipkd_dist.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST_S = 2.0  # Slurm sends SIGTERM twice in a moment where it preempts without a time of grace
AGAIN_S = 0.1  # after which a signal is sent again whose exception was lost
ASKED: list[int] = []  # the signal that is to end this process at once


@contextmanager
def handling(handler: Callable[..., None]) -> Iterator[None]:
    """Let `handler` take the signals meanwhile; nothing off the main thread, where Python allows no handlers.

    Raises:
        StoppedAtOnce: in place of what became of the handler's exception on its way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, hook = {number: signal.signal(number, handler) for number in SIGNALS}, sys.unraisablehook

    def dropped(found: "sys.UnraisableHookArgs") -> None:
        """Python lets nothing out of a weak reference's callback, say, of which SQLAlchemy's imports are full."""
        if ASKED and isinstance(found.exc_value, StoppedAtOnce | KeyboardInterrupt):
            again = threading.Timer(AGAIN_S, _send_again)
            again.daemon = True
            again.start()
        else:
            hook(found)

    sys.unraisablehook = dropped
    try:
        if ASKED:  # before, and a library has swallowed it
            raise StoppedAtOnce(_line(ASKED[0]))
        yield
    except BaseException as error:
        if not ASKED or isinstance(error, HeadLost) or not _came_of_it(error):
            raise
        raise StoppedAtOnce(_line(ASKED.pop())) from error
    finally:
        ASKED.clear()
        sys.unraisablehook = hook
        for number, old in previous.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Handler for stages of which nothing is lost at any moment.

    Raises:
        KeyboardInterrupt: in a call of Ray's, which lets no other exception of a handler out; see `handling`.
        StoppedAtOnce: anywhere else.
    """
    ASKED[:] = [number]
    if frame is not None and frame.f_globals.get("__name__", "").startswith("ray."):
        raise KeyboardInterrupt
    raise StoppedAtOnce(_line(number))


def _line(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}: run the same command again to go on"


def _came_of_it(error: BaseException | None) -> bool:
    """Whether an error is what became of the handler's exception; a mistake that is found later is told as such."""
    while error is not None and not isinstance(error, StoppedAtOnce | KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _send_again() -> None:
    if ASKED:
        signal.pthread_kill(threading.main_thread().ident, ASKED[0])


class StopRequest:
    """Asked for in one process, seen by all: the driver's signals reach its workers through the file."""

    def __init__(self, file: Path):
        self.file, self.signalled = file, False
        self.asked_at = -float("inf")  # s, monotonic: the first signal

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            if time.monotonic() - self.asked_at > ONE_REQUEST_S:  # asked again: whoever asks will not wait for the step
                stop_at_once(number, frame)
            return
        self.signalled, self.asked_at = True, time.monotonic()
        self.file.touch()

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        with handling(self._ask):
            yield self

    def forget(self) -> None:
        """Remove the request of an earlier training."""
        self.file.unlink(missing_ok=True)

    def made(self, world: "World") -> bool:
        """Whether any rank has been asked to stop; every rank must call it."""
        return world.any(self.signalled or (world.is_main and self.file.exists()))

    def made_with(self, save: Path, world: "World") -> tuple[bool, bool]:
        """Whether any rank has been asked to stop, and whether the file `save` asks for a checkpoint; as `made`."""
        asked = [self.signalled or (world.is_main and self.file.exists()), world.is_main and save.exists()]
        stop, checkpoint = world.each_any(asked)
        return stop, checkpoint
