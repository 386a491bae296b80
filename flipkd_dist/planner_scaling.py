"""Time and bytes of a step at any number of ranks, by arithmetic alone; the formulas stand in docs/plan.md."""

from dataclasses import dataclass, replace
from math import ceil, log2

from flipkd_dist.planner import Layout, Memory, Workload, ZeroSettings, predict
from flipkd_dist.planner_devices import Device
from flipkd_dist.planner_matrix import Matrix
from flipkd_dist.planner_shape import Shape
from flipkd_dist.planner_speed import (
    busy_seconds,
    fetched_bytes,
    overlaps,
    readout_bytes,
    reductions,
    step_flops,
    update_seconds,
    weight_traffic,
)

LARGEST_SEARCH = 2**20  # pairs of a forward
SMALL = 3  # all-reduces of a few numbers in an optimizer step: counts, the gradient's norm, the request to stop


@dataclass(frozen=True)
class ScaledStep:
    """An optimizer step of one rank among `ranks`; seconds and bytes of all its micro-steps, `matrix_bytes` of one."""

    ranks: int
    pairs: int  # per device and micro-step
    columns: int  # of the contrast matrix
    compute_s: float
    weights_s: float  # weights and gradients on the wire
    gather_s: float  # read-outs, forward
    scatter_s: float  # their gradients, backward
    matrix_s: float
    update_s: float
    host_s: float  # look-up, teacher's products, masks; in chunks some of it while the device waits
    step_s: float
    pairs_per_s: float
    weight_bytes: int  # that one device sends, as the next two
    gather_bytes: int
    scatter_bytes: int
    collectives: int
    matrix_bytes: int
    peak_bytes: int

    @property
    def wire_bytes(self) -> int:
        """What one device sends."""
        return self.weight_bytes + self.gather_bytes + self.scatter_bytes

    @property
    def bottleneck(self) -> str:
        """The largest of what is not the student's own computing."""
        parts = {"weights": self.weights_s, "read-outs": self.gather_s + self.scatter_s, "matrix": self.matrix_s}
        parts |= {"host": self.host_s, "update": self.update_s}
        return max(parts, key=parts.get)


@dataclass(frozen=True)
class Speed:
    """One optimizer step of all workers; mfu counts 4 operations a frozen weight and token, whatever else was done."""

    flops: float  # of one device
    wire_bytes: int  # that one device sends
    step_s: float
    pairs_per_s: float
    tokens_per_s: float
    mfu_4n: float


def ring_latency(ranks: int, device: Device) -> float:
    """Once around: every rank a hop, those between machines the slow ones."""
    machines = ceil(ranks / device.per_machine)
    slow = machines if machines > 1 else 0
    return (ranks - 1 - slow) * device.link_latency_s + slow * device.network_latency_s if ranks > 1 else 0.0


def sum_latency(ranks: int, device: Device) -> float:
    """Of an all-reduce: twice around, or up and down a tree of machines where that is shorter."""
    machines = ceil(ranks / device.per_machine)
    inside = (min(ranks, device.per_machine) - 1) * device.link_latency_s
    tree = 2 * (inside + ceil(log2(machines)) * device.network_latency_s)
    return min(2 * ring_latency(ranks, device), tree)


def weight_collectives(
    shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, micro_steps: int
) -> tuple[int, int]:
    """How many go once around, and how many are all-reduces, in an optimizer step."""
    if layout.world_size == 1:
        return 0, 0
    buckets = ceil(shape.lora / zero.reduce_bucket_size) if zero.reduce_bucket_size else 1
    if layout.stage < 3:
        return int(layout.stage > 0), SMALL + buckets * reductions(layout, work, micro_steps)
    largest = shape.largest_linear // 2 if layout.load_in_4bit else shape.largest_linear  # bytes hold two weights
    ahead = 0 if work.chunked else zero.stage3_prefetch_bucket_size  # chunks fetch a module at a time, as measured
    group = max(ahead, largest / 2) * (1 if layout.load_in_4bit else work.value_bytes)
    fetches = ceil(fetched_bytes(shape, layout, work, zero) / group)
    return micro_steps * fetches + buckets * reductions(layout, work, micro_steps), SMALL


