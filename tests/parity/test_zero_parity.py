"""One process without sharding against ZeRO at 1, 2 and 4 gloo processes, on the same contrast batches.

Plain SGD without clipping first: AdamW and clipping hide a wrong scale of the gradient.
"""

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from gang import run_gang
from tiny import WORDS, PairReader, pair_table, save_student, signals_of, unit_vectors
from zero import SGD, start_engine

from flipkd_dist import batches
from flipkd_dist.base import shares_prefix
from flipkd_dist.batches import BatchMaker
from flipkd_dist.calibration import Meaning
from flipkd_dist.config import LossConfig
from flipkd_dist.order import Order
from flipkd_dist.packing import pack
from flipkd_dist.pairs import PairTable
from flipkd_dist.signals import PairTeacher, TeacherSignals
from flipkd_dist.step import TrainingStep, summarise
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
LOSS = LossConfig(dist_weight=0.7, mcl_weight=0.9, margin=0.3, threshold=0.5)
ADAMW = partial(torch.optim.AdamW, lr=0.0, weight_decay=0.1)


def of_vectors(pairs) -> TeacherSignals:
    return signals_of(pairs, unit_vectors(len(pairs.texts)))


def train(
    folder,
    pairs,
    stage,
    contrast_batch,
    accumulation=1,
    optimizer=SGD,
    clip=0.0,
    rate=0.5,
    loss=LOSS,
    teacher=of_vectors,
):
    """Two updates, taught by `teacher(pairs)`.

    Losses, unclipped gradients of each, the weights at the end, and the shapes of the work.
    """
    world = World.current()
    engine, encoder = start_engine(folder, stage, optimizer, accumulation, clip)
    student = engine.student
    make_batch = BatchMaker(encoder, student, shares_prefix(student.model.config, 120))
    step = TrainingStep(engine, world, teacher(pairs), make_batch, loss)
    order = Order(len(pairs), contrast_batch, accumulation, seed=3)
    result = {"losses": [], "gradients": [], "norms": [], "packs": [], "rows": [], "anchors": [], "kept": []}
    for number in range(2):
        micro_steps = step.prepare(order.contrast_batches(number))
        counts = step.counts(micro_steps)
        summary = summarise(counts, world.sum(step.backward(micro_steps, counts)), loss)
        result["losses"].append([summary[key] for key in ("loss", "loss_sup", "loss_dist", "loss_mcl")])
        result["gradients"].append({name: value.numpy() for name, value in engine.gradients().items()})
        result["norms"].append(engine.step(rate))
        result["packs"].append([len(micro.batch.input_ids) for micro in micro_steps])
        result["rows"].append([len(micro.directions[0].labels) for micro in micro_steps])
        result["kept"].append(counts[1].item())
        result["anchors"].append([int(micro.directions[0].anchor.sum()) for micro in micro_steps])
    result["weights"] = {name: value.numpy() for name, value in engine.lora_state().items()}
    if stage == 3:
        base = [parameter for parameter in student.parameters() if not parameter.requires_grad]
        result["base"] = (
            sum(p.ds_tensor.numel() for p in base),
            sum(p.ds_numel for p in base),
            sum(p.numel() for p in base),
        )
    return result


def difference(found: dict, expected: dict) -> float:
    """The largest norm-wise relative difference of two dictionaries of arrays."""
    assert found.keys() == expected.keys() and expected
    assert all(np.linalg.norm(value) > 0 for value in expected.values())
    return max(np.linalg.norm(found[name] - value) / np.linalg.norm(value) for name, value in expected.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


def compare(folder, pairs, stage, world_size, contrast_batch, **options):
    """The plain engine in one process against `stage` on `world_size` processes."""
    [expected] = run_gang(1, partial(train, **options), folder, pairs, 0, contrast_batch)
    ranks = run_gang(world_size, partial(train, **options), folder, pairs, stage, contrast_batch)
    for found in ranks:
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=TOLERANCE)
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=TOLERANCE)
        for gradients, wanted in zip(found["gradients"], expected["gradients"], strict=True):
            assert difference(gradients, wanted) < TOLERANCE
        assert difference(found["weights"], expected["weights"]) < TOLERANCE
    return expected, ranks


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("num_pairs", "accumulation"), [(14, 1), (22, 3)])
def test_zero3_equals_one_process(folder, world_size, num_pairs, accumulation):
    """Contrast batches of 8 with a ragged tail of 6; the noise filter drops some of every kind."""
    expected, ranks = compare(folder, pair_table(num_pairs), 3, world_size, 8, accumulation=accumulation)
    assert np.all(np.array(expected["losses"]) > 0.01)  # every term is there
    ragged = [8, 6] if accumulation == 1 else [8, 8, 6]
    assert np.sum([rank["rows"] for rank in ranks], axis=0).flatten().tolist()[: len(ragged)] == ragged


