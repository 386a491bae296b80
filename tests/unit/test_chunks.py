"""The pieces of a chunked contrast batch: how rows are divided, the matrix by blocks, gradients of read-outs."""

import numpy as np
import pytest
import torch
from tiny import pair_table, save_student, sentences, signals_of, started_student, unit_vectors

from flipkd_dist import chunks
from flipkd_dist.batches import BatchMaker
from flipkd_dist.chunks import ChunkedBackward, ChunkedMicroStep, RowBlocks, chunk_slices
from flipkd_dist.config import LossConfig
from flipkd_dist.contrast import ContrastRows
from flipkd_dist.contrast_terms import contrast_terms, directions
from flipkd_dist.phases import no_clock
from flipkd_dist.world import World

TEXTS = list(zip(*[iter(sentences(12, seed=4))] * 2, strict=True))


def sizes(*arguments) -> list[int]:
    return [part.stop - part.start for part in chunk_slices(*arguments)]


def test_chunks_are_even_and_as_many_on_every_rank():
    assert sizes(8, 8, None) == sizes(8, 8, 8) == sizes(8, 8, 100) == [8]
    assert sizes(65, 65, 64) == [32, 33]
    assert sizes(7, 8, 3) == [2, 2, 3] and sizes(8, 8, 3) == [2, 3, 3]
    assert sizes(3, 4, 1) == [0, 1, 1, 1]  # a rank with fewer rows
    assert sizes(0, 1, 1) == [0] and sizes(0, 0, 4) == [0]
    for rows in range(1, 40):
        for size in range(1, 12):
            assert max(sizes(rows, rows, size)) <= size and sum(sizes(rows, rows, size)) == rows


@pytest.fixture
def signals():
    pairs = pair_table(20)
    return signals_of(pairs, unit_vectors(len(pairs.texts)))


@pytest.mark.parametrize("entries", [1, 50, 2**17])
def test_blocks_are_the_matrix(signals, monkeypatch, entries):
    """Row for row, in both directions; none holds more entries than it may, or two rows."""
    monkeypatch.setattr(chunks, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(chunks, "BLOCK_ROWS", 2)
    batch, own, loss = np.arange(20)[::-1].copy(), slice(4, 17), LossConfig(mcl_symmetric=True)
    whole = directions(signals, batch, own, loss)
    blocks = list(RowBlocks(signals, batch, own, loss))
    assert all(rows[0].keep.numel() <= max(entries, 2 * 20) for _, rows in blocks)
    assert [row for place, _ in blocks for row in range(13)[place]] == list(range(13))
    for direction in (0, 1):
        for name in ContrastRows.__dataclass_fields__:
            parts = torch.cat([getattr(rows[direction], name) for _, rows in blocks])
            expected = getattr(whole[direction], name)
            assert torch.equal(parts, expected) if parts.dtype != torch.float32 else torch.allclose(parts, expected)
    counts = RowBlocks(signals, batch, own, loss).counts()
    assert torch.equal(counts, whole[0].counts()) and counts[0] == 13 and counts[2] > 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("contrastive", ["mcl", "infonce", "arccse", "kdmcse"])
def test_gradients_of_the_readouts(signals, monkeypatch, symmetric, contrastive):
    """Block by block as over the whole matrix; the terms are sums of the blocks'."""
    monkeypatch.setattr(chunks, "BLOCK_ENTRIES", 100)
    monkeypatch.setattr(chunks, "BLOCK_ROWS", 2)
    margin = 0.0 if contrastive == "infonce" else 0.3
    loss = LossConfig(contrastive=contrastive, margin=margin, mcl_symmetric=symmetric)
    batch, own, scale = np.arange(20), slice(0, 20), torch.tensor([0.0, 2.0, 3.0])
    readouts = [torch.randn(20, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    blocks = RowBlocks(signals, batch, own, loss)
    micro = ChunkedMicroStep([], [], torch.zeros(20), blocks, [20], blocks.counts())
    found, terms = ChunkedBackward(None, World(), loss, no_clock).cache_gradients(micro, readouts, scale)
    leaves = [values.clone().requires_grad_() for values in readouts]
    expected = contrast_terms(*leaves, *leaves, directions(signals, batch, own, loss), loss)
    (2 * expected.distance + 3 * expected.contrastive).backward()
    for gradient, leaf in zip(found, leaves, strict=True):
        assert leaf.grad.norm() > 0.1
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-6)
    for name in ("distance", "contrastive", "margin", "statistics"):
        torch.testing.assert_close(
            getattr(terms, name), getattr(expected, name).detach().double(), rtol=1e-6, atol=1e-5
        )


def test_the_generator_goes_back():
    states = World().random_state()
    drawn = torch.rand(3)
    World().restore_random(states)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "module"), [("glm", None), ("qwen2", "o_proj"), ("glm_original", None)])
def test_readouts_without_the_rest(tmp_path, family, module, checkpointing):
    """What a forward with gradient reads, bit for bit, dropout included; the last layer's MLP does not run for it."""
    folder = save_student(tmp_path, family)
    student, encoder = started_student(folder, lora_dropout=0.3, encoder_module=module)
    if checkpointing and family != "glm_original":
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = BatchMaker(encoder, student.train(), family != "glm_original")(TEXTS).tensors(torch.device("cpu"))
    ran = []
    for name, part in student.named_modules():
        if name.endswith("mlp"):
            part.register_forward_hook(lambda *_, name=name: ran.append(name))
    state = World().random_state()
    found = student.readouts(**batch)
    in_first, ran[:] = list(ran), []
    World().restore_random(state)
    _, *expected = student(**batch)
    assert ran[: len(in_first)] == in_first and len(in_first) == len(ran) - 1
    assert all(torch.equal(*both) and not both[0].requires_grad for both in zip(found, expected, strict=True))
    assert expected[0].requires_grad
