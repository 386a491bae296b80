"""A contrast batch in chunks with cached gradients against the same batch at once, in one process and under ZeRO.

Plain SGD without clipping first: AdamW and clipping hide a wrong scale of the gradient. The matrix comes in blocks of
two rows, so that every case has several.
"""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from gang import run_gang
from test_zero_parity import ADAMW, LOSS, TOLERANCE, difference, of_neighbours, of_vectors
from tiny import pair_table, save_student
from zero import SGD, start_engine

from flipkd_dist import chunks
from flipkd_dist.base import shares_prefix
from flipkd_dist.batches import BatchMaker
from flipkd_dist.chunks import ChunkedBackward, ChunkedMicroStep
from flipkd_dist.config import LossConfig
from flipkd_dist.contrast_terms import contrast_terms, directions
from flipkd_dist.losses import supervised_sum
from flipkd_dist.order import Order
from flipkd_dist.step import SUMS, TrainingStep
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
OF_PACKING = ("tokens", "padded_tokens", "unpacked_tokens")  # each chunk is a pack of its own


def record(engine) -> dict:
    """What passes through the engine: read-outs of the first pass and of the second, and modules that ran."""
    seen = {"first": [], "second": [], "norms": 0, "reduced": 0}
    readouts, forward = engine.readouts, engine.forward

    def first(**batch):
        found = readouts(**batch)
        seen["first"].append([values.numpy().copy() for values in found])
        return found

    def second(**batch):
        found = forward(**batch)
        seen["second"].append([values.detach().numpy().copy() for values in found[1:]])
        return found

    engine.readouts, engine.forward = first, second

    def count(key):
        return lambda *_: seen.update({key: seen[key] + 1})

    engine.student.model.get_base_model().base_model.norm.register_forward_hook(count("norms"))  # behind all layers
    if hasattr(engine, "engine"):
        zero = engine.engine.optimizer
        reduce = zero.reduce_independent_p_g_buckets_and_remove_grads
        zero.reduce_independent_p_g_buckets_and_remove_grads = lambda *one: (count("reduced")(), reduce(*one))[1]
    return seen


def train(
    folder,
    pairs,
    stage,
    contrast_batch,
    chunk,
    accumulation=1,
    optimizer=SGD,
    clip=0.0,
    loss=LOSS,
    teacher=of_vectors,
    checkpointing=False,
    policy=None,
    coalesce=True,
    **settings,
):
    """Three updates (two with accumulation) with at most `chunk` pairs a forward.

    Sums and unclipped gradients of each, the weights at the end, and what passed through the engine.
    """
    world = World.current()
    chunks.BLOCK_ENTRIES, chunks.BLOCK_ROWS = 2 * contrast_batch, 1  # in this forked process alone
    engine, encoder = start_engine(folder, stage, optimizer, accumulation, clip, policy, **settings)
    student = engine.student
    if checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not coalesce:
        engine.one_reduction = nullcontext
    student.train()
    torch.manual_seed(world.rank)
    make_batch = BatchMaker(encoder, student, shares_prefix(student.model.config, 120))
    step = TrainingStep(engine, world, teacher(pairs), make_batch, loss, chunk)
    order = Order(len(pairs), contrast_batch, accumulation, seed=3)
    seen = record(engine)
    result = {"counts": [], "sums": [], "gradients": [], "norms": [], "chunks": [], "seen": seen}
    for number in range(3 if accumulation == 1 else 2):
        micro_steps = step.prepare(order.contrast_batches(number))
        counts = step.counts(micro_steps)
        result["counts"].append(counts.numpy())
        result["sums"].append(world.sum(step.backward(micro_steps, counts)).numpy())
        result["gradients"].append({name: value.numpy() for name, value in engine.gradients().items()})
        result["norms"].append(engine.step(0.5 if optimizer is SGD else 1e-3))
        chunked = [micro for micro in micro_steps if isinstance(micro, ChunkedMicroStep)]
        result["chunks"].append([[part.stop - part.start for part in micro.chunks] for micro in chunked])
    result["weights"] = {name: value.numpy() for name, value in engine.lora_state().items()}
    if stage == 3:
        result["zero3"] = left_by_zero3(engine)
    return result


