"""The verb `plan`: every layout of a configuration, which of them fits, and the cheapest one, as a table or as JSON."""

from dataclasses import asdict, dataclass, replace

from flipkd_dist.config import RunConfig
from flipkd_dist.plan_inputs import (
    chosen_device,
    configured_layout,
    contrast_directions,
    layouts,
    left_out,
    sized_for,
    workload,
    zero_settings,
)
from flipkd_dist.planner import Layout, Memory, Workload, ZeroSettings
from flipkd_dist.planner_devices import GIB, Device
from flipkd_dist.planner_scaling import Speed, largest_batch, scaled_step, speed_of, step_memory
from flipkd_dist.planner_shape import Shape, student_shape

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Row:
    """A layout at the configured batch, and the most pairs that it could hold."""

    layout: Layout
    runs: bool  # this package starts it: stage 0 is for one worker, and none of a range
    fits: bool
    largest_pairs: int  # of one forward
    memory: Memory
    speed: Speed

    @classmethod
    def from_dict(cls, value: dict) -> "Row":
        kinds = {"layout": Layout, "memory": Memory, "speed": Speed}
        return cls(**{key: kinds[key](**one) if key in kinds else one for key, one in value.items()})


@dataclass(frozen=True)
class Recommendation:
    layout: Layout | None
    pairs: int
    reason: str


@dataclass(frozen=True)
class Plan:
    model: str
    base_weights: int
    lora_weights: int
    device: Device
    device_is_default: bool
    usable_bytes: int
    workload: Workload
    micro_steps: int
    rows: tuple[Row, ...]
    recommendation: Recommendation
    notes: tuple[str, ...] = ()  # what the figures leave out

    def as_dict(self) -> dict:
        return {"version": VERSION, **asdict(self), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, value: dict) -> "Plan":
        value = {key: one for key, one in value.items() if key != "version"}
        advice = value["recommendation"]
        layout = Layout(**advice["layout"]) if advice["layout"] else None
        return cls(
            **{
                **value,
                "device": Device(**value["device"]),
                "workload": Workload(**value["workload"]),
                "rows": tuple(Row.from_dict(row) for row in value["rows"]),
                "recommendation": Recommendation(**{**advice, "layout": layout}),
                "notes": tuple(value.get("notes", ())),
            }
        )


def make_plan(
    config: RunConfig,
    device: str | None = None,
    memory_gib: float | None = None,
    tflops: float | None = None,
    num_workers: int | None = None,
    tokens_per_pair: int | None = None,
    network_gb_s: float | None = None,
) -> Plan:
    """Predict every layout of the configured student; starts nothing and loads no weights.

    Args:
        device: a name of `planner_devices`; None takes the default, or `cpu` where the run uses no GPU.
        tokens_per_pair: None takes the most that a pair can have: `data.max_length`, for each of two texts alone.
    Raises:
        UserError
    """
    config, workers = sized_for(config, num_workers)
    shape = student_shape(config)
    chosen = chosen_device(config, device, memory_gib, tflops, network_gb_s)
    work = workload(config, chosen, tokens_per_pair, workers)
    settings, steps = zero_settings(config), config.train.gradient_accumulation_steps
    directions, alone = contrast_directions(config), config.distributed.max_workers == 1
    rows = tuple(
        _row(shape, layout, work, settings[layout.stage], chosen, steps, directions, runs=alone or layout.stage > 0)
        for layout in layouts(workers)
    )
    return Plan(
        model=shape.model_type,
        base_weights=shape.kept + shape.output_matrix,
        lora_weights=shape.lora,
        device=chosen,
        device_is_default=device is None,
        usable_bytes=int(chosen.usable_bytes),
        workload=work,
        micro_steps=steps,
        rows=rows,
        recommendation=recommend(rows, config, work, int(chosen.usable_bytes)),
        notes=left_out(config, shape),
    )


def _row(
    shape: Shape,
    layout: Layout,
    work: Workload,
    zero: ZeroSettings,
    device: Device,
    micro_steps: int,
    directions: int,
    runs: bool,
) -> Row:
    memory = step_memory(shape, layout, work, zero, directions)
    step = scaled_step(shape, layout, work, zero, device, micro_steps, directions)
    return Row(
        layout=layout,
        runs=runs,
        fits=max(memory.peak, memory.load_peak) <= device.usable_bytes,
        largest_pairs=largest_batch(shape, layout, work, zero, device.usable_bytes, directions),
        memory=memory,
        speed=speed_of(shape, layout, work, device, step, micro_steps),
    )


