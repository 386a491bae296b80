"""The contrast matrix's time and bytes against the number of ranks, by hand; and what must follow at any size."""

from dataclasses import replace

import pytest
from test_planner import BF16, FP32, NO_BUCKET, SHAPE

from flipkd_dist.chunks import BLOCK_ENTRIES
from flipkd_dist.planner import Layout, activation_bytes, predict
from flipkd_dist.planner_devices import Device
from flipkd_dist.planner_matrix import ENTRY_S, HOST_FLOPS, ROW_S, ROW_VALUE_S, Matrix
from flipkd_dist.planner_scaling import (
    largest_batch,
    ring_latency,
    scaled_step,
    step_memory,
    sum_latency,
    weight_collectives,
)
from flipkd_dist.planner_speed import busy_seconds, update_seconds, weight_traffic

DEVICE = Device("toy", 1, 1, 0.5, 10, 4, 1, per_machine=4, link_latency_s=1.0, network_latency_s=10.0)
# So slow that the host is never waited for, and without latencies.
SLOW = Device("slow", 1, 1e-4, 1e-4, 1e-3, 1e-3, 5e-4, per_machine=4, link_latency_s=0.0, network_latency_s=0.0)
MATRIX = Matrix(pairs=3, ranks=4, width=2, teacher_width=5)  # 12 columns, 36 entries, 24 values


def test_the_matrix_by_hand():
    assert (MATRIX.columns, MATRIX.entries, MATRIX.values) == (12, 36, 24)
    assert MATRIX.flops() == 6 * 36 * 2
    host = 15 * (ROW_S + 5 * ROW_VALUE_S) + 2 * 36 * 5 / HOST_FLOPS + 36 * ENTRY_S
    assert MATRIX.host_seconds() == pytest.approx(host)
    device = 6 * 36 * 2 / (0.5e12 * 0.4) + (504 * 36 + 126 * (24 + 6) + 28 * 24) / 10e9
    assert MATRIX.device_seconds(DEVICE) == pytest.approx(device)
    assert MATRIX.memory() == 7 * 36 + 4 * 24 + 4 * 6 + max(44 * 36 + 4 * 24, 20 * 24)
    wide = replace(MATRIX, width=1000)
    assert wide.memory() == 7 * 36 + 4 * 12_000 + 4 * 3000 + 20 * 12_000
    both = replace(MATRIX, directions=2)
    for part in ("host_seconds", "flops", "memory"):
        assert getattr(both, part)() == pytest.approx(2 * getattr(MATRIX, part)())


def test_nothing_is_gathered_by_one_rank():
    alone = replace(MATRIX, ranks=1)
    assert alone.device_seconds(DEVICE) == pytest.approx(6 * 9 * 2 / 0.2e12 + (504 * 9 + 126 * 12) / 10e9)


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
    weights, readouts = sum(weight_traffic(SHAPE, layout, BF16, NO_BUCKET, 3)), 3 * 3 * 3 * 2 * 4
    assert (step.weight_bytes, step.gather_bytes, step.scatter_bytes) == (int(weights), readouts, readouts)
    assert step.wire_bytes == int(weights) + 2 * readouts
    matrix = Matrix(3, 4, 2, 2)
    assert step.peak_bytes == predict(SHAPE, layout, BF16, NO_BUCKET).peak + matrix.memory()
    assert step.host_s == pytest.approx(3 * matrix.host_seconds())
    planned = busy_seconds(SHAPE, layout, BF16, SLOW, 3) + update_seconds(SHAPE, layout, BF16, SLOW)
    planned += step.wire_bytes / (SLOW.wire_gb_s(4) * 1e9)
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


# 600 x 4 columns and 64 rows of them a block; 7 forwards of at most 86 pairs.
CHUNKED = replace(BF16, pairs=600, chunks=7)


