"""`flipkd plan --scaling`: the configured layout at 1 to 1,024 workers, as a table or as JSON."""

from dataclasses import asdict, dataclass, replace
from math import ceil

from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.plan_inputs import (
    chosen_device,
    configured_layout,
    contrast_directions,
    sized_for,
    workload,
    zero_settings,
)
from flipkd_dist.plan_report import title
from flipkd_dist.planner import Layout, Workload
from flipkd_dist.planner_devices import GIB, Device
from flipkd_dist.planner_scaling import ScaledStep, scaled_step
from flipkd_dist.planner_shape import student_shape

VERSION = 1  # of the JSON
WORLDS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Scaling:
    model: str
    kind: str  # weak or strong
    device: Device
    layout: Layout  # at the configured number of workers
    workload: Workload  # likewise
    micro_steps: int
    width: int  # of a read-out and of a teacher's vector
    steps: tuple[ScaledStep, ...]

    def as_dict(self) -> dict:
        lines = [
            asdict(step) | {"efficiency": self.efficiency(step), "bottleneck": step.bottleneck} for step in self.steps
        ]
        return {"version": VERSION, **asdict(self), "steps": lines}

    def efficiency(self, step: ScaledStep) -> float:
        """Pairs a second of one rank, as a share of what the smallest world does."""
        first = self.steps[0]
        return step.pairs_per_s / step.ranks / (first.pairs_per_s / first.ranks)


def make_scaling(
    config: RunConfig,
    kind: str,
    device: str | None = None,
    memory_gib: float | None = None,
    tflops: float | None = None,
    num_workers: int | None = None,
    tokens_per_pair: int | None = None,
    network_gb_s: float | None = None,
) -> Scaling:
    """Predict the configured layout at growing numbers of workers; starts nothing and loads no weights.

    Args:
        kind: "weak" keeps the pairs per device, "strong" the contrast batch of the configured number of workers,
            which only numbers that divide it can share; of a range of workers that of the largest, in its chunks.
        num_workers: what "strong" takes in place of a number `distributed.num_workers`.
    Raises:
        UserError
    """
    is_range = config.distributed.min_workers < config.distributed.max_workers
    if num_workers is not None:
        _check_useful(config, kind, is_range)
    config, workers = sized_for(config, num_workers)
    shape, chosen = student_shape(config), chosen_device(config, device, memory_gib, tflops, network_gb_s)
    layout, work = configured_layout(config, workers), workload(config, chosen, tokens_per_pair, workers)
    contrast_batch, zero = config.contrast_batch_size, zero_settings(config)[layout.stage]
    steps, directions = config.train.gradient_accumulation_steps, contrast_directions(config)
    found = []
    for ranks in WORLDS:
        pairs = work.pairs if kind == "weak" else contrast_batch // ranks
        if kind == "weak" or contrast_batch % ranks == 0:  # or it would be another batch
            most = config.train.chunk_size if is_range else config.train.mini_batch_size or pairs
            chunks = ceil(pairs / most)
            here, batch = replace(layout, world_size=ranks), replace(work, pairs=pairs, chunks=chunks)
            found.append(scaled_step(shape, here, batch, zero, chosen, steps, directions))
    return Scaling(shape.model_type, kind, chosen, layout, work, steps, shape.lora_r, tuple(found))


def _check_useful(config: RunConfig, kind: str, is_range: bool) -> None:
    """Refuse a number of workers that would change nothing."""
    if kind == "weak":
        raise UserError(
            "--num-workers: --scaling weak takes 1 to 1,024 workers by itself: leave it out, or take --scaling strong"
        )
    if is_range:
        raise UserError(
            f"--num-workers: the contrast batch of distributed.num_workers = {config.distributed.num_workers} is that "
            f"of {config.distributed.max_workers} workers, however many run: leave it out"
        )


MS = ("compute", "weights", "gather", "scatter", "matrix", "update", "host", "step")


def table(scaling: Scaling) -> str:
    """For reading: milliseconds of a step, one line a world."""
    work, device = scaling.workload, scaling.device
    kept = f"{work.pairs} pairs a device" if scaling.kind == "weak" else "the contrast batch kept"
    lines = [
        f"{scaling.model}, {title(replace(scaling.layout, world_size=2))}, read-outs of {scaling.width}: "
        f"{scaling.kind} scaling, {kept}, {work.tokens_per_pair} tokens a pair",
        f"{device.name}: {device.per_machine} a machine, {device.link_gb_s:g} GB/s inside it, {device.network_gb_s:g} "
        f"between machines for each device; {device.mfu:.0%} efficiency of products and latencies are assumptions",
        "",
    ]
    header = ["workers", "pairs", "columns", *(f"{name} ms" for name in MS), "pairs/s", "each", "largest"]
    header += ["sent MB", "read-outs MB", "calls", "matrix MB", "peak GiB", "fits"]
    cells = [header, *(_cells(scaling, step) for step in scaling.steps)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines += ["  ".join(map(str.rjust, line, widths)) for line in cells]
    return "\n".join(lines)


def _cells(scaling: Scaling, step: ScaledStep) -> list[str]:
    return [
        *(f"{count}" for count in (step.ranks, step.pairs, step.columns)),
        *(f"{getattr(step, f'{name}_s') * 1e3:.3g}" for name in MS),
        f"{step.pairs_per_s:.0f}",
        f"{scaling.efficiency(step):.0%}",
        step.bottleneck,
        *(f"{count / 1e6:.1f}" for count in (step.weight_bytes, step.gather_bytes + step.scatter_bytes)),
        str(step.collectives),
        f"{step.matrix_bytes / 1e6:.1f}",
        f"{step.peak_bytes / GIB:.1f}",
        "yes" if step.peak_bytes <= scaling.device.usable_bytes else "no",
    ]
