"""Time of an optimizer step and bytes on the wire, by arithmetic alone; the formulas stand in docs/plan.md.

N is the number of frozen weights in linear layers, P that of LoRA's, R the number of ranks.
"""

from dataclasses import dataclass

from flipkd_dist.planner import FP32, Layout, Workload, ZeroSettings, gather_bytes, lora_value_bytes, packed_bytes
from flipkd_dist.planner_devices import Device
from flipkd_dist.planner_shape import Shape

HOST_GB_S = 20.0  # between a device and its host, and the host's AdamW
ADAMW_BYTES = 28  # fp32 gradient read, weight and two moments read and written


@dataclass(frozen=True)
class Speed:
    """One optimizer step of all workers; mfu counts 4 operations a frozen weight and token, whatever else was done."""

    flops: float  # of one device
    wire_bytes: int  # that one device sends
    step_s: float
    pairs_per_s: float
    tokens_per_s: float
    mfu_4n: float


def flops_per_token(shape: Shape, length: int, checkpointing: bool) -> float:
    """2N forward and 2N for the gradient of the input, 6P, and the attention; with checkpointing one forward more."""
    attention = 4 * length * shape.query_width * shape.num_layers  # of a forward: scores and sums over all keys
    forward = 2 * shape.linear + 2 * shape.lora + attention
    backward = 2 * shape.linear + 4 * shape.lora + 2 * attention
    return forward * (2 if checkpointing else 1) + backward


def readout_bytes(shape: Shape, work: Workload, ranks: int) -> int:
    """What one device sends of second texts' read-outs in a micro-step, and again of their gradients backward."""
    return (ranks - 1) * work.pairs * shape.lora_r * FP32


def weight_traffic(
    shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, micro_steps: int = 1
) -> tuple[float, float]:
    """What one device sends of weights and of gradients in an optimizer step; rings everywhere."""
    ring = (layout.world_size - 1) / layout.world_size
    lora = shape.lora * (FP32 if layout.stage == 0 else work.value_bytes)
    if layout.stage < 3:
        return ring * lora if layout.stage else 0, 2 * ring * lora * (micro_steps if layout.stage == 2 else 1)
    return micro_steps * ring * fetched_bytes(shape, layout, work, zero), micro_steps * ring * lora


def fetched_bytes(shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings) -> float:
    """Whole tensors that ZeRO-3 puts together in a micro-step: forward, and what the backward finds released."""
    linear = packed_bytes(shape) if layout.load_in_4bit else shape.linear * work.value_bytes
    whole = linear + shape.other * work.value_bytes + shape.lora * lora_value_bytes(layout, work)
    window = min(whole, gather_bytes(shape, layout, work, zero)[0])
    # With checkpointing the recomputation fetches what the backward then uses.
    return 2 * whole - window + shape.embedding * work.value_bytes


def wire_bytes(shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, micro_steps: int = 1) -> int:
    """What one device sends in an optimizer step."""
    readouts = 2 * readout_bytes(shape, work, layout.world_size)
    return int(sum(weight_traffic(shape, layout, work, zero, micro_steps)) + micro_steps * readouts)


def busy_seconds(shape: Shape, layout: Layout, work: Workload, device: Device, micro_steps: int = 1) -> float:
    """A device's time in forward and backward of the student."""
    flops = micro_steps * work.tokens * flops_per_token(shape, work.tokens_per_pair, layout.gradient_checkpointing)
    passes = micro_steps * (3 if layout.gradient_checkpointing else 2)
    bandwidth = device.memory_gb_s * 1e9
    peak = device.tflops(work.value_bytes) * 1e12
    busy = max(flops / (peak * device.mfu), passes * shape.linear * work.value_bytes / bandwidth)
    if layout.load_in_4bit:
        rate = device.unpack_per_s or bandwidth / (0.5 + work.value_bytes)
        busy += passes * shape.linear / rate
    return busy


def update_seconds(shape: Shape, layout: Layout, work: Workload, device: Device) -> float:
    """The optimizer's own time."""
    share = shape.lora / (layout.world_size if layout.stage else 1)
    if layout.offload_optimizer:
        return share * (ADAMW_BYTES + FP32 + work.value_bytes) / (HOST_GB_S * 1e9)
    return share * ADAMW_BYTES / (device.memory_gb_s * 1e9)


def predict_speed(
    shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, device: Device, micro_steps: int = 1
) -> Speed:
    """A step of `micro_steps` micro-batches on every rank."""
    ranks, tokens = layout.world_size, micro_steps * work.tokens
    busy = busy_seconds(shape, layout, work, device, micro_steps)
    wire = wire_bytes(shape, layout, work, zero, micro_steps)
    sending = wire / (device.wire_gb_s(ranks) * 1e9)
    step = max(busy, sending) if overlaps(layout, zero) else busy + sending
    step += update_seconds(shape, layout, work, device)
    return Speed(
        flops=tokens * flops_per_token(shape, work.tokens_per_pair, layout.gradient_checkpointing),
        wire_bytes=wire,
        step_s=step,
        pairs_per_s=ranks * micro_steps * work.pairs / step,
        tokens_per_s=ranks * tokens / step,
        mfu_4n=tokens * 4 * shape.linear / (step * device.tflops(work.value_bytes) * 1e12),
    )


def overlaps(layout: Layout, zero: ZeroSettings) -> bool:
    """Whether weights and gradients are sent while the device computes."""
    return zero.overlap_comm and layout.stage >= 2
