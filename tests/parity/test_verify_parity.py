"""The check of the first forward: sound engines pass, engines with a wrong weight stop the run."""

import logging
from functools import partial

import pytest
import torch
from gang import run_gang
from safetensors.torch import load_file, save_file
from tiny import pair_table, save_student, started_student
from zero import SGD, start_engine

from flipkd_dist.base import load_tokenizer
from flipkd_dist.base_loader import Streamed
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import StudentConfig
from flipkd_dist.engine import DeepSpeedEngine, ZeroPlacement, prepare_deepspeed
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import pair_texts
from flipkd_dist.fourbit import Linear4bit
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.student import load_student
from flipkd_dist.verify import check_first_forward
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
TEXTS = pair_texts(pair_table(5))
KINDS = {"lora": {}, "qlora": {"load_in_4bit": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Biases of Qwen2 are zero when they are made; with values, losing them shows."""
    folder = save_student(tmp_path_factory.mktemp("student"), "qwen2")
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("bias"):
            value.copy_(torch.linspace(-2, 2, len(value)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reload_student(folder, loads, **settings):
    def load(placement):
        loads.append(type(placement))
        return started_student(folder, rank=16, placement=placement, **settings)[0]

    return load


def shard(rank, kind):
    """Spoil one rank's shard of a tensor of the last layer."""

    def spoil(student, world):
        if world.rank == rank:
            [parameter] = [p for name, p in student.named_parameters() if name.endswith(kind)]
            parameter.ds_tensor.zero_()

    return spoil


def scales(student, world):
    """Spoil what rank 1 alone unpacks one layer with."""
    if world.rank == 1:
        [*_, layer] = [module for module in student.modules() if isinstance(module, Linear4bit)]
        layer.state.absmax = layer.state.absmax.flip(0)


def check(folder, stage, spoil=None, verify="always", others=None, share_prefix=True, updated=True, **settings):
    """The error, if any; the log; how often the base was read again; whether the student is in training again."""
    engine, encoder = start_engine(folder, stage, **settings)
    world, loads, lines = World.current(), [], []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("flipkd_dist")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    if spoil:
        spoil(engine.student, world)
    batch = BatchMaker(encoder, engine.student, share_prefix)(TEXTS)
    load = reload_student(folder, loads, **{**settings, **(others or {})})
    engine.student.train()
    error = None
    try:
        check_first_forward(engine, world, batch, load, verify, updated)
    except (RuntimeError, UserError) as caught:
        error = f"{type(caught).__name__} {caught}"
    return error, lines, loads, engine.student.training


@pytest.mark.parametrize(("stage", "size"), [(0, 1), (3, 1), (3, 2), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_engine_passes(folder, kind, stage, size):
    ranks = run_gang(size, partial(check, **KINDS[kind]), folder, stage)
    for rank, (error, _lines, loads, training) in enumerate(ranks):
        assert error is None and training
        assert loads == ([Streamed] if rank == 0 else [])
    [line] = [line for line in ranks[0][1] if line.startswith("the first forward equals an unsharded one up to ")]
    assert float(line.split("up to ")[1].split()[0]) < 1e-5


def test_the_original_glm_in_four_bits_passes(tmp_path):
    folder = save_student(tmp_path, "glm_original")
    ranks = run_gang(2, partial(check, share_prefix=False, load_in_4bit=True), folder, 3)
    assert [error for error, *_ in ranks] == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("lora", "layers.1.mlp.down_proj.weight"),
        ("qlora", "layers.1.mlp.down_proj.weight"),
        ("qlora", "layers.0.self_attn.q_proj.base_layer.bias"),
        ("qlora", "embed_tokens.weight"),
    ],
)
def test_a_spoilt_shard_of_any_rank_stops_every_rank(folder, kind, tensor, rank):
    for error, *_ in run_gang(2, partial(check, spoil=shard(rank, tensor), **KINDS[kind]), folder, 3):
        assert error.startswith("RuntimeError train.verify: on rank 0 the ") and "\n" not in error
        assert "by " in error and "of their largest value (1e-04 is allowed)" in error


def test_scales_that_one_rank_alone_has_wrong(folder):
    for error, *_ in run_gang(2, partial(check, spoil=scales, load_in_4bit=True), folder, 3):
        assert error.startswith("RuntimeError train.verify: on rank 1 the ")


def test_another_code(folder):
    settings = {"load_in_4bit": True, "others": {"bnb_4bit_quant_type": "fp4"}}
    for size, stage in ((1, 0), (2, 3)):
        for error, *_ in run_gang(size, partial(check, **settings), folder, stage):
            assert error.startswith("RuntimeError train.verify: on rank 0 the answer logits of the first forward")


@pytest.mark.parametrize(
    ("verify", "settings", "stage", "size", "checked"),
    [
        ("auto", {}, 0, 1, False),
        ("auto", {}, 3, 1, False),
        ("auto", {}, 2, 2, False),
        ("auto", {}, 3, 2, True),
        ("auto", {"load_in_4bit": True}, 0, 1, True),
        ("always", {}, 0, 1, True),
        ("never", {"load_in_4bit": True}, 3, 2, False),
    ],
)
def test_when_it_runs(folder, verify, settings, stage, size, checked):
    ranks = run_gang(size, partial(check, verify=verify, **settings), folder, stage)
    assert next(loads for _, _, loads, _ in ranks) == ([Streamed] if checked else [])
    assert all(error is None for error, *_ in ranks)


def broken(folder, verify):
    """The base's files went away after it was loaded."""
    engine, encoder = start_engine(folder, 3)
    batch = BatchMaker(encoder, engine.student, share_prefix=True)(TEXTS)

    def load(placement):
        raise UserError("names differ") if verify != "never mind" else ValueError("no reason")

    try:
        check_first_forward(engine, World.current(), batch, load, "always" if verify == "never mind" else verify)
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__} {error}"


def test_a_reference_that_cannot_be_read_is_told_to_every_rank(folder):
    assert run_gang(2, broken, folder, "auto") == [None, None]
    assert run_gang(2, broken, folder, "always") == ["UserError names differ"] * 2
    for error in run_gang(2, broken, folder, "never mind"):
        assert error.startswith("RuntimeError train.verify: the unsharded forward failed (ValueError: no reason)")


def check_in_bf16(folder, storage, stage):
    """The check of a bf16 engine; the largest difference of a spoilt one; losses of two updates."""
    world, lines = World.current(), []
    ds_config = {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    prepare_deepspeed(use_gpu=False)
    settings = StudentConfig(
        model_name_or_path="tiny", load_in_4bit=True, bnb_4bit_quant_storage=storage, lora_dropout=0.0
    )
    encoder = PairEncoder(load_tokenizer(folder), "do i same ? {text_a} | {text_b} =", ["yes", "no"], 120)
    load = partial(load_student, folder, settings, encoder.answer_ids, 16, dtype=torch.bfloat16)
    engine = DeepSpeedEngine(load(placement=ZeroPlacement(ds_config)), SGD, ds_config)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("flipkd_dist").addHandler(handler)
    logging.getLogger("flipkd_dist").setLevel(logging.INFO)
    make_batch = BatchMaker(encoder, engine.student, share_prefix=True)
    check_first_forward(engine, world, make_batch(TEXTS), load)
    engine.student.train()
    losses = []
    for _ in range(2):
        logits, *_ = engine.forward(**make_batch(TEXTS).tensors("cpu"))
        loss = logits.square().mean()
        losses.append(loss.item())
        engine.backward(loss, last=True)
        engine.step(0.03)
    packed = [module.weight for module in engine.student.modules() if isinstance(module, Linear4bit)]
    error = None
    for parameter in packed[-3:]:
        parameter.ds_tensor.zero_() if stage == 3 else parameter.data.zero_()
    try:
        check_first_forward(engine, world, make_batch(TEXTS), load)
    except RuntimeError as caught:
        error = str(caught)
    return lines, losses, {str(parameter.dtype) for parameter in packed}, error


@pytest.mark.parametrize(("storage", "stage"), [("uint8", 3), ("bfloat16", 3), ("bfloat16", 1)])
def test_bf16_engines(folder, storage, stage):
    """No packed byte is cast, in any storage that is allowed: the check compares with bytes that no engine touched."""
    ranks = run_gang(2, check_in_bf16, folder, storage, stage)
    [line] = [line for line in ranks[0][0] if line.startswith("the first forward equals an unsharded one up to ")]
    assert float(line.split("up to ")[1].split()[0]) < 1e-2
    for _, losses, dtypes, error in ranks:
        assert dtypes == {f"torch.{storage}"}
        assert 1e-4 < abs(losses[1] - losses[0]) < 1  # it was trained, and nothing broke
        assert "(3e-02 is allowed)" in error
