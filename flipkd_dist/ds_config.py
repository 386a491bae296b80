"""DeepSpeed's configuration: the file holds the sharding policy, the run owns everything else."""

import json
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError

# Keys that follow from the run's configuration, and the setting that decides each.
RUN_OWNED = {
    "train_batch_size": "train.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.lr_scheduler_type",
    "bf16": "train.bf16",
    "bfloat16": "train.bf16",  # DeepSpeed's old name
    "fp16": "train.bf16",
    "amp": "train.bf16",
    "torch_autocast": "train.bf16",
    "zero_force_ds_cpu_optimizer": "the run (it brings its own optimizer)",
}
# Installed, the files lie inside the package; in a checkout beside it.
_INSIDE = Path(__file__).parent / "ds_configs"
BUNDLED = _INSIDE if _INSIDE.is_dir() else _INSIDE.parent.parent / "ds_configs"


def read_policy(path: str) -> dict[str, Any]:
    """The sharding policy in a DeepSpeed file; a bundled `ds_configs/NAME.json` is found from any folder.

    Raises:
        UserError: an unreadable file, one without a ZeRO stage of 1 to 3, or one that sets what the run owns.
    """
    file = Path(path)
    if not file.exists() and str(file.parent) in (".", BUNDLED.name) and (BUNDLED / file.name).exists():
        file = BUNDLED / file.name
    try:
        policy = json.loads(file.read_text(encoding="utf-8"))
        stage = policy["zero_optimization"]["stage"]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"distributed.deepspeed: {path} cannot be read ({type(error).__name__}): check it") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"distributed.deepspeed: {path}, line {error.lineno}: not JSON ({error.msg}): correct it"
        ) from None
    except (KeyError, TypeError):
        raise UserError(f"distributed.deepspeed: {path} sets no zero_optimization.stage: add one of 1, 2, 3") from None
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise UserError(f"distributed.deepspeed: {path}: zero_optimization.stage is {stage!r}: take 1, 2 or 3")
    for key, value in policy["zero_optimization"].items():
        if value == "auto":
            raise UserError(
                f"distributed.deepspeed: {path}: zero_optimization.{key} is auto, which this package does not fill in: "
                "write a number or leave it out"
            )
    for key in ("offload_optimizer", "offload_param"):
        if (policy["zero_optimization"].get(key) or {}).get("device") == "nvme":
            raise UserError(
                f"distributed.deepspeed: {path}: {key} to nvme: checkpoints do not reach it: take the device cpu"
            )
    for key in policy:
        if key in RUN_OWNED:
            raise UserError(
                f"distributed.deepspeed: {path} sets {key}, which {RUN_OWNED[key]} decides: remove it there"
            )
    return policy


def compose(policy: dict[str, Any], config: RunConfig, world_size: int, bf16: bool) -> dict[str, Any]:
    """The policy with the run's own keys.

    DeepSpeed asks for batch sizes and for their product with the workers that run, and only reports them: the run
    divides a contrast batch by itself, among fewer workers in chunks of so many pairs.
    """
    train = config.train
    return {
        **policy,
        "train_batch_size": train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_force_ds_cpu_optimizer": False,
    }
