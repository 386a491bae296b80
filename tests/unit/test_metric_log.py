"""The line of a run: rates of its own steps, and an ETA that does not know of what went before a resume."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_phases import ScriptedMarks

from flipkd_dist.config import RunConfig
from flipkd_dist.meter import Meter
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.order import Order
from flipkd_dist.phases import ASIDE, PhaseClock
from flipkd_dist.step import SUMS
from flipkd_dist.world import World

ORDER = Order(80, 8, 1, seed=0)


class Run:
    """A log of 20 steps, a line every third, whose time goes by when told."""

    def __init__(self, tmp_path, monkeypatch):
        self.marks, world = ScriptedMarks(), World()
        config = RunConfig.model_validate(
            {"name": "x", "output_dir": str(tmp_path), "train": {"logging_steps": 3}, "loss": {"threshold": None}}
        )
        config.run_dir.mkdir(parents=True)
        self.path = config.run_dir / "metrics.jsonl"
        self.clock = PhaseClock(self.marks)
        meter = Meter(world, self.clock, 10**9, torch.float32)
        monkeypatch.setattr("flipkd_dist.metric_log.time", SimpleNamespace(monotonic=self.marks.new))
        self.log = MetricLog(config, world, self.path, 20, None, meter)

    def step(self, number: int, seconds: float) -> None:
        """8 pairs in 50 tokens, in 80 places, where one pair a row would take 200."""
        with self.clock("forward"):
            self.marks.now += seconds
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        for key, value in {"tokens": 50, "padded_tokens": 80, "unpacked_tokens": 200}.items():
            sums[SUMS.index(key)] = value
        self.log.add(number, torch.tensor([8.0, 8.0, 8.0], dtype=torch.float64), sums, 1.0, 0.1, ORDER)

    @property
    def last(self) -> dict:
        return json.loads(self.path.read_text().splitlines()[-1])


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="flipkd_dist")
    return Run(tmp_path, monkeypatch)


def test_rates_leave_validations_out_and_the_eta_has_them(run, caplog):
    run.log.begin()
    run.log.start_clock()
    run.step(1, 2.0)
    with run.clock(ASIDE):
        run.marks.now += 30  # a validation
    run.step(2, 3.0)
    run.step(3, 5.0)
    assert run.last["pairs_per_second"] == pytest.approx(16 / 8)
    assert run.last["tokens_per_second"] == pytest.approx(100 / 8)
    assert run.last["step_seconds"] == run.last["seconds_forward"] == pytest.approx(4)
    assert run.last["saved_tokens_share"] == pytest.approx(0.6)
    assert caplog.messages[-1].endswith("2 pairs/s, ETA 3:47")  # 40 s for 3 steps, 17 to go


def test_after_a_resume_only_what_this_process_did_counts(run, caplog):
    run.log.begin()
    run.log.start_clock()
    run.step(1, 1.0)
    run.step(2, 1.0)
    state = run.log.state()
    run.log.resume(2, state, unvalidated=True)
    run.marks.now += 1000  # the validation that is done again, the check of the first forward
    run.log.start_clock()
    run.step(3, 4.0)
    assert run.last["pairs_per_second"] == pytest.approx(8 / 4)
    assert run.last["step_seconds"] == pytest.approx(4)
    assert caplog.messages[-1].endswith("ETA 1:08")  # 17 steps of 4 s


def test_where_the_only_layer_is_idle_no_first_update_is_checked(run):
    run.log.begin()
    run.log.check_first_update({})
    assert run.path.read_text() == ""
    with pytest.raises(RuntimeError, match=r"^no LoRA-B tensor of 1 layers \(such as layer 0\) moved"):
        run.log.check_first_update({"layers.0.q_proj.lora_B.default.weight": 0.0})


def test_lines_wait_for_room_and_then_stand_whole_and_once(small_disk, monkeypatch):
    run = Run(small_disk, monkeypatch)
    run.log.write(1, {"loss": 1.0})
    before = run.path.read_bytes()
    (small_disk / "ballast").write_bytes(bytes(200_000))
    with (small_disk / "rest").open("wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), bytes(512))
    run.log.write(2, {f"loss_{number}": 1.0 for number in range(1000)})
    run.log.write(3, {"loss": 3.0})
    assert run.path.read_bytes() == before  # no half line
    with pytest.raises(OSError):
        run.log.flush()
    (small_disk / "ballast").unlink()
    run.log.write(4, {"loss": 4.0})
    assert [json.loads(line)["step"] for line in run.path.read_text().splitlines()] == [1, 2, 3, 4]
    assert run.log.unwritten == []


def test_before_a_checkpoint_all_lines_that_waited_are_written_and_then_synced(run, monkeypatch):
    run.log.begin()
    tracker = run.log.tracker
    tracker.run_id, synced = "r", {}

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path.name] = path.is_file() and len(path.read_text().splitlines())

    monkeypatch.setattr(os, "fsync", fsync)
    run.log.unwritten.append('{"step": 1}\n')  # refused when it was logged
    tracker._unwritten.append({"time": 1, "metrics": {"loss": 1.0}, "step": 1})
    run.log.save()
    assert run.log.unwritten == tracker._unwritten == []
    assert synced == {"metrics.jsonl": 1, "mlflow-spool.jsonl": 1, "x": False}
