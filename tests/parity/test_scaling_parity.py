"""The model of scaling against real steps: what 1, 2 and 4 processes send, what a rank's matrix takes as it grows."""

import gc

import numpy as np
import pytest
import torch
from gang import run_gang
from sent import Sent
from storages import LiveStorages
from test_plan_parity import FEW_LIVE, SHAPE, ZERO, start
from tiny import pair_table, save_student, signals_of, unit_vectors
from torch.utils.flop_counter import FlopCounterMode

from flipkd_dist.batches import BatchMaker
from flipkd_dist.chunks import RowBlocks
from flipkd_dist.config import LossConfig, StudentConfig
from flipkd_dist.contrast import contrast_rows
from flipkd_dist.contrast_terms import contrast_terms
from flipkd_dist.order import Order
from flipkd_dist.planner import Layout, Workload, ZeroSettings
from flipkd_dist.planner_devices import DEVICES
from flipkd_dist.planner_matrix import Matrix
from flipkd_dist.planner_scaling import SMALL, scaled_step, weight_collectives
from flipkd_dist.planner_shape import shape_of
from flipkd_dist.step import TrainingStep
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
RANK, PAIRS = 64, 4  # of LoRA; per device
SETTINGS = StudentConfig(model_name_or_path="tiny", lora_r=RANK)
NUMBERS = 200  # bytes of the small all-reduces of a step, at most


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("glm4"), "glm4", **SHAPE)


def send(folder, stage, zero, micro_steps, symmetric, mini_batch) -> tuple[dict, dict, int]:
    """Bytes and calls by kind of collective in the third step, which ZeRO-3 plans after the first two; entries held,
    0 in chunks."""
    world = World.current()
    engine, encoder = start(folder, stage, zero, torch.float32, False, SETTINGS)
    batch = PAIRS * world.size
    table = pair_table(3 * micro_steps * batch)
    make_batch = BatchMaker(encoder, engine.student, True)
    signals = signals_of(table, unit_vectors(len(table.texts)))
    step = TrainingStep(engine, world, signals, make_batch, LossConfig(mcl_symmetric=symmetric), mini_batch)
    order = Order(len(table), batch, micro_steps, seed=1)
    for number in range(3):
        with Sent() as sent:
            prepared = step.prepare(order.contrast_batches(number))
            step(prepared, 0.0)
    entries = 0 if mini_batch else prepared[0].directions[0].keep.numel()
    return dict(sent.bytes), dict(sent.calls), entries


CASES = {
    "ZeRO-1": dict(stage=1),
    "ZeRO-1, both directions, two micro-steps": dict(stage=1, symmetric=True, micro_steps=2),
    "ZeRO-2, two micro-steps": dict(stage=2, micro_steps=2),
    "ZeRO-3": dict(stage=3),
    "ZeRO-3, few alive": dict(stage=3, zero=FEW_LIVE),
    "ZeRO-2, two micro-steps in chunks": dict(stage=2, micro_steps=2, mini_batch=2),
    "ZeRO-3 in chunks": dict(stage=3, mini_batch=2),
    "ZeRO-3, few alive, in chunks": dict(stage=3, zero=FEW_LIVE, mini_batch=2),
}


FOUR = ("ZeRO-2, two micro-steps", "ZeRO-3 in chunks")  # the others with four ranks are repetitions
RUNS = [("ZeRO-3", 1), *((name, 2) for name in CASES), *((name, 4) for name in FOUR)]  # one rank sends nothing
REPEATED = [pytest.param(name, 4, marks=pytest.mark.soak) for name in CASES if name not in FOUR]


