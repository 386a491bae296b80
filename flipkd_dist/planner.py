"""Bytes of tensor storages on one device, by arithmetic alone; the formulas stand in docs/plan.md.

P is the number of LoRA weights, N the number of ranks, T the tokens of a micro-batch.
"""

import math
from dataclasses import asdict, dataclass

from flipkd_dist.planner_shape import Shape

FP32 = 4
BLOCK, SECOND_BLOCK = 64, 256  # weights a scale, scales a second scale


@dataclass(frozen=True)
class Layout:
    """How a student is spread; stage 0 is the whole student in every process."""

    stage: int
    world_size: int = 1
    load_in_4bit: bool = False
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Workload:
    """A micro-batch of one device: one pair a row, which is what packing can only improve on."""

    pairs: int  # of a contrast batch, in all chunks
    tokens_per_pair: int
    value_bytes: int = 2  # of weights and activations: bf16 2, fp32 4
    lora_dropout: float = 0.05
    on_gpu: bool = True  # a GPU keeps a dropout mask in bytes, a CPU in the activation's precision
    double_quant: bool = True
    file_value_bytes: int = 2  # of the weights in the files
    chunks: int = 1  # forwards of a micro-step; more than one run twice, with cached gradients

    @property
    def chunked(self) -> bool:
        return self.chunks > 1

    @property
    def forward_pairs(self) -> int:
        """Of the largest chunk."""
        return math.ceil(self.pairs / self.chunks)

    @property
    def tokens(self) -> int:
        """Of one forward."""
        return self.forward_pairs * self.tokens_per_pair


@dataclass(frozen=True)
class ZeroSettings:
    """The keys of DeepSpeed's `zero_optimization` that decide what is allocated, with its defaults (in elements)."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000

    @property
    def live_limit(self) -> int:
        """Weights that ZeRO-3 keeps gathered until the backward: prefetching runs ahead up to the first limit, and
        what is used again within the second distance, forward and back, is not released."""
        ahead = self.stage3_max_live_parameters if self.stage3_prefetch_bucket_size else 0
        return max(ahead, self.stage3_max_reuse_distance // 2)

    @classmethod
    def of(cls, zero_optimization: dict) -> "ZeroSettings":
        known = {key: value for key, value in zero_optimization.items() if key in cls.__dataclass_fields__}
        known.setdefault("overlap_comm", zero_optimization.get("stage") == 3)
        known["overlap_comm"] = bool(known["overlap_comm"])
        return cls(**{key: int(float(v)) if key.startswith(("stage3", "reduce")) else v for key, v in known.items()})


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, each component at its own largest; `host` is CPU memory that offloading takes."""

    weights: int
    lora: int
    gradients: int
    optimizer: int
    buckets: int
    gather: int
    activations: int
    workspace: int
    host: int
    load_peak: int
    peak: int
    matrix: int = 0  # of the contrast, with the gathered read-outs

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def lora_value_bytes(layout: Layout, work: Workload) -> int:
    """PEFT keeps adapters in fp32; ZeRO-1 and 2 cast the whole module to the run's precision."""
    return work.value_bytes if layout.stage in (1, 2) else FP32


def quant_state(shape: Shape, double_quant: bool) -> int:
    """Bytes of the block scales of all four-bit matrices."""
    blocks = math.ceil(shape.linear / BLOCK)
    return blocks + FP32 * math.ceil(blocks / SECOND_BLOCK) if double_quant else FP32 * blocks


def packed_bytes(shape: Shape) -> int:
    return math.ceil(shape.linear / 2)


def weight_bytes(shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings) -> int:
    """The frozen base: whole below stage 3; there a share, besides small tensors whole and the scales whole."""
    state = quant_state(shape, work.double_quant) if layout.load_in_4bit else 0
    linear = packed_bytes(shape) if layout.load_in_4bit else shape.linear * work.value_bytes
    rest = (shape.kept - shape.linear) * work.value_bytes
    if layout.stage < 3:
        return linear + rest + state
    persistent = sum(size * n for size, n in shape.others.items() if size < zero.stage3_param_persistence_threshold)
    return math.ceil((linear + rest) / layout.world_size) + persistent * work.value_bytes + state


