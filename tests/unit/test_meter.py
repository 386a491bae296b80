"""The arithmetic of what a run measures, and that its N is the planner's."""

import re
from pathlib import Path

import pytest
import torch
from test_phases import ScriptedMarks, one_step
from tiny import save_student, started_student

from flipkd_dist import meter as meter_module
from flipkd_dist.config import StudentConfig
from flipkd_dist.meter import Meter, linear_weights, peak_memory_gib, peak_tflops
from flipkd_dist.phases import ASIDE, PHASES, PhaseClock
from flipkd_dist.planner_devices import DEVICES, DRIVER_NAMES, GIB, device_of_driver
from flipkd_dist.planner_shape import shape_of
from flipkd_dist.world import World


def measured(rank: int, tokens: list[float], extra: float = 0.0):
    """What one of two ranks takes after two steps of 10 pairs; `extra` seconds of communication, 100 s aside."""
    marks = ScriptedMarks()
    meter = Meter(World(rank, 2), PhaseClock(marks), 10**9, torch.float32)
    marks.now += 1000
    meter.add(999, 999)
    meter.start()
    for count in tokens:
        one_step(meter.clock, marks)
        meter.add(10, count)
        with meter.clock(ASIDE):
            marks.now += 100
    with meter.clock("communication"):
        marks.now += extra
    return meter, meter.take()


def test_values_over_ranks(monkeypatch):
    peaks = iter([2.0, 5.0])
    monkeypatch.setattr(meter_module, "peak_memory_gib", lambda _: next(peaks))
    (meter, one), (_, other) = measured(0, [100, 140]), measured(1, [60, 80], extra=4.0)
    values = meter.values(one + other)
    elapsed = 2 * 63 + 2  # a step takes 63 s; the mean of 0 and 4 more
    assert values == pytest.approx(
        {
            "pairs_per_second": 20 / elapsed,
            "tokens_per_second": 380 / elapsed,
            "tflops_4n": 4 * 10**9 * 190 / elapsed / 1e12,  # of one device
            "step_seconds": 64,
            "seconds_data": 1,
            "seconds_forward": 2,
            "seconds_loss": 4,
            "seconds_communication": 9,
            "seconds_backward": 16,
            "seconds_optimizer": 0,
            "seconds_other": 32,
            "peak_memory_gib": 5.0,
        }
    )
    assert sum(values[f"seconds_{phase}"] for phase in PHASES) == pytest.approx(values["step_seconds"])


def test_a_window_begins_where_the_last_one_ended():
    meter, _ = measured(0, [100, 140])
    assert meter.take()[:3].tolist() == [0, 0, 0]


def test_mfu_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr(meter_module, "peak_tflops", lambda *_: 0.5)
    meter, own = measured(0, [100, 140])
    values = meter.values(own)
    assert values["mfu_4n"] == pytest.approx(values["tflops_4n"] / 0.5)


def test_the_peak_is_that_of_the_device_and_dtype(monkeypatch, caplog):
    assert peak_tflops(torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert peak_tflops(torch.device("cuda"), torch.bfloat16) == DEVICES["h200"].bf16_tflops
    assert peak_tflops(torch.device("cuda"), torch.float32) == DEVICES["h200"].fp32_tflops
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10G")
    with caplog.at_level("INFO", logger="flipkd_dist"):
        assert peak_tflops(torch.device("cuda"), torch.bfloat16) is None
    assert "mfu_4n, mfu_6n" in caplog.text and "A10G" in caplog.text


def test_every_gpu_of_the_planner_has_a_name():
    assert {device_of_driver(name).name for name in DRIVER_NAMES} == DEVICES.keys() - {"cpu"}
    assert device_of_driver("NVIDIA H100 PCIe") is None


@pytest.mark.parametrize("family", ["glm", "glm4", "qwen2", "llama", "glm_original"])
def test_linear_weights_are_the_planners(tmp_path, family):
    folder = save_student(tmp_path, family)
    settings = StudentConfig(model_name_or_path=str(folder))
    expected = shape_of(folder, settings, 8).linear
    student, _ = started_student(folder)
    assert linear_weights(student) == expected > 0


def test_peak_memory_is_the_most_there_was():
    status = Path("/proc/self/status").read_text()
    resident = int(re.search(r"VmRSS:\s*(\d+)", status).group(1)) * 2**10
    before = peak_memory_gib(torch.device("cpu")) * GIB
    assert 0 < resident < before * 1.01
    held = torch.ones(int(before - resident) + 2**27, dtype=torch.uint8)
    after = peak_memory_gib(torch.device("cpu")) * GIB
    del held
    assert after > before + 2**26
    assert peak_memory_gib(torch.device("cpu")) * GIB > 0.99 * after  # the kernel counts pages in batches


def test_peak_memory_where_the_kernel_does_not_tell(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "Name: python")
    assert peak_memory_gib(torch.device("cpu")) > 0