def test_zero3_equals_one_process_with_a_bidirectional_student(tmp_path):
    """The original GLM from its published files: fused projection, one pair a row, a mask and two positions a token."""
    _, ranks = compare(save_student(tmp_path, "glm_original"), pair_table(14), 3, 2, 8)
    held, whole, live = ranks[0]["base"]
    assert live == 0 and held <= whole / 2 + 100
    assert ranks[0]["packs"] == [[4], [3]]  # rows are pairs


@pytest.mark.parametrize("stage", [1, 2])
def test_other_stages_equal_one_process(folder, stage):
    compare(folder, pair_table(22), stage, 2, 8, accumulation=3)


@pytest.mark.parametrize("stage", [1, 3])
def test_adamw_with_an_active_clip(folder, stage):
    expected, _ = compare(folder, pair_table(14), stage, 2, 8, optimizer=ADAMW, clip=0.05, rate=1e-3)
    assert min(expected["norms"]) > 0.05


def test_symmetric_contrast(folder):
    loss = LossConfig(dist_weight=0.7, mcl_weight=0.9, margin=0.3, mcl_symmetric=True)
    one_way, _ = compare(folder, pair_table(14), 3, 2, 8)
    both_ways, _ = compare(folder, pair_table(14), 3, 2, 8, loss=loss)
    assert abs(one_way["losses"][0][3] - both_ways["losses"][0][3]) > 1e-3


@pytest.mark.parametrize(("contrastive", "margin"), [("infonce", 0.0), ("arccse", 0.3), ("kdmcse", 0.3)])
def test_losses_in_place_of_l_mcl(folder, contrastive, margin):
    """Each with gradients of its own."""
    loss = LossConfig(mcl_weight=0.9, contrastive=contrastive, margin=margin, temperature=0.5)
    expected, _ = compare(folder, pair_table(14), 1, 2, 8, loss=loss)
    assert expected["losses"][0][3] > 0.01


def of_neighbours(pairs) -> TeacherSignals:
    """Scores of every pair, of which the teacher may use the labelled ones and three columns of each row."""
    generator, texts = np.random.default_rng(1), pairs.texts
    logits = {(one, other): generator.normal(-1, 2) for one in texts for other in texts}
    for one, other, label in zip(pairs.text_a, pairs.text_b, pairs.label, strict=True):
        logits[texts[one], texts[other]] += 4 * label
    return TeacherSignals(pairs, scored=PairTeacher(PairReader(logits), Meaning("logit"), neighbours=3))


@pytest.mark.parametrize("symmetric", [False, True])
def test_entries_that_the_teacher_does_not_know(folder, symmetric):
    """A cross-encoder with neighbours: most of the matrix is in no loss, and the counts of all ranks say so."""
    loss = LossConfig(dist_weight=0.7, mcl_weight=0.9, margin=0.3, mcl_symmetric=symmetric)
    expected, ranks = compare(folder, pair_table(14), 3, 2, 8, loss=loss, teacher=of_neighbours)
    assert np.all(np.array(expected["losses"]) > 0.01) and max(expected["kept"]) < 8 * 5
    assert all(rank["kept"] == expected["kept"] for rank in ranks)