def gather_bytes(shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings) -> tuple[int, int]:
    """ZeRO-3's whole tensors: those alive at once, which is all that the backward needs again up to a limit, and the
    communication buffer in which the group fetched together stands a second time."""
    if layout.stage < 3 or layout.world_size == 1:
        return 0, 0
    threshold = zero.stage3_param_persistence_threshold
    others = sum(size * count for size, count in shape.others.items() if size >= threshold)
    lora = shape.num_layers * sum(size for size in shape.lora_sizes if size >= threshold)
    linear = packed_bytes(shape) if layout.load_in_4bit else shape.linear
    largest = max(shape.largest_linear // (2 if layout.load_in_4bit else 1), *shape.lora_sizes)
    used = linear + others + lora
    total = linear * (1 if layout.load_in_4bit else work.value_bytes) + others * work.value_bytes
    total += lora * lora_value_bytes(layout, work)
    prefetch, limit = zero.stage3_prefetch_bucket_size, zero.live_limit
    live = min(used, limit + largest)
    group = min(used, prefetch + largest) if prefetch else 0
    return max(total * live // used, shape.embedding * work.value_bytes), total * group // used


def layer_activations(shape: Shape, layout: Layout, work: Workload, first: bool = False) -> int:
    """What autograd keeps of one decoder layer; frozen linear layers keep their input under ZeRO-3 only."""
    tokens, value, lora = work.tokens, work.value_bytes, lora_value_bytes(layout, work)
    norm = FP32 if shape.norm_in_fp32 else value
    per_token = norm * (shape.norm_width - (shape.hidden if first else 0))
    keys = shape.query_width if shape.sdpa_repeats_keys else shape.key_width
    per_token += value * (2 * shape.query_width + 2 * keys + shape.rotary_width) + FP32 * shape.num_heads
    per_token += value * shape.intermediate * (3 if shape.gated else 1)
    per_token += _lora_activations(shape, work, lora, first)
    if layout.stage == 3 and not layout.load_in_4bit:
        copy = shape.query_width if shape.copies_attention or shape.eager else 0
        per_token += value * (shape.intermediate + copy + shape.hidden * (1 if first else 2))
    scores = work.forward_pairs * work.tokens_per_pair**2 * value  # the mask, added to the attention's scores
    if shape.eager:
        scores += work.forward_pairs * shape.num_heads * work.tokens_per_pair**2 * (FP32 + value)
    return tokens * per_token + scores


def _lora_activations(shape: Shape, work: Workload, lora: int, first: bool) -> int:
    """Per token: the input of A (after dropout), dropout's mask, the output of A."""
    mask = 1 if work.on_gpu else lora
    total = lora * shape.lora_r * len(shape.targets)
    if work.lora_dropout:
        total += lora * sum(one.inputs for one in shape.targets)
        return total + mask * sum(one.inputs for one in shape.targets if not (first and one.reads_hidden))
    if lora != work.value_bytes:  # every target casts its input for itself
        return total + lora * sum(one.inputs for one in shape.targets)
    shared = max((one.inputs for one in shape.targets if one.reads_hidden), default=0)
    behind = [one.inputs for one in shape.targets if not one.reads_hidden]
    if behind and not (shape.copies_attention or shape.eager):  # the attention keeps its output already
        behind.remove(min(behind, key=lambda width: abs(width - shape.query_width)))
    return total + lora * (shared + sum(behind))


def activation_bytes(shape: Shape, layout: Layout, work: Workload) -> tuple[int, int]:
    """What is kept between forward and backward; and the most in the backward, where checkpointing makes one layer
    anew from its input."""
    layer = layer_activations(shape, layout, work)
    ends = work.tokens * shape.hidden * (FP32 if shape.norm_in_fp32 else work.value_bytes)  # the last norm
    ends += work.forward_pairs * shape.lora_r * FP32 * 6  # read-outs
    ends += work.pairs * shape.lora_r * FP32 * 4 if work.chunked else 0  # those of all chunks and their gradients
    if layout.gradient_checkpointing:
        kept = work.tokens * shape.hidden * work.value_bytes * shape.num_layers + ends
        return kept, kept + layer
    kept = layer_activations(shape, layout, work, first=True) + (shape.num_layers - 1) * layer + ends
    return kept, kept


def workspace_bytes(shape: Shape, layout: Layout, work: Workload) -> int:
    """What the widest operations take besides: gradients inside the MLP, or one four-bit matrix unpacked."""
    stream = 2 * shape.hidden * work.tokens * work.value_bytes
    widest = max(shape.intermediate * (2 if shape.gated else 1), shape.query_width)
    unpacked = shape.largest_linear * work.value_bytes if layout.load_in_4bit else 0
    return stream + max(widest * work.tokens * work.value_bytes, unpacked)


def predict(shape: Shape, layout: Layout, work: Workload, zero: ZeroSettings, matrix: int = 0) -> Memory:
    """Every component and the peak: what stays, and the larger of forward with backward and of the update.

    Args:
        matrix: bytes of the contrast, which stand beside the activations, in chunks between the two passes.
    """
    stage, ranks, value = layout.stage, layout.world_size, work.value_bytes
    lora_value = lora_value_bytes(layout, work)
    share = math.ceil(shape.lora / ranks) if stage else shape.lora
    weights = weight_bytes(shape, layout, work, zero)
    lora = (share if stage == 3 else shape.lora) * lora_value
    if stage == 3 and ranks > 1:
        small = sum(size for size in shape.lora_sizes if size < zero.stage3_param_persistence_threshold)
        lora += small * shape.num_layers * lora_value
    optimizer = share * (2 if stage == 0 else 3) * FP32  # two moments, and DeepSpeed's own fp32 copy
    update = _update_bytes(shape, stage, share)
    gradients, late_gradients = _gradient_bytes(shape, layout, zero, share, lora_value, value)
    buckets = 0
    if stage and (zero.contiguous_gradients or layout.offload_optimizer):
        buckets = zero.reduce_bucket_size * value * (2 if stage < 3 and zero.overlap_comm else 1)
    host = 0
    if layout.offload_optimizer:
        host = optimizer + share * FP32 + share * value + update  # fp32 gradient and a copy in the run's precision
        optimizer = update = 0
        gradients, late_gradients = 2 * shape.largest_lora * value, 0
    passes = (0, 0) if stage == 3 else (buckets, gradients)
    held = 0
    if work.chunked:  # the whole gradient, from the first chunk's backward until all are reduced together
        held, left = shape.lora * lora_value, share * value if stage and not layout.offload_optimizer else 0
        gradients, passes = held + left, (passes[0], left if stage < 3 else 0)
    live, group = gather_bytes(shape, layout, work, zero)
    kept, activations = activation_bytes(shape, layout, work)
    workspace = workspace_bytes(shape, layout, work)
    stays = (buckets, gradients - held) if stage == 3 else (0, 0)
    all_live = group == 0 or _all_stay_live(shape, layout, zero)
    forward = kept + workspace + live + group + held
    backward = max(activations + workspace, passes[1]) + live + (0 if all_live else group) + held
    step = max(forward, passes[0] + backward)
    step = max(step, matrix + live + held) if work.chunked else step + matrix
    return Memory(
        weights=weights,
        lora=lora,
        gradients=gradients,
        optimizer=optimizer,
        buckets=buckets,
        gather=live + group,
        activations=activations,
        workspace=workspace,
        host=host,
        load_peak=load_peak(shape, layout, work, weights),
        peak=weights + lora + optimizer + sum(stays) + max(step, late_gradients + update),
        matrix=matrix,
    )


def _all_stay_live(shape: Shape, layout: Layout, zero: ZeroSettings) -> bool:
    """Whether the backward finds everything gathered."""
    linear = packed_bytes(shape) if layout.load_in_4bit else shape.linear
    return linear + shape.other + shape.lora <= zero.live_limit


def _gradient_bytes(shape, layout, zero, share, lora_value, value) -> tuple[int, int]:
    """At the end of the backward, and during the update besides what is resident."""
    if layout.stage == 0:
        return shape.lora * lora_value, shape.lora * lora_value
    if layout.stage == 1 and not zero.overlap_comm:
        return (shape.lora + share) * value, share * value
    if layout.stage < 3:
        return (share + shape.largest_lora) * value, share * value
    return share * value, 0


def _update_bytes(shape: Shape, stage: int, share: int) -> int:
    """AdamW works on one tensor at a time in the plain engine, under ZeRO on the whole share, its gradient in fp32."""
    return 2 * shape.largest_lora * FP32 if stage == 0 else 3 * share * FP32


def load_peak(shape: Shape, layout: Layout, work: Workload, weights: int) -> int:
    """What stays and LoRA, still whole; or before it what is in work: the output matrix that is dropped and the
    tensor being sharded, or in four bits one part (a decoder layer, the embedding) and the matrix being packed."""
    value, embedding = work.value_bytes, shape.embedding * work.value_bytes
    if not layout.load_in_4bit:
        dropped, largest = shape.output_matrix * value, max(shape.largest_linear, shape.embedding) * value
        working = dropped if layout.stage < 3 else math.ceil(dropped / layout.world_size) + largest
    else:
        packed = packed_bytes(shape) // shape.num_layers if layout.stage == 3 else 0
        largest = shape.largest_linear * work.file_value_bytes
        working = max(packed + largest, embedding if layout.stage == 3 else 0)
    return weights + max(working, shape.lora * FP32)