def recommend(rows: tuple[Row, ...], config: RunConfig, work: Workload, usable: int) -> Recommendation:
    """The lowest stage that fits as configured; else with as few changes as possible, the dearest last."""
    configured, pairs = configured_layout(config, 0), work.forward_pairs
    batch = f"{pairs} pairs a {'forward' if work.chunked else 'device'}"
    changes = [
        {},
        {"gradient_checkpointing": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "gradient_checkpointing": True},
        {"load_in_4bit": True, "gradient_checkpointing": True, "offload_optimizer": True},
    ]
    for change in changes:
        wanted = replace(configured, **change)
        like = [row for row in rows if row.runs and _modes(row.layout) == _modes(wanted)]
        for row in (one for one in like if one.fits):
            return Recommendation(row.layout, pairs, _reason(row, rows, configured, batch, usable))
    best = max((row for row in rows if row.runs), key=lambda row: row.largest_pairs)
    if best.largest_pairs:
        lowest = next(row for row in rows if row.runs and row.largest_pairs == best.largest_pairs)
        reason = f"no layout holds {batch}; {title(lowest.layout)} holds {best.largest_pairs}, the most"
        return Recommendation(lowest.layout, best.largest_pairs, f"{reason}.")
    least = min((row for row in rows if row.runs), key=lambda row: row.memory.peak)
    return Recommendation(
        None,
        0,
        f"nothing fits: {title(least.layout)} takes the least, {_gib(least.memory.peak)} GiB of {_gib(usable)} usable; "
        "take more workers, a larger device or shorter texts.",
    )


def _modes(layout: Layout) -> tuple[bool, bool, bool]:
    return layout.load_in_4bit, layout.offload_optimizer, layout.gradient_checkpointing


def _reason(row: Row, rows: tuple[Row, ...], configured: Layout, batch: str, usable: int) -> str:
    """One sentence: what it takes, why no lower stage, why not as configured."""
    layout = row.layout
    text = f"{title(layout)}: the lowest stage that fits {batch} takes {_need(row)} of {_gib(usable)} GiB"
    below = [one for one in rows if one.layout.stage == layout.stage - 1 and _modes(one.layout) == _modes(layout)]
    for one in below:
        only = "runs in one process only" if layout.world_size > 1 else "takes no range of workers"
        why = only if one.fits else f"would take {_need(one)}"
        text += f", {title(one.layout)} {why}"
    if _modes(layout) != _modes(configured):
        as_configured = [one for one in rows if one.runs and _modes(one.layout) == _modes(configured)]
        least = min(as_configured, key=lambda one: one.memory.peak)
        text += f", and as configured the least is {_need(least)} ({title(least.layout)})"
    return text + ("; a higher stage would only send more." if layout.stage < 3 else ".")


def _need(row: Row) -> str:
    return _gib(max(row.memory.peak, row.memory.load_peak))


def title(layout: Layout) -> str:
    name = f"ZeRO-{layout.stage}" if layout.stage else "one process" if layout.world_size == 1 else "DDP"
    modes = zip(("4-bit", "offload", "checkpointing"), _modes(layout), strict=True)
    return " + ".join([name, *(mode for mode, on in modes if on)])


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"


COLUMNS = ("weights", "lora", "gradients", "optimizer", "buckets", "gather", "activations", "workspace", "matrix")


def table(plan: Plan) -> str:
    """For reading: GiB per device, one line a layout."""
    work, device = plan.workload, plan.device
    chosen = " (the default: name yours with --device)" if plan.device_is_default and device.is_gpu else ""
    chunks = f" in {work.chunks} chunks" if work.chunked else ""
    workers = plan.rows[0].layout.world_size
    lines = [
        f"{plan.model}: {plan.base_weights / 1e9:.3f} B frozen weights, {plan.lora_weights / 1e6:.1f} M of LoRA "
        f"({plan.lora_weights / (plan.base_weights + plan.lora_weights):.2%})",
        f"{workers} x {device.name}{chosen}: {device.memory_gib:g} GiB, {_gib(plan.usable_bytes)} usable; "
        f"{'bf16' if work.value_bytes == 2 else 'fp32'}, {work.pairs} pairs a device and micro-step{chunks}, "
        f"{work.tokens_per_pair} tokens a pair, none of them shared",
        f"speed: {device.tflops(work.value_bytes):g} TFLOP/s at {device.mfu:.0%} efficiency, an assumption; "
        "4N operations a token",
        "",
    ]
    header = ["GiB per device", *COLUMNS, "PEAK", "load", "host", "fits", "pairs", "wire", "step s", "pairs/s", "tok/s"]
    cells = [header]
    for row in plan.rows:
        memory, speed = row.memory, row.speed
        cells.append(
            [
                title(row.layout),
                *(_gib(getattr(memory, name)) for name in (*COLUMNS, "peak", "load_peak", "host")),
                "yes" if row.fits and row.runs else "no" if row.runs else "(yes)" if row.fits else "(no)",
                str(row.largest_pairs),
                _gib(speed.wire_bytes),
                f"{speed.step_s:.3g}",
                f"{speed.pairs_per_s:.3g}",
                f"{speed.tokens_per_s:.0f}",
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    for line in cells:
        lines.append("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))
    if not all(row.runs for row in plan.rows):
        name = "DDP" if workers > 1 else "one process"
        why = "on one worker" if workers > 1 else "with no range of workers"
        lines += ["", f"(yes), (no): {name} is for comparison, this package trains without DeepSpeed {why}"]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join([*lines, "", f"recommended: {plan.recommendation.reason}"])