def long_and_short_pairs() -> PairTable:
    """The order puts four long pairs before four short ones in each contrast batch of eight."""
    generator = np.random.default_rng(0)
    long = [" ".join(generator.choice(WORDS, 45)) for _ in range(16)]
    short = [" ".join(generator.choice(WORDS, 2)) + f" {i}" for i in range(16)]
    first = np.concatenate([Order(16, 8, 1, seed=3).contrast_batches(step)[0] for step in range(2)])
    is_long = np.empty(16, bool)
    is_long[first] = np.tile([True] * 4 + [False] * 4, 2)
    rows = np.arange(16)
    text_a = np.where(is_long, rows, 16 + rows)
    text_b = np.where(is_long, (rows + 1) % 16, 16 + (rows + 1) % 16)
    none = np.full(16, -1)
    label = (rows % 3 == 0).astype(np.int64)
    return PairTable(long + short, text_a, text_b, label, [str(i) for i in rows], [""] * 16, none, none)


def test_texts_of_very_different_lengths(folder):
    compare(folder, long_and_short_pairs(), 3, 2, 8)


def train_with_forced_rows(folder, pairs, stage, contrast_batch, **options):
    """As `train`, but the second rank takes one pair a row and every other one row."""
    if World.current().rank == 1:
        batches.pack = lambda prefix, pairs, _share, **settings: pack(prefix, pairs, False, **settings)  # here alone
    return train(folder, pairs, stage, contrast_batch, **options)


def test_ranks_with_one_and_five_rows(folder):
    pairs = pair_table(14)
    [expected] = run_gang(1, train, folder, pairs, 0, 10)
    ranks = run_gang(2, train_with_forced_rows, folder, pairs, 3, 10)
    assert [rank["packs"][0][0] for rank in ranks] == [1, 5]
    for found in ranks:
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=TOLERANCE)
        assert difference(found["weights"], expected["weights"]) < TOLERANCE


def test_a_rank_without_pairs_and_one_without_anchors(folder):
    """Three pairs on four ranks, one of them a match: a rank has only a dummy row, two have no anchor."""
    pairs = pair_table(3)
    pairs.label[:] = [1, 0, 0]
    pairs.text_b[0] = pairs.text_a[0]  # the teacher agrees: cosine 1
    _, ranks = compare(folder, pairs, 3, 4, 3)
    assert sorted(rank["rows"][0][0] for rank in ranks) == [0, 1, 1, 1]
    assert sorted(rank["anchors"][0][0] for rank in ranks) == [0, 0, 0, 1]


def test_the_ratio_of_the_losses_does_not_depend_on_the_world(folder):
    results = [run_gang(size, train, folder, pair_table(14), 3, 8)[0]["losses"] for size in (1, 2, 4)]
    ratios = [np.array(losses)[:, 2:] / np.array(losses)[:, 1:2] for losses in results]
    np.testing.assert_allclose(ratios[1], ratios[0], rtol=TOLERANCE)
    np.testing.assert_allclose(ratios[2], ratios[0], rtol=TOLERANCE)


def test_each_rank_holds_half_of_the_base(folder):
    for held, whole, live in [rank["base"] for rank in run_gang(2, train, folder, pair_table(14), 3, 8)]:
        assert live == 0  # nothing is whole on any rank
        assert whole / 2 <= held <= whole / 2 + 100  # each tensor is padded to an even number of elements


def test_no_extension_is_built(folder, tmp_path, monkeypatch):
    """DeepSpeed's shared-memory op needs a C++ compiler and 90 seconds; nothing of the kind may be built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_gang(2, train, folder, pair_table(14), 3, 8)
    assert not list(tmp_path.iterdir())


def left_after_closing(folder, stage) -> int:
    """Frozen tensors that are still held after three engines were closed, one after the other."""
    held = []
    for _ in range(3):
        engine, _ = start_engine(folder, stage)
        base = [weakref.ref(parameter) for parameter in engine.student.parameters() if not parameter.requires_grad]
        engine.close()
        del engine
        held.append(sum(reference() is not None for reference in base))
    return max(held)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_closed_engine_holds_no_base(folder, stage):
    """Evaluation loads the base again in the workers that have trained."""
    assert run_gang(1, left_after_closing, folder, stage) == [0]
