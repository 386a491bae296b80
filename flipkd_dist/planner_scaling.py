"""Time and bytes of a step against the number of ranks, by arithmetic alone; the formulas stand in docs/plan.md.

Shapes of the contrast matrix: m pairs of one rank (its rows), n pairs of all ranks (the columns), r the width of a
read-out, d that of a teacher's vector.
"""

from dataclasses import dataclass
from math import ceil, log2

from flipkd_dist.planner import FP32, Layout, Workload, ZeroSettings, predict
from flipkd_dist.planner_devices import Device
from flipkd_dist.planner_shape import Shape
from flipkd_dist.planner_speed import (
    busy_seconds,
    fetched_bytes,
    overlaps,
    readout_bytes,
    update_seconds,
    weight_traffic,
)

# The host's part, measured on one core of an AVX2 processor with `benchmarks/played_rank.py`.
ROW_S, ROW_VALUE_S = 0.25e-6, 1.25e-9  # to look up a vector: for itself, and for each of its numbers
HOST_FLOPS = 5e10
ENTRY_S = 4e-9  # of the matrix: which entries are known to match, kept, negative
# Counted, operation by operation, in losses.py and contrast.py (tests/parity/test_scaling_parity.py).
ENTRY_TOUCHED, VALUE_TOUCHED = 482, 126  # bytes read and written for an entry [m, n], for a value [n, r]
GATHER_TOUCHED = 28  # of a value: padded blocks, joined and cut; their gradient
ROWS_KEPT = 7  # bytes of an entry that the rows hold: the teacher's similarity and three masks
ENTRY_PEAK, VALUE_KEPT, VALUE_PEAK = 47, 4, 20  # bytes at most: by entries in the losses, by values in their backward
SMALL = 3  # all-reduces of a few numbers in an optimizer step: counts, the gradient's norm, the request to stop


@dataclass(frozen=True)
class Matrix:
    """A rank's rows of the contrast matrix in a micro-step."""

    pairs: int
    ranks: int
    width: int
    teacher_width: int
    directions: int = 1  # 2 with loss.mcl_symmetric

    @property
    def columns(self) -> int:
        return self.pairs * self.ranks

    @property
    def entries(self) -> int:
        return self.pairs * self.columns

    @property
    def values(self) -> int:
        return self.columns * self.width

    def host_seconds(self) -> float:
        """Vectors of all texts, their products, the masks; on one core."""
        looked_up = (self.pairs + self.columns) * (ROW_S + ROW_VALUE_S * self.teacher_width)
        product = 2 * self.entries * self.teacher_width / HOST_FLOPS
        return self.directions * (looked_up + product + ENTRY_S * self.entries)

    def flops(self) -> int:
        """Of the cosines: forward, and backward to both sides."""
        return self.directions * 6 * self.entries * self.width

    def device_seconds(self, device: Device) -> float:
        products = self.flops() / (device.fp32_tflops * 1e12 * device.mfu)
        gathered = self.directions * GATHER_TOUCHED * self.values if self.ranks > 1 else 0
        return products + (self.touched() + gathered) / (device.memory_gb_s * 1e9)

    def touched(self) -> int:
        """Bytes that the losses read and write, forward and backward, on both sides of the cosines."""
        values = self.values + self.pairs * self.width
        return self.directions * (ENTRY_TOUCHED * self.entries + VALUE_TOUCHED * values)

    def memory(self) -> int:
        """Bytes on the device at most, the gathered read-outs included."""
        return self.directions * (ROWS_KEPT * self.entries + FP32 * self.values + self.losses_memory())

    def losses_memory(self) -> int:
        """Of them what the losses make themselves: the most is alive in L_MCL or behind the cosines."""
        own = VALUE_KEPT * self.pairs * self.width
        return own + max(ENTRY_PEAK * self.entries + VALUE_KEPT * self.values, VALUE_PEAK * self.values)


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
    host_s: float  # look-up, teacher's products, masks
    step_s: float
    pairs_per_s: float
    weight_bytes: int  # that one device sends, as the next two
    gather_bytes: int
    scatter_bytes: int
    collectives: int
    matrix_bytes: int
    peak_bytes: int

    @property
    def bottleneck(self) -> str:
        """The largest of what is not the student's own computing."""
        parts = {"weights": self.weights_s, "read-outs": self.gather_s + self.scatter_s, "matrix": self.matrix_s}
        parts |= {"host": self.host_s, "update": self.update_s}
        return max(parts, key=parts.get)


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
        return int(layout.stage > 0), SMALL + buckets * (micro_steps if layout.stage == 2 else 1)
    largest = shape.largest_linear // 2 if layout.load_in_4bit else shape.largest_linear  # bytes hold two weights
    group = max(zero.stage3_prefetch_bucket_size, largest / 2) * (1 if layout.load_in_4bit else work.value_bytes)
    fetches = ceil(fetched_bytes(shape, layout, work, zero) / group)
    return micro_steps * (fetches + buckets), SMALL


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
    matrix = Matrix(work.pairs, ranks, shape.lora_r, shape.lora_r, directions)
    weight_bytes = sum(weight_traffic(shape, layout, work, zero, micro_steps))
    rounds, sums = weight_collectives(shape, layout, work, zero, micro_steps)
    sent = micro_steps * directions * readout_bytes(shape, work, ranks)  # forward, and again backward
    times = micro_steps * directions * (ranks > 1)
    compute = busy_seconds(shape, layout, work, device, micro_steps)
    weights = weight_bytes / bandwidth + rounds * ring_latency(ranks, device) + sums * sum_latency(ranks, device)
    gathering = scattering = sent / bandwidth + times * ring_latency(ranks, device)
    on_device, update = micro_steps * matrix.device_seconds(device), update_seconds(shape, layout, work, device)
    host = micro_steps * matrix.host_seconds()
    step = max(compute, weights) if overlaps(layout, zero) else compute + weights
    step = max(step + gathering + scattering + on_device + update, host)
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
        host_s=host,
        step_s=step,
        pairs_per_s=micro_steps * matrix.columns / step,
        weight_bytes=int(weight_bytes),
        gather_bytes=sent,
        scatter_bytes=sent,
        collectives=rounds + sums + 2 * times,
        matrix_bytes=matrix.memory(),
        peak_bytes=predict(shape, layout, work, zero).peak + matrix.memory(),
    )
