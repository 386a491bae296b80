"""Where the time of an optimizer step goes: one timeline of marks, each second of it in exactly one phase.

On CPU a mark is a reading of the monotonic clock. On CUDA it is an event in the stream, which is read only when a line
is logged: nothing waits for the device in between, and a phase lasts as long as the device took to get through it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

PHASES = ("data", "forward", "loss", "communication", "backward", "optimizer", "other")
ASIDE = "aside"  # validations, checkpoints and whatever else is no part of a step

Clock = Callable[[str], AbstractContextManager]  # `with clock("forward"):`


def no_clock(_phase: str) -> AbstractContextManager:
    """The clock of those who do not measure."""
    return nullcontext()


class Marks(Protocol):
    """A way to read the time."""

    def new(self) -> Any: ...

    def reached(self, mark: Any, wait: bool) -> bool:
        """Whether the time of `mark` is known, after waiting for it if need be."""

    def seconds(self, earlier: Any, later: Any) -> float: ...


class HostMarks:
    def new(self) -> float:
        return time.monotonic()

    def reached(self, mark: float, wait: bool) -> bool:
        return True

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier


class StreamMarks:
    def new(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reached(self, mark: torch.cuda.Event, wait: bool) -> bool:
        if wait:
            mark.synchronize()
        return mark.query()

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        return earlier.elapsed_time(later) / 1000


class PhaseClock:
    """Seconds by phase; `with clock("forward"):` nests, and what runs in an inner phase is not in the outer one."""

    def __init__(self, marks: Marks):
        self.marks, self.phase = marks, "other"
        self.start()

    @classmethod
    def of(cls, device: torch.device) -> "PhaseClock":
        return cls(StreamMarks() if device.type == "cuda" else HostMarks())

    def start(self) -> None:
        """Forget what was measured and begin here."""
        self.seconds = dict.fromkeys((*PHASES, ASIDE), 0.0)
        self.last = self.marks.new()
        self.waiting: deque[tuple[str, Any]] = deque()  # (phase, the mark at its end) whose time is not known yet

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """
        Args:
            phase: one of PHASES, or ASIDE.
        """
        self._mark()
        outer, self.phase = self.phase, phase
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            self._mark()
            self.phase = outer

    def take(self) -> dict[str, float]:
        """Seconds by phase since `start` or the last `take`; together all the time that has passed."""
        self._mark()
        self._settle(wait=True)
        taken, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return taken

    def _mark(self) -> None:
        self.waiting.append((self.phase, self.marks.new()))
        self._settle(wait=False)

    def _settle(self, wait: bool) -> None:
        """Credit phases whose end is known, so that few marks are kept however seldom a line is logged."""
        while self.waiting and self.marks.reached(self.waiting[0][1], wait):
            phase, mark = self.waiting.popleft()
            self.seconds[phase] += self.marks.seconds(self.last, mark)
            self.last = mark
