"""The same started student behind the plain engine or behind ZeRO, inside a gang."""

from functools import partial
from pathlib import Path

import torch
from tiny import started_student

from flipkd_dist.engine import DeepSpeedEngine, Engine, PlainEngine, ZeroPlacement, prepare_deepspeed
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.world import World

SGD = partial(torch.optim.SGD, lr=0.0)


def start_engine(
    folder: Path,
    stage: int,
    optimizer=SGD,
    accumulation: int = 1,
    clip: float = 0.0,
    policy=None,
    bf16=False,
    **settings,
) -> tuple[Engine, PairEncoder]:
    """The student in `folder` behind ZeRO's `stage`, or for stage 0 whole in this process.

    Args:
        policy: further keys of DeepSpeed's `zero_optimization`.
    """
    if not stage:
        student, encoder = started_student(folder, rank=16, **settings)
        return PlainEngine(student, optimizer, clip), encoder
    ds_config = {
        "train_batch_size": World.current().size * accumulation,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # A threshold above 0 would leave so small a model whole on every rank.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(policy or {})},
    }
    prepare_deepspeed(use_gpu=False)
    placement = ZeroPlacement(ds_config)
    student, encoder = started_student(folder, rank=16, placement=placement, **settings)
    return DeepSpeedEngine(student, optimizer, ds_config), encoder
