"""The contrast matrix's time and bytes against the number of ranks, by hand; and what must follow at any size."""

from dataclasses import replace

import pytest
from test_planner import BF16, FP32, NO_BUCKET, SHAPE

from flipkd_dist.planner import Layout, predict
from flipkd_dist.planner_devices import Device
from flipkd_dist.planner_scaling import (
    ENTRY_S,
    HOST_FLOPS,
    ROW_S,
    ROW_VALUE_S,
    Matrix,
    ring_latency,
    scaled_step,
    sum_latency,
    weight_collectives,
)
from flipkd_dist.planner_speed import predict_speed, wire_bytes

DEVICE = Device("toy", 1, 1, 0.5, 10, 4, 1, per_machine=4, link_latency_s=1.0, network_latency_s=10.0)
# So slow that the host is never waited for, and without latencies.
SLOW = Device("slow", 1, 1e-4, 1e-4, 1e-3, 1e-3, 5e-4, per_machine=4, link_latency_s=0.0, network_latency_s=0.0)
MATRIX = Matrix(pairs=3, ranks=4, width=2, teacher_width=5)  # 12 columns, 36 entries, 24 values


def test_the_matrix_by_hand():
    assert (MATRIX.columns, MATRIX.entries, MATRIX.values) == (12, 36, 24)
    assert MATRIX.flops() == 6 * 36 * 2
    host = 15 * (ROW_S + 5 * ROW_VALUE_S) + 2 * 36 * 5 / HOST_FLOPS + 36 * ENTRY_S
    assert MATRIX.host_seconds() == pytest.approx(host)
    device = 6 * 36 * 2 / (0.5e12 * 0.4) + (482 * 36 + 126 * (24 + 6) + 28 * 24) / 10e9
    assert MATRIX.device_seconds(DEVICE) == pytest.approx(device)
    assert MATRIX.memory() == 7 * 36 + 4 * 24 + 4 * 6 + max(47 * 36 + 4 * 24, 20 * 24)
    wide = replace(MATRIX, width=1000)
    assert wide.memory() == 7 * 36 + 4 * 12_000 + 4 * 3000 + 20 * 12_000
    both = replace(MATRIX, directions=2)
    for part in ("host_seconds", "flops", "memory"):
        assert getattr(both, part)() == pytest.approx(2 * getattr(MATRIX, part)())


def test_nothing_is_gathered_by_one_rank():
    alone = replace(MATRIX, ranks=1)
    assert alone.device_seconds(DEVICE) == pytest.approx(6 * 9 * 2 / 0.2e12 + (482 * 9 + 126 * 12) / 10e9)


def test_latencies_by_hand():
    assert ring_latency(1, DEVICE) == sum_latency(1, DEVICE) == 0
    assert ring_latency(4, DEVICE) == 3 and sum_latency(4, DEVICE) == 6
    # Three machines: of eleven hops three lead from one to the next.
    assert ring_latency(12, DEVICE) == (12 - 1 - 3) * 1 + 3 * 10
    assert sum_latency(12, DEVICE) == 2 * (3 * 1 + 2 * 10)  # a tree of three machines is two deep


def test_collectives_by_hand():
    bucket = replace(NO_BUCKET, reduce_bucket_size=100)  # LoRA has 224 weights: three buckets
    count = lambda stage, zero=bucket, ranks=2, steps=2: weight_collectives(  # noqa: E731
        SHAPE, Layout(stage, ranks), BF16, zero, steps
    )
    assert count(3, ranks=1) == (0, 0)
    assert count(0) == (0, 3 + 3) and count(1) == (1, 3 + 3) and count(2) == (1, 3 + 6)
    assert count(3) == (2 * (1 + 3), 3)  # everything comes with the first fetch
    few = replace(bucket, stage3_prefetch_bucket_size=200, stage3_max_live_parameters=0, stage3_max_reuse_distance=0)
    fetched = 2 * (1152 * 2 + 40 * 2 + 224 * 4) + 800 * 2 - 800 * 2  # the window holds the embedding alone
    assert count(3, few, steps=1) == (-(-fetched // 400) + 3, 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_parts_are_those_of_the_plan(stage):
    layout = Layout(stage, 4)
    step = scaled_step(SHAPE, layout, BF16, NO_BUCKET, SLOW, micro_steps=3)
    sent = step.weight_bytes + step.gather_bytes + step.scatter_bytes
    assert sent == pytest.approx(wire_bytes(SHAPE, layout, BF16, NO_BUCKET, 3), abs=2)
    matrix = Matrix(3, 4, 2, 2)
    assert step.peak_bytes == predict(SHAPE, layout, BF16, NO_BUCKET).peak + matrix.memory()
    assert step.host_s == pytest.approx(3 * matrix.host_seconds())
    planned = predict_speed(SHAPE, layout, BF16, NO_BUCKET, SLOW, 3).step_s
    assert step.step_s == pytest.approx(planned + step.matrix_s)
    assert step.pairs_per_s == pytest.approx(3 * 12 / step.step_s)


def test_latency_counts_once_a_collective():
    layout, quick = Layout(1, 8), replace(DEVICE, link_latency_s=0.0, network_latency_s=0.0)
    with_latency, without = (scaled_step(SHAPE, layout, BF16, NO_BUCKET, one, 3) for one in (DEVICE, quick))
    around, summed = ring_latency(8, DEVICE), sum_latency(8, DEVICE)
    assert with_latency.gather_s - without.gather_s == pytest.approx(3 * around)
    assert with_latency.scatter_s - without.scatter_s == pytest.approx(3 * around)
    assert with_latency.weights_s - without.weights_s == pytest.approx(around + 4 * summed)
    assert with_latency.collectives == 1 + 4 + 2 * 3


def test_weights_hide_behind_computing_where_they_overlap_and_the_host_behind_the_rest():
    zero = replace(NO_BUCKET, overlap_comm=True)
    one_by_one, together = (scaled_step(SHAPE, Layout(2, 4), FP32, settings, SLOW) for settings in (NO_BUCKET, zero))
    hidden = min(one_by_one.compute_s, one_by_one.weights_s)
    assert one_by_one.step_s - together.step_s == pytest.approx(hidden) and hidden > 0
    slow_host = scaled_step(
        SHAPE, Layout(1, 1024), FP32, NO_BUCKET, replace(DEVICE, link_latency_s=0.0, network_latency_s=0.0)
    )
    assert slow_host.step_s == slow_host.host_s and slow_host.bottleneck == "host"


def test_two_directions_gather_and_compute_twice():
    one, two = (scaled_step(SHAPE, Layout(1, 4), FP32, NO_BUCKET, DEVICE, directions=count) for count in (1, 2))
    for part in ("gather_s", "scatter_s", "gather_bytes", "scatter_bytes", "matrix_s", "host_s", "matrix_bytes"):
        assert getattr(two, part) == pytest.approx(2 * getattr(one, part)), part
    assert two.weight_bytes == one.weight_bytes
