"""Every second in exactly one phase, whatever nests or fails; on a device nothing waits before a line is logged."""

import pytest
import torch

from flipkd_dist.phases import ASIDE, PHASES, HostMarks, PhaseClock, no_clock


class ScriptedMarks:
    """Time goes by when told; with `late` a mark's time is known only after it was waited for, as on a busy device."""

    def __init__(self, late: bool = False):
        self.now, self.late, self.waits, self.known = 0.0, late, 0, -1.0

    def new(self) -> float:
        return self.now

    def reached(self, mark: float, wait: bool) -> bool:
        self.waits += wait
        if wait or not self.late:
            self.known = max(self.known, mark)
        return mark <= self.known

    def seconds(self, earlier: float, later: float) -> float:
        assert later <= self.known
        return later - earlier


def one_step(clock: PhaseClock, marks: ScriptedMarks) -> None:
    """1 s data, 2 s forward, 4 s loss around it, 8 s communication inside, 16 s backward, 32 s between them."""
    with clock("data"):
        marks.now += 1
    marks.now += 32
    with clock("loss"):
        marks.now += 1
        with clock("forward"):
            marks.now += 2
        marks.now += 1
        with clock("communication"):
            marks.now += 6
        marks.now += 2
    with clock("backward"):
        marks.now += 10
        with clock("communication"):
            marks.now += 2
        marks.now += 6


STEP = {"data": 1.0, "forward": 2.0, "loss": 4.0, "communication": 8.0, "backward": 16.0, "other": 32.0}


@pytest.mark.parametrize("late", [False, True])
def test_each_second_is_in_one_phase(late):
    marks = ScriptedMarks(late)
    clock = PhaseClock(marks)
    for _ in range(3):
        one_step(clock, marks)
    assert marks.waits == 0  # until somebody wants to know
    taken = clock.take()
    assert taken == {**dict.fromkeys((*PHASES, ASIDE), 0.0), **{phase: 3 * value for phase, value in STEP.items()}}
    assert sum(taken.values()) == marks.now
    one_step(clock, marks)
    assert {phase: value for phase, value in clock.take().items() if value} == STEP
    assert not clock.waiting


def test_few_marks_are_kept_once_their_time_is_known():
    marks = ScriptedMarks()
    clock = PhaseClock(marks)
    for _ in range(50):
        one_step(clock, marks)
        assert not clock.waiting


def test_what_is_aside_is_in_no_phase():
    marks = ScriptedMarks()
    clock = PhaseClock(marks)
    with clock(ASIDE):
        marks.now += 5
        with clock("forward"):
            marks.now += 1
    taken = clock.take()
    assert (taken[ASIDE], taken["forward"], taken["other"]) == (5, 1, 0)


def test_a_phase_that_fails_ends():
    marks = ScriptedMarks()
    clock = PhaseClock(marks)
    with pytest.raises(ValueError):
        with clock("forward"):
            marks.now += 1
            raise ValueError
    marks.now += 2
    assert (clock.take()["forward"], clock.phase) == (1, "other")


def test_what_was_before_the_start_is_forgotten():
    marks = ScriptedMarks(late=True)
    clock = PhaseClock(marks)
    one_step(clock, marks)
    clock.start()
    marks.now += 3
    assert {phase: value for phase, value in clock.take().items() if value} == {"other": 3.0}


def test_on_cpu_it_is_the_monotonic_clock(monkeypatch):
    times = iter([10.0, 11.0, 13.5, 14.0])
    monkeypatch.setattr("flipkd_dist.phases.time.monotonic", lambda: next(times))
    clock = PhaseClock.of(torch.device("cpu"))
    assert isinstance(clock.marks, HostMarks)
    with clock("data"):
        pass
    taken = clock.take()
    monkeypatch.undo()
    assert (taken["other"], taken["data"]) == (1.5, 2.5)


def test_phases_stand_in_a_trace():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        with PhaseClock(ScriptedMarks())("backward"):
            pass
    assert "backward" in {event.key for event in trace.key_averages()}


def test_who_does_not_measure_needs_no_clock():
    with no_clock("forward"):
        pass