def left_by_zero3(engine) -> tuple[bool, int]:
    """Whether the order of fetching is known, and how many modules DeepSpeed believes to be under way."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    coordinator = engine.engine.optimizer.parameter_offload.get_param_coordinator()
    return coordinator.is_complete_trace(), len(FWD_MODULE_STACK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


def compare(folder, stage, world_size, contrast_batch, chunk, num_pairs=22, **options):
    """One process and one forward a contrast batch against `stage` on `world_size` processes in chunks."""
    one = {key: value for key, value in options.items() if key not in ("checkpointing", "policy", "coalesce")}
    pairs = pair_table(num_pairs)
    [expected] = run_gang(1, partial(train, **one), folder, pairs, 0, contrast_batch, None)
    ranks = run_gang(world_size, partial(train, **options), folder, pairs, stage, contrast_batch, chunk)
    same = [row for row, name in enumerate(SUMS) if name not in OF_PACKING]
    assert not np.concatenate(expected["chunks"]).size
    for found in ranks:
        assert any(len(micro) > 1 for step in found["chunks"] for micro in step)
        np.testing.assert_array_equal(found["counts"], expected["counts"])
        np.testing.assert_allclose(
            np.array(found["sums"])[:, same], np.array(expected["sums"])[:, same], rtol=TOLERANCE, atol=1e-6
        )
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=TOLERANCE)
        for gradients, wanted in zip(found["gradients"], expected["gradients"], strict=True):
            assert difference(gradients, wanted) < TOLERANCE
        assert difference(found["weights"], expected["weights"]) < TOLERANCE
    return expected, ranks


@pytest.mark.parametrize("chunk", [1, 3])
def test_one_process(folder, chunk):
    """Contrast batches of eight with a ragged tail of six, three to a step."""
    expected, [found] = compare(folder, 0, 1, 8, chunk, accumulation=3)
    assert found["chunks"][0] == {1: [[1] * 8, [1] * 8, [1] * 6], 3: [[2, 3, 3], [2, 3, 3], [3, 3]]}[chunk]
    assert np.all(np.array(expected["sums"])[:, :3] > 0.01)  # every loss is there


@pytest.mark.parametrize(
    ("stage", "world_size", "accumulation"), [(1, 2, 3), (2, 2, 3), (3, 2, 3), (3, 1, 1), (3, 4, 1)]
)
def test_zero(folder, stage, world_size, accumulation):
    """Gradients of all chunks of all micro-steps meet in one reduction a step."""
    expected, ranks = compare(folder, stage, world_size, 8, 1, accumulation=accumulation)
    reductions = len(expected["norms"]) * len(expected["weights"])
    assert all(rank["seen"]["reduced"] == reductions for rank in ranks)


@pytest.mark.parametrize("stage", [1, 3])
def test_reductions_for_each_chunk(folder, stage):
    """What DeepSpeed's other optimizer wrappers are left with: every chunk as a micro-step of an accumulation."""
    compare(folder, stage, 2, 8, 2, accumulation=2, coalesce=False)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_with_fewer_chunks(folder, stage):
    """Contrast batches of seven: a rank with three pairs runs a dummy pair in the fourth chunk."""
    _, ranks = compare(folder, stage, 2, 7, 1)
    assert [rank["chunks"][0] for rank in ranks] == [[[0, 1, 1, 1]], [[1, 1, 1, 1]]]


@pytest.mark.parametrize(("accumulation", "num_chunked"), [(2, [2, 0]), (3, [2, 2])])
def test_micro_steps_with_and_without_chunks(folder, accumulation, num_chunked):
    """The tail of an epoch is small enough for one forward, in a step of its own or beside chunks."""
    _, ranks = compare(folder, 3, 2, 8, 3, accumulation=accumulation)
    assert [[len(step) for step in rank["chunks"]] for rank in ranks] == [num_chunked] * 2


def test_zero3_that_fetches_little_ahead(folder):
    """A forward that ends at the read-outs leaves DeepSpeed's order of fetching whole, and nothing behind."""
    policy = {
        "stage3_prefetch_bucket_size": 3000,
        "stage3_max_live_parameters": 9000,
        "stage3_max_reuse_distance": 0,
        "overlap_comm": True,
    }
    _, ranks = compare(folder, 3, 2, 8, 2, policy=policy)
    assert all(rank["zero3"] == (True, 1) for rank in ranks)


def test_adamw_with_an_active_clip(folder):
    expected, _ = compare(folder, 3, 2, 8, 2, optimizer=ADAMW, clip=0.05)
    assert min(expected["norms"]) > 0.05


@pytest.mark.parametrize(("teacher", "threshold"), [(of_vectors, None), (of_neighbours, 0.5)])
def test_symmetric_contrast(folder, teacher, threshold):
    """Without the noise filter, and with a teacher that does not know every entry."""
    loss = LossConfig(dist_weight=0.7, mcl_weight=0.9, margin=0.3, threshold=threshold, mcl_symmetric=True)
    compare(folder, 3, 2, 8, 2, loss=loss, teacher=teacher)


