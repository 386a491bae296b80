"""Time of an optimizer step and bytes on the wire, by arithmetic alone; the formulas stand in docs/plan.md.

N is the number of frozen weights in linear layers, P that of LoRA's, R the number of ranks.
"""

from flipkd_dist.planner import FP32, Layout, Workload, ZeroSettings, gather_bytes, lora_value_bytes, packed_bytes
from flipkd_dist.planner_devices import Device
from flipkd_dist.planner_shape import Shape

HOST_GB_S = 20.0  # between a device and its host, and the host's AdamW
ADAMW_BYTES = 28  # fp32 gradient read, weight and two moments read and written


def forwards(layout: Layout, work: Workload) -> int:
    """Of every pair: checkpointing makes one anew, chunks run one without gradient before."""
    return 1 + layout.gradient_checkpointing + work.chunked


def flops_per_token(shape: Shape, length: int, num_forwards: int) -> float:
    """2N for each forward and 2N for the gradient of the input, 2P and 4P, and the attention."""
    attention = 4 * length * shape.query_width * shape.num_layers  # of a forward: scores and sums over all keys
    forward = 2 * shape.linear + 2 * shape.lora + attention
    backward = 2 * shape.linear + 4 * shape.lora + 2 * attention
    return num_forwards * forward + backward


def readout_bytes(shape: Shape, work: Workload, ranks: int) -> int:
    """What one device sends of second texts' read-outs in a micro-step, and again of their gradients backward."""
    return (ranks - 1) * work.pairs * shape.lora_r * FP32


def reductions(layout: Layout, work: Workload, micro_steps: int) -> int:
    """How often an optimizer step reduces the gradients over ranks; chunks do so together."""
    return micro_steps if layout.stage >= 2 and not work.chunked else 1


def weight_traffic(
    shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, micro_steps: int = 1
) -> tuple[float, float]:
    """What one device sends of weights and of gradients in an optimizer step; rings everywhere."""
    ring = (layout.world_size - 1) / layout.world_size
    lora = shape.lora * (FP32 if layout.stage == 0 else work.value_bytes)
    reduced = ring * lora * reductions(layout, work, micro_steps)
    if layout.stage < 3:
        return ring * lora if layout.stage else 0, 2 * reduced
    return micro_steps * ring * fetched_bytes(shape, layout, work, zero), reduced


def fetched_bytes(shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings) -> float:
    """Whole tensors that ZeRO-3 puts together in a micro-step: forward, and what the backward finds released.

    In chunks nothing stays (measured: tests/parity/test_scaling_parity.py): each of them fetches everything for its
    forward without gradient, for the one with it, and for the backward.
    """
    linear = packed_bytes(shape) if layout.load_in_4bit else shape.linear * work.value_bytes
    whole = linear + shape.other * work.value_bytes + shape.lora * lora_value_bytes(layout, work)
    embedding = shape.embedding * work.value_bytes
    if work.chunked:
        return work.chunks * (3 * whole + embedding)
    window = min(whole, gather_bytes(shape, layout, work, zero)[0])
    # With checkpointing the recomputation fetches what the backward then uses.
    return 2 * whole - window + embedding


def step_flops(shape: Shape, layout: Layout, work: Workload, micro_steps: int = 1) -> float:
    """Operations of one device in forward and backward of the student."""
    tokens = micro_steps * work.pairs * work.tokens_per_pair
    return tokens * flops_per_token(shape, work.tokens_per_pair, forwards(layout, work))


def busy_seconds(shape: Shape, layout: Layout, work: Workload, device: Device, micro_steps: int = 1) -> float:
    """A device's time in forward and backward of the student."""
    flops = step_flops(shape, layout, work, micro_steps)
    passes = micro_steps * work.chunks * (forwards(layout, work) + 1)
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


def overlaps(layout: Layout, zero: ZeroSettings) -> bool:
    """Whether weights and gradients are sent while the device computes."""
    return zero.overlap_comm and layout.stage >= 2