def test_the_matrix_in_blocks_by_hand():
    whole, blocks = Matrix(600, 4, 2, 5), Matrix(600, 4, 2, 5, in_blocks=True)
    assert (blocks.block_rows, blocks.blocks) == (64, 10) and BLOCK_ENTRIES // 2400 == 54
    assert blocks.flops() == whole.flops()
    assert blocks.touched() - whole.touched() == 9 * 126 * 4800  # every block brings all columns to length 1
    assert blocks.host_seconds() - whole.host_seconds() == pytest.approx(9 * 2400 * (ROW_S + 5 * ROW_VALUE_S))
    assert blocks.memory() == (7 + 44) * 64 * 2400 + (4 + 4 + 4) * 4800 + 4 * 1200
    assert (whole.counted_seconds(), whole.waited_seconds()) == (whole.host_seconds(), 0)
    assert blocks.counted_seconds() == blocks.waited_seconds() == blocks.host_seconds()
    both = replace(blocks, directions=2)
    assert both.counted_seconds() == blocks.counted_seconds() and both.waited_seconds() == 2 * blocks.waited_seconds()
    assert replace(blocks, pairs=3).blocks == 1 and replace(blocks, ranks=1).block_rows == BLOCK_ENTRIES // 600


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_run_a_forward_more(checkpointing):
    layout = Layout(1, 4, gradient_checkpointing=checkpointing)
    whole, chunked = (scaled_step(SHAPE, layout, work, NO_BUCKET, SLOW) for work in (replace(BF16, pairs=600), CHUNKED))
    forward = 2 * 1152 + 2 * 224 + 4 * 5 * 8 * 2
    assert chunked.compute_s - whole.compute_s == pytest.approx(600 * 5 * forward / (1e-4 * 1e12 * 0.4))
    assert (chunked.pairs, chunked.columns, chunked.gather_bytes) == (whole.pairs, whole.columns, whole.gather_bytes)
    matrix = Matrix(600, 4, 2, 2, in_blocks=True)
    assert chunked.host_s == pytest.approx(2 * matrix.host_seconds())
    parts = ("compute_s", "weights_s", "gather_s", "scatter_s", "matrix_s", "update_s")
    waited = matrix.waited_seconds()  # the blocks are made while the device waits
    assert chunked.step_s == pytest.approx(sum(getattr(chunked, part) for part in parts) + waited)
    slow_memory = replace(DEVICE, memory_gb_s=1e-6)  # every pass reads the weights
    busy = busy_seconds(SHAPE, layout, CHUNKED, slow_memory)
    assert busy == pytest.approx(7 * (4 if checkpointing else 3) * 1152 * 2 / 1e3)


def test_chunks_fetch_for_every_forward_and_reduce_once():
    fetched = 3 * (1152 * 2 + 40 * 2 + 224 * 4) + 1600
    weights, gradients = weight_traffic(SHAPE, Layout(3, 2), CHUNKED, NO_BUCKET, 2)
    assert weights == 2 * 7 * fetched / 2 and gradients == 224 * 2 / 2
    assert weight_traffic(SHAPE, Layout(2, 2), CHUNKED, NO_BUCKET, 2) == (224, 448)
    bucket = replace(NO_BUCKET, reduce_bucket_size=100)
    assert weight_collectives(SHAPE, Layout(2, 2), CHUNKED, bucket, 2) == (1, 3 + 3)
    fetches = -(-7 * fetched // 128)  # half of the largest matrix, in bf16
    assert weight_collectives(SHAPE, Layout(3, 2), CHUNKED, bucket, 2) == (2 * fetches + 3, 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_chunks_take_the_activations_of_one_and_the_whole_gradient(stage):
    layout = Layout(stage, 4)
    found, one = (predict(SHAPE, layout, work, NO_BUCKET) for work in (CHUNKED, replace(BF16, pairs=86)))
    readouts = 600 * 2 * 4 * 4  # of both sides and their gradients
    assert found.activations == one.activations + readouts == activation_bytes(SHAPE, layout, CHUNKED)[1]
    value = 2 if stage in (1, 2) else 4
    assert found.gradients == value * 224 + (2 * 56 if stage else 0)
    held = 4 * 224 if stage == 0 else value * 224
    assert found.peak - one.peak == pytest.approx(readouts + held, abs=1)
    # The matrix comes when the activations are gone.
    assert step_memory(SHAPE, layout, CHUNKED, NO_BUCKET).matrix > found.activations
    beside = predict(SHAPE, layout, CHUNKED, NO_BUCKET, matrix=found.activations // 2)
    assert beside.peak == found.peak
    large = predict(SHAPE, layout, CHUNKED, NO_BUCKET, matrix=10**9).peak
    assert large + 1000 == predict(SHAPE, layout, CHUNKED, NO_BUCKET, matrix=10**9 + 1000).peak > 10**9


def test_the_largest_forward_of_a_share():
    layout = Layout(1, 4)
    matrix = step_memory(SHAPE, layout, CHUNKED, NO_BUCKET).peak
    assert largest_batch(SHAPE, layout, CHUNKED, NO_BUCKET, 1e12) == 600
    work = replace(CHUNKED, tokens_per_pair=500)
    most = largest_batch(SHAPE, layout, work, NO_BUCKET, 2 * matrix)
    assert 0 < most < 600
    peaks = [
        step_memory(SHAPE, layout, replace(work, chunks=-(-600 // pairs)), NO_BUCKET).peak for pairs in (most, most + 1)
    ]
    assert peaks[0] <= 2 * matrix < peaks[1]