@pytest.mark.parametrize(("contrastive", "margin"), [("infonce", 0.0), ("arccse", 0.3), ("kdmcse", 0.3)])
def test_losses_in_place_of_l_mcl(folder, contrastive, margin):
    """Both directions, on two ranks in chunks."""
    loss = LossConfig(mcl_weight=0.9, contrastive=contrastive, margin=margin, temperature=0.5, mcl_symmetric=True)
    expected, _ = compare(folder, 3, 2, 8, 2, loss=loss)
    assert np.all(np.array(expected["sums"])[:, 2] > 0.01)


def test_a_base_in_four_bits(tmp_path):
    wide = save_student(tmp_path, hidden_size=64, head_dim=16)
    compare(wide, 3, 2, 8, 2, load_in_4bit=True)


@pytest.mark.parametrize(("stage", "checkpointing"), [(0, False), (0, True), (3, False), (3, True)])
def test_dropout_draws_the_same_twice(folder, stage, checkpointing):
    """The read-outs that the losses saw are those of the second pass, bit for bit; the last norm runs in that alone."""
    train_once = partial(train, lora_dropout=0.3, checkpointing=checkpointing, accumulation=2)
    size = 2 if stage else 1
    for found in run_gang(size, train_once, folder, pair_table(24), stage, 6, 2):
        seen = found["seen"]
        forwards = sum(len(micro) for step in found["chunks"] for micro in step)
        assert len(seen["first"]) == len(seen["second"]) == seen["norms"] == forwards > 4
        for first, second in zip(seen["first"], seen["second"], strict=True):
            np.testing.assert_array_equal(first, second)
        parts = np.concatenate([values for step in seen["first"] for values in step])
        assert len(np.unique(parts[:, 0])) > len(parts) / 2  # not all of the same texts


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_with_dropout(folder, monkeypatch, symmetric):
    """One graph over all chunks, each begun with the generator as caching began it, and one backward."""
    begun = []
    read = ChunkedBackward.read

    def remember(self, micro):
        begun.append(read(self, micro))
        return begun[-1]

    monkeypatch.setattr(ChunkedBackward, "read", remember)
    loss = LossConfig(dist_weight=0.7, mcl_weight=0.9, margin=0.3, mcl_symmetric=symmetric)
    engine, encoder = start_engine(folder, 0, lora_dropout=0.3)
    engine.student.train()
    pairs, batch = pair_table(12), np.arange(12)
    signals = of_vectors(pairs)
    step = TrainingStep(engine, World(), signals, BatchMaker(encoder, engine.student, True), loss, 5)
    [micro] = step.prepare([batch])
    counts = step.counts([micro])
    step.backward([micro], counts)
    found = {name: value.numpy() for name, value in engine.gradients().items()}

    engine.optimizer.zero_grad()
    outputs = []
    for state, chunk in zip(begun[0][0], micro.batches, strict=True):
        World().restore_random(state)
        outputs.append(engine.student(**chunk.tensors(torch.device("cpu"))))
    logits, one, other = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    terms = contrast_terms(one, other, one, other, directions(signals, batch, slice(0, 12), loss), loss)
    sums = torch.stack([supervised_sum(logits, micro.labels), terms.distance, terms.contrastive])
    (sums * torch.tensor([1.0, 0.7, 0.9]) / counts).sum().backward()
    expected = {name: value.numpy() for name, value in engine.gradients().items()}
    assert difference(found, expected) < TOLERANCE


def bf16_gradient(folder, stage: int, chunk: int | None) -> dict[str, np.ndarray]:
    """Of one contrast batch of 64 pairs; stage 0 is fp32 with the weights that bf16 has."""
    engine, encoder = start_engine(folder, stage, bf16=stage > 0)
    if not stage:
        for value in [*engine.student.parameters(), *engine.student.buffers()]:
            if value.is_floating_point() and value.dim() > 1:
                value.data = value.data.bfloat16().float()
    pairs = pair_table(64)
    step = TrainingStep(
        engine, World.current(), of_vectors(pairs), BatchMaker(encoder, engine.student, True), LOSS, chunk
    )
    micro_steps = step.prepare([np.arange(64)])
    step.backward(micro_steps, step.counts(micro_steps))
    return {name: value.numpy() for name, value in engine.gradients().items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_many_chunks_lose_nothing_in_bf16(tmp_path, stage):
    folder = save_student(tmp_path, "llama")
    [exact] = run_gang(1, bf16_gradient, folder, 0, None)
    [whole], [chunked] = (run_gang(1, bf16_gradient, folder, stage, chunk) for chunk in (None, 1))
    error, chunked_error = (
        np.sqrt(sum(np.square(one[name] - exact[name]).sum() for name in exact)) for one in (whole, chunked)
    )
    assert chunked_error < 1.1 * error and error > 0
