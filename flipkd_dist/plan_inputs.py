"""What a configuration asks of the planner: device, share of a contrast batch, layouts, DeepSpeed's sizes."""

from itertools import product
from math import ceil

from flipkd_dist.config import RunConfig
from flipkd_dist.ds_config import read_policy
from flipkd_dist.errors import UserError
from flipkd_dist.planner import Layout, Workload, ZeroSettings
from flipkd_dist.planner_devices import DEFAULT, Device, find_device
from flipkd_dist.planner_shape import Shape


def sized_for(config: RunConfig, num_workers: int | None) -> tuple[RunConfig, int]:
    """The configuration to plan, and by how many workers it runs.

    In place of a number of workers `num_workers` is another one, with as many pairs a device; of a range it is one of
    those that may run, and the contrast batch stays that of the largest.

    Raises:
        UserError: outside the range.
    """
    distributed = config.distributed
    least, most = distributed.min_workers, distributed.max_workers
    workers = num_workers or most
    if least == most:
        distributed = distributed.model_copy(update={"num_workers": workers})
        return config.model_copy(update={"distributed": distributed}), workers
    if not least <= workers <= most:
        raise UserError(
            f"--num-workers: {workers} is outside distributed.num_workers = [{least}, {most}], and training would "
            "refuse it: take a number of that range, or change the range"
        )
    return config, workers


def left_out(config: RunConfig, shape: Shape) -> tuple[str, ...]:
    """What the configured student takes besides the plan."""
    reads = config.student.reads
    if reads == "lora_a":
        return ()
    return (
        f"student.readout {reads} is not counted: read-outs are {shape.hidden} wide and not {shape.lora_r}, so "
        "gathering and matrix take more in proportion, and the last layer's end sees more positions",
    )


def chosen_device(
    config: RunConfig, name: str | None, memory_gib: float | None, tflops: float | None, network_gb_s: float | None
) -> Device:
    """The named device with its figures overridden; without a name the default, or `cpu` where the run uses no GPU."""
    name = name or ("cpu" if config.distributed.use_gpu is False else DEFAULT)
    return find_device(name, memory_gib, tflops, network_gb_s)


def workload(config: RunConfig, device: Device, tokens_per_pair: int | None, workers: int) -> Workload:
    """The share of a contrast batch that the largest of `workers` has, in chunks where it is more than one forward's.

    Args:
        config, workers: as from `sized_for`.
    """
    bf16 = device.is_gpu if config.train.bf16 == "auto" else config.train.bf16
    inputs_per_pair = 2 if config.student.mode == "alone" else 1
    share = ceil(config.contrast_batch_size / workers)
    return Workload(
        pairs=share,
        tokens_per_pair=tokens_per_pair or inputs_per_pair * config.data.max_length,
        value_bytes=2 if bf16 else 4,
        lora_dropout=config.student.lora_dropout,
        on_gpu=device.is_gpu,
        double_quant=config.student.bnb_4bit_use_double_quant,
        chunks=ceil(share / config.train.chunk_size),
    )


def contrast_directions(config: RunConfig) -> int:
    return 2 if config.loss.mcl_symmetric else 1


def zero_settings(config: RunConfig) -> dict[int, ZeroSettings]:
    """By stage: the configured file for its own stage, the bundled ones for the others."""
    policies = {stage: read_policy(f"ds_configs/zero{stage}.json") for stage in (1, 2, 3)}
    settings = {0: {}} | {stage: policy["zero_optimization"] for stage, policy in policies.items()}
    own = _policy(config)
    return {stage: ZeroSettings.of(own if stage == own.get("stage") else one) for stage, one in settings.items()}


def _policy(config: RunConfig) -> dict:
    """What the configured file says of ZeRO."""
    named = config.distributed.deepspeed
    return {} if named is None else read_policy(named)["zero_optimization"]


def configured_layout(config: RunConfig, workers: int) -> Layout:
    """The stage and modes that the configuration names; its stage is 0 where it names no file."""
    policy = _policy(config)
    offloads = bool(policy.get("offload_optimizer"))
    return Layout(
        policy.get("stage", 0), workers, config.student.load_in_4bit, offloads, config.train.gradient_checkpointing
    )


def layouts(workers: int) -> list[Layout]:
    """All that make sense, in the order of the table; the plain engine has no offloading."""
    return [
        Layout(stage, workers, four_bit, offload, checkpointing)
        for stage, four_bit, offload, checkpointing in product(range(4), *[(False, True)] * 3)
        if stage or not offload
    ]
