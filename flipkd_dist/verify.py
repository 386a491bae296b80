"""Before and after the first update: does the engine compute what the base's files say, and do trained tensors move?"""

import logging
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.base_loader import Streamed
from flipkd_dist.engine import Engine
from flipkd_dist.errors import UserError
from flipkd_dist.fourbit import Linear4bit
from flipkd_dist.packing import PackedBatch
from flipkd_dist.student import Student
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
OUTPUTS = ("answer logits", "read-outs of first texts", "read-outs of second texts")
# Of the largest absolute value. Both forwards run the same operations on the same batch, so that they differ where a
# kernel chooses another order of summation: 1e-6 is usual in fp32. A number in bf16 has 8 bits; three lost ones (2^-5)
# through the depth of a model are allowed, while a wrong shard or another code changes outputs by tenths.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def check_first_forward(
    engine: Engine,
    world: World,
    batch: PackedBatch,
    load: Callable[..., Student],
    verify: str = "always",
    updated: bool = True,
) -> None:
    """Compare the engine's outputs for `batch` on every rank with an unsharded forward on rank 0.

    That forward reads one decoder layer at a time from the base's files (and quantises it) and needs little memory.

    Args:
        batch: the same on every rank.
        load: `load_student` with all its arguments but `placement`.
        verify: `train.verify`; "auto" checks a base that is in four bits, or sharded by ZeRO-3 over several ranks.
        updated: whether trained tensors are others by now than `load` gives; those of the engine are taken then.
    Raises:
        RuntimeError: outputs differ; one line with the figures, on every rank.
    """
    if not _wanted(engine, world, verify):
        return
    student = engine.student
    # Rank 0 alone needs them, and with full tuning they are the whole model.
    state = {name: value for name, value in engine.each_trained() if world.is_main} if updated else {}
    training = student.training
    student.eval()
    with torch.no_grad():
        outputs = engine.forward(**batch.tensors(world.device))
    student.train(training)
    by_rank = world.gather_object([value.float().cpu().numpy() for value in outputs])
    verdict = _verdict(by_rank, student, state, world, batch, load) if world.is_main else None
    verdict = world.gather_object(verdict)[0]
    if isinstance(verdict, UserError):
        if verify == "always":
            raise verdict
        logger.warning("the first forward is not checked: %s", verdict)
    elif verdict:
        raise RuntimeError(verdict)


def _wanted(engine: Engine, world: World, verify: str) -> bool:
    if verify != "auto":
        return verify == "always"
    four_bit = any(isinstance(module, Linear4bit) for module in engine.student.modules())
    return four_bit or (getattr(engine, "stage", 0) == 3 and world.size > 1)


def _verdict(
    by_rank: list[list[np.ndarray]],
    student: Student,
    state: dict[str, Tensor],
    world: World,
    batch: PackedBatch,
    load: Callable[..., Student],
) -> str | UserError | None:
    """What is wrong; an error of the reference itself is told too, because the other ranks wait for this."""
    dtype = student.answer_rows.dtype
    try:
        # Loading draws random numbers, of which dropout must not be robbed: resuming is exact.
        with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
            reference = load(placement=Streamed(world.device, state))
            expected = _reference(reference, student, state, world, batch)
    except UserError as error:
        return error
    except torch.OutOfMemoryError:
        return UserError("train.verify: no memory for the unsharded forward: set it to never, or take a smaller batch")
    except Exception as error:
        return f"train.verify: the unsharded forward failed ({type(error).__name__}: {error}): set it to never to go on"
    largest = 0.0
    for rank, outputs in enumerate(by_rank):
        for name, found, wanted in zip(OUTPUTS, outputs, expected, strict=True):
            difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            largest = max(largest, difference)
            if not difference <= TOLERANCE[dtype]:
                return (
                    f"train.verify: on rank {rank} the {name} of the first forward differ from an unsharded one by "
                    f"{difference:.1e} of their largest value ({TOLERANCE[dtype]:.0e} is allowed): the weights that "
                    "the engine holds are not those of the files"
                )
    logger.info("the first forward equals an unsharded one up to %.1e of the largest value", largest)
    return None


@torch.no_grad()
def _reference(
    reference: Student, student: Student, state: dict[str, Tensor], world: World, batch: PackedBatch
) -> list[np.ndarray]:
    """Outputs of `reference` with the engine's trained tensors, as far as they are in `state`."""
    dtypes = {name: parameter.dtype for name, parameter in student.trained_parameters().items()}
    for name, parameter in reference.trained_parameters().items():
        parameter.data = state.get(name, parameter.data).to(world.device, dtypes[name])
    for value in (reference.answer_rows, reference.answer_bias):
        if value is not None:
            value.data = value.data.to(world.device)
    return [value.float().cpu().numpy() for value in reference.eval()(**batch.tensors(world.device))]


def first_moves(engine: Engine, world: World) -> dict[str, float]:
    """Squared norms of what is zero before the first update and must not be after it, by name of the trained tensor.

    That is every LoRA-B; with full tuning the first moment of every tensor. Every rank must call it.
    """
    names = list(engine.shapes())
    of_lora = [name for name in names if ".lora_B." in name]
    names, kind = (of_lora, "weight") if of_lora else (names, "exp_avg")
    slices = engine.slices()
    own = [slices[name].values[kind].double().square().sum().item() if name in slices else 0.0 for name in names]
    total = world.sum(torch.tensor(own, dtype=torch.float64, device=world.device))
    return dict(zip(names, total.tolist(), strict=True))


def unmoved_layers(moves: dict[str, float]) -> list[int]:
    """Numbers of the layers of whose tensors none has moved; `moves` as from `first_moves`."""
    moved: dict[int, bool] = {}
    for name, square in moves.items():
        if number := re.search(r"\.(\d+)\.", name):
            layer = int(number.group(1))
            moved[layer] = moved.get(layer, False) or square > 0
    return sorted(layer for layer, has_moved in moved.items() if not has_moved)
