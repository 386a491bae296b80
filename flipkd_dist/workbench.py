"""config -> data and teacher -> student -> engine: the one place where they are put together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from flipkd_dist.adapter import WEIGHTS, load_weights
from flipkd_dist.base_loader import Whole
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import RunConfig
from flipkd_dist.ds_config import compose, read_policy
from flipkd_dist.engine import DeepSpeedEngine, Engine, PlainEngine, ZeroPlacement, join_world, prepare_deepspeed
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import student_scores
from flipkd_dist.preflight import Inputs, check_inputs, check_precision
from flipkd_dist.student import Student, load_student
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")


@dataclass
class Workbench:
    """What training and evaluation work with; built in one place."""

    inputs: Inputs
    world: World
    engine: Engine
    make_batch: BatchMaker
    dtype: torch.dtype
    load: Callable[..., Student]  # the student again, for `check_first_forward`

    def scores(self, texts: list[tuple[str, str]], description: str) -> tuple[np.ndarray, np.ndarray]:
        batch_size = self.inputs.config.train.per_device_eval_batch_size
        return student_scores(
            self.engine.student, self.world, self.make_batch, texts, batch_size, description, self.engine.forward
        )


def use_gpu_here(config: RunConfig) -> bool:
    """What the configuration says, or whether this machine has one."""
    return torch.cuda.is_available() if config.distributed.use_gpu == "auto" else config.distributed.use_gpu


def build(config: RunConfig, adapter: Path | None = None) -> Workbench:
    """config -> data and teacher -> student -> engine; `adapter` is a folder of trained weights to start from."""
    use_gpu = use_gpu_here(config)
    world = join_world(use_gpu, config.distributed.timeout_s)
    if not world.is_main:
        logger.setLevel(logging.ERROR)
    inputs = check_inputs(config)
    bf16 = use_gpu and torch.cuda.is_bf16_supported() if config.train.bf16 == "auto" else config.train.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    check_precision(config, bf16)
    name_unread(config)
    ds_config, placement = None, Whole(world.device)
    if config.distributed.deepspeed is not None:
        prepare_deepspeed(use_gpu, config.distributed.timeout_s)
        ds_config = compose(read_policy(config.distributed.deepspeed), config, world.size, bf16)
        placement = ZeroPlacement(ds_config, world.device)
    elif world.size > 1:
        raise UserError("distributed.deepspeed is null, which trains on one worker: name a file or start one process")
    tuned = adapter is not None and config.student.tuning == "full"
    load = partial(
        load_student,
        adapter if tuned else inputs.base_folder,
        config.student,
        inputs.encoder.answer_ids,
        inputs.lora_rank,
        config.seed,
        dtype,
        config.train.gradient_checkpointing,
    )
    student = load(placement=placement)
    if adapter is not None and not tuned:
        load_weights(student, adapter / WEIGHTS)
    make_optimizer = partial(torch.optim.AdamW, lr=0.0, weight_decay=config.train.weight_decay)
    torch.manual_seed(config.seed * 1000 + world.rank)  # dropout differs between ranks
    if ds_config is None:
        engine = PlainEngine(student.to(world.device), make_optimizer, config.train.max_grad_norm)
    else:
        engine = DeepSpeedEngine(student, make_optimizer, ds_config)
    make_batch = BatchMaker(inputs.encoder, student, inputs.share_prefix)
    layout = "what pairs share is computed once" if make_batch.share_prefix else "one pair a row, padded"
    logger.info("attention: %s, %s", "eager" if config.student.attn_implementation == "eager" else "sdpa", layout)
    return Workbench(inputs, world, engine, make_batch, dtype, load)


def name_unread(config: RunConfig) -> None:
    """Warn of settings of LoRA that full tuning leaves aside."""
    if config.student.tuning != "full":
        return
    defaults = type(config.student).model_fields
    for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
        if getattr(config.student, key) != defaults[key].default:
            logger.warning("warning: student.%s does not apply: with student.tuning: full there is no LoRA", key)
