"""The trace: which steps, whole or not at all, and a word where there is none."""

import gzip
import json

import pytest
import torch

from flipkd_dist import profiling
from flipkd_dist.profiling import StepProfiler
from flipkd_dist.world import World


def run(folder, num_steps: int, wanted: bool = True, stops_after: int = 10**9) -> None:
    profiler = StepProfiler(folder, World(1, 2), wanted, num_steps)
    with profiler.listening():
        for number in range(1, num_steps + 1):
            with profiler.step():
                torch.ones(3).cumsum(0)
            profiler.finish_if_due()
            if number == stops_after:
                raise KeyboardInterrupt


def traced(folder) -> list[int]:
    """Numbers of the steps in the trace."""
    with gzip.open(folder / "rank-1.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("name") == "aten::cumsum" for event in events)
    names = {event.get("name", "") for event in events}
    return sorted(int(name.split()[1]) for name in names if name.startswith("step "))


@pytest.mark.parametrize(
    ("num_steps", "steps"), [(9, [4, 5, 6]), (6, [4, 5, 6]), (5, [3, 4, 5]), (2, [1, 2]), (1, [1])]
)
def test_steps_after_the_first_ones(tmp_path, caplog, num_steps, steps):
    caplog.set_level("INFO", logger="flipkd_dist")
    run(tmp_path / "profile", num_steps)
    assert traced(tmp_path / "profile") == steps
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-1.json.gz", "rank-1.txt"]
    assert "aten::cumsum" in (tmp_path / "profile" / "rank-1.txt").read_text()
    [said] = caplog.messages
    assert said.endswith(f"steps {steps[0]} to {steps[-1]} of this process in {tmp_path}/profile/rank-1.json.gz")


def test_a_run_that_is_stopped_leaves_what_there_is(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 9, stops_after=5)
    assert traced(tmp_path) == [4, 5]


def test_a_run_that_ends_before_says_so(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 9, stops_after=3)
    assert not list(tmp_path.iterdir())
    assert "no trace: this process ended before its optimizer step 4" in caplog.text
    caplog.clear()
    run(tmp_path, 0)  # a resume with no step left
    assert "no trace" in caplog.text


def test_a_second_run_overwrites(tmp_path):
    run(tmp_path, 1)
    run(tmp_path, 9)
    assert traced(tmp_path) == [4, 5, 6]


def test_nothing_unless_it_is_wanted(tmp_path, caplog):
    run(tmp_path / "profile", 9, wanted=False)
    assert not (tmp_path / "profile").exists() and not caplog.messages


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    run(tmp_path, 1)
    monkeypatch.setattr(profiling.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    run(tmp_path, 9)
    assert "was not written (No space left on device)" in caplog.text and "no trace" not in caplog.text
    assert traced(tmp_path) == [1]


def test_a_trace_that_fails_does_not_hide_why_the_training_died(tmp_path, monkeypatch, caplog):
    stop = profiling.profile.stop

    def fail(trace) -> None:
        stop(trace)
        raise RuntimeError("trace lost")

    monkeypatch.setattr(profiling.profile, "stop", fail)
    run(tmp_path, 9)
    assert "was not written (trace lost)" in caplog.text