def matrix_of(shape: Shape, layout: Layout, work: Workload, directions: int = 1) -> Matrix:
    """The teacher's vectors are taken to be as wide as the read-outs."""
    return Matrix(work.pairs, layout.world_size, shape.lora_r, shape.lora_r, directions, work.chunked)


def step_memory(shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, directions: int = 1) -> Memory:
    """Bytes on one device, the contrast matrix among them."""
    return predict(shape, layout, work, zero, matrix_of(shape, layout, work, directions).memory())


def largest_batch(
    shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, memory: float, directions: int = 1
) -> int:
    """The most pairs of a forward whose peak stays within `memory` bytes; 0 where not even one does.

    Where the share runs in chunks it is kept, and no forward takes more than all of it; else it is the forward's.
    """
    most = work.pairs if work.chunked else LARGEST_SEARCH

    def fits(pairs: int) -> bool:
        one = replace(work, chunks=ceil(work.pairs / pairs)) if work.chunked else replace(work, pairs=pairs)
        found = step_memory(shape, layout, one, zero, directions)
        return pairs <= most and max(found.peak, found.load_peak) <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def scaled_step(
    shape: Shape,
    layout: Layout,
    work: Workload,
    zero: ZeroSettings,
    device: Device,
    micro_steps: int = 1,
    directions: int = 1,
) -> ScaledStep:
    """A step of `micro_steps` micro-batches on every rank; the host prepares it while the one before computes.

    Args:
        directions: 2 with `loss.mcl_symmetric`.
    """
    ranks, bandwidth = layout.world_size, device.wire_gb_s(layout.world_size) * 1e9
    matrix = matrix_of(shape, layout, work, directions)
    weight_bytes = sum(weight_traffic(shape, layout, work, zero, micro_steps))
    rounds, sums = weight_collectives(shape, layout, work, zero, micro_steps)
    sent = micro_steps * directions * readout_bytes(shape, work, ranks)  # forward, and again backward
    times = micro_steps * directions * (ranks > 1)
    compute = busy_seconds(shape, layout, work, device, micro_steps)
    weights = weight_bytes / bandwidth + rounds * ring_latency(ranks, device) + sums * sum_latency(ranks, device)
    gathering = scattering = sent / bandwidth + times * ring_latency(ranks, device)
    on_device, update = micro_steps * matrix.device_seconds(device), update_seconds(shape, layout, work, device)
    ahead, waited = micro_steps * matrix.counted_seconds(), micro_steps * matrix.waited_seconds()
    step = max(compute, weights) if overlaps(layout, zero) else compute + weights
    step = max(step + gathering + scattering + on_device + waited + update, ahead)
    return ScaledStep(
        ranks=ranks,
        pairs=work.pairs,
        columns=matrix.columns,
        compute_s=compute,
        weights_s=weights,
        gather_s=gathering,
        scatter_s=scattering,
        matrix_s=on_device,
        update_s=update,
        host_s=ahead + waited,
        step_s=step,
        pairs_per_s=micro_steps * matrix.columns / step,
        weight_bytes=int(weight_bytes),
        gather_bytes=sent,
        scatter_bytes=sent,
        collectives=rounds + sums + 2 * times,
        matrix_bytes=matrix.memory(),
        peak_bytes=step_memory(shape, layout, work, zero, directions).peak,
    )


def speed_of(shape: Shape, layout: Layout, work: Workload, device: Device, step: ScaledStep, micro_steps: int) -> Speed:
    """The same step as `plan` reports it."""
    tokens = micro_steps * work.pairs * work.tokens_per_pair
    return Speed(
        flops=step_flops(shape, layout, work, micro_steps),
        wire_bytes=step.wire_bytes,
        step_s=step.step_s,
        pairs_per_s=step.pairs_per_s,
        tokens_per_s=step.pairs_per_s * work.tokens_per_pair,
        mfu_4n=tokens * 4 * shape.linear / (step.step_s * device.tflops(work.value_bytes) * 1e12),
    )