@pytest.mark.parametrize(("name", "ranks"), [*RUNS, *REPEATED])
def test_the_model_says_what_a_rank_sends(folder, name, ranks):
    case = CASES[name]
    stage, micro_steps, symmetric = case["stage"], case.get("micro_steps", 1), case.get("symmetric", False)
    zero = {**ZERO, **case.get("zero", {})}
    shape, settings = shape_of(folder, SETTINGS, RANK), ZeroSettings.of({"stage": stage, **zero})
    mini_batch = case.get("mini_batch")
    layout, work = Layout(stage, ranks), Workload(PAIRS, 30, 4, on_gpu=False, chunks=PAIRS // (mini_batch or PAIRS))
    directions = 2 if symmetric else 1
    model = scaled_step(shape, layout, work, settings, DEVICES["cpu"], micro_steps, directions)
    planned = model.weight_bytes + model.gather_bytes + model.scatter_bytes
    for sent, calls, entries in run_gang(ranks, send, folder, stage, zero, micro_steps, symmetric, mini_batch):
        print(f"\n{name}, {ranks} ranks: {sent}, {calls}; planned {planned}, {model.collectives}")
        assert entries == (0 if mini_batch else Matrix(PAIRS, ranks, RANK, 16).entries)
        if ranks == 1:
            assert sum(sent.values()) == planned == 0
            continue
        assert sent["allgather_"] == model.gather_bytes > 0  # ours alone: DeepSpeed gathers into one tensor
        # What few weights stay between forward and backward depends on where modules end; so do the calls of chunks.
        by_module = "few" in name or name == "ZeRO-3 in chunks"
        assert sum(sent.values()) == pytest.approx(planned, rel=0.06 if by_module else 0, abs=NUMBERS)
        # A training asks for the request to stop besides.
        made = sum(calls.values()) + 1
        assert made == pytest.approx(model.collectives, rel=0.25 if by_module else 0, abs=0)
        rounds, sums = weight_collectives(shape, layout, work, settings, micro_steps)
        assert rounds + sums + 2 * micro_steps * directions == model.collectives and sums >= SMALL


class Touched(LiveStorages):
    """Bytes that operations read and write besides; views touch nothing."""

    def __init__(self):
        super().__init__([])
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if not function.is_view and not function.__name__.startswith("empty"):
            tensors = [one for one in (*args, result) if isinstance(one, torch.Tensor)]
            tensors += [one for many in args if isinstance(many, list | tuple) for one in many]
            self.bytes += sum(one.numel() * one.element_size() for one in tensors if isinstance(one, torch.Tensor))
        return result


def played(pairs: int, ranks: int, width: int) -> tuple[int, int, int, int]:
    """FLOPs, bytes touched, most bytes alive and bytes of the rows, where one rank has these rows and all columns."""
    columns = pairs * ranks
    table = pair_table(columns, shortest=6, longest=12)
    signals = signals_of(table, unit_vectors(len(table.texts)))
    rows = contrast_rows(signals, np.arange(columns), slice(0, pairs), 0.5)
    held = [rows.teacher_similarity, rows.keep, rows.negative, rows.off_diagonal]
    readout_a, gathered_b = (torch.randn(count, width, requires_grad=True) for count in (pairs, columns))
    gc.collect()
    with FlopCounterMode(display=False) as flops, Touched() as touched:
        terms = contrast_terms(readout_a, readout_a, None, gathered_b, [rows], LossConfig())
        loss = terms.distance + terms.contrastive
        del terms
        loss.backward()
    return flops.get_total_flops(), touched.bytes, touched.peak, sum(one.nbytes for one in held)


@pytest.mark.parametrize(
    ("pairs", "ranks", "width"), [(64, 1, 128), (64, 8, 128), (64, 64, 128), (512, 8, 16), (2, 256, 512)]
)
def test_a_ranks_matrix_grows_as_the_model_says(pairs, ranks, width):
    """From 64 columns to 4,096; FLOPs exactly, bytes touched and alive within a tenth."""
    matrix = Matrix(pairs, ranks, width, 16)
    flops, touched, peak, held = played(pairs, ranks, width)
    assert flops == matrix.flops()
    assert held == 7 * matrix.entries
    model, modelled = matrix.touched(), matrix.losses_memory()
    print(f"\n{matrix}: touched {touched / model:.3f} of the model, alive {peak / modelled:.3f}")
    assert touched == pytest.approx(model, rel=0.1) and peak == pytest.approx(modelled, rel=0.1)


def test_what_a_rank_looks_up_grows_as_the_model_says():
    """Every text of its rows and of all columns once, in one direction; in blocks all columns for each of them."""
    asked, in_blocks = [], []
    for ranks in (1, 64):
        table = pair_table(64 * ranks, shortest=6, longest=12)
        signals = signals_of(table, unit_vectors(len(table.texts)))
        reader, counted = signals.texts.reader, []
        at = reader.at
        reader.at = lambda rows, at=at, counted=counted: (counted.append(len(rows)), at(rows))[1]
        contrast_rows(signals, np.arange(64 * ranks), slice(0, 64), 0.5)
        asked.append(sum(counted))
        counted.clear()
        list(RowBlocks(signals, np.arange(64 * ranks), slice(0, 64), LossConfig()))
        in_blocks.append(sum(counted))
        assert in_blocks[-1] == 64 + Matrix(64, ranks, RANK, 16, in_blocks=True).blocks * 64 * ranks
    assert asked == [64 + 64, 64 + 4096]
    assert in_blocks == [64 + 64, 64 + 4096]  # 64 rows are one block
