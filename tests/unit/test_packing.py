"""Packed rows against padded ones, span by span and to the last gradient."""

import numpy as np
import pytest
import torch
from tiny import CAUSAL, save_student, sentences, started_student

from flipkd_dist.base import shares_prefix
from flipkd_dist.packing import ComputeCost, pack, plan_rows
from flipkd_dist.prompt import EncodedPair

COST = ComputeCost(linear=1000.0, attention=1.0)


def student_and_pairs(folder, attn_implementation="auto", num_pairs=9):
    student, encoder = started_student(folder, attn_implementation=attn_implementation)
    texts = sentences(2 * num_pairs, seed=4)
    return student, encoder.prefix, [encoder.encode(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]


def outputs_and_gradients(student, batch):
    outputs = student(**batch.tensors("cpu"))
    weights = [torch.randn(value.shape, generator=torch.Generator().manual_seed(7)) for value in outputs]
    student.zero_grad()
    sum((value * weight).sum() for value, weight in zip(outputs, weights, strict=True)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.lora_parameters().items()}
    return outputs, gradients


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_packed_equals_padded(tmp_path, family):
    student, prefix, pairs = student_and_pairs(save_student(tmp_path, family))
    padded = pack(prefix, pairs, plan_rows([len(p.ids) for p in pairs], len(prefix), COST, share_prefix=False))
    assert padded.attention_mask.dim() == 2 and len(padded.input_ids) == len(pairs)
    expected, expected_gradients = outputs_and_gradients(student, padded)
    for rows in ([list(range(9))], [[0, 3, 6, 8], [1, 2], [4, 5, 7]]):
        packed = pack(prefix, pairs, rows)
        assert packed.attention_mask.dim() == 4
        found, gradients = outputs_and_gradients(student, packed)
        for value, wanted in zip(found, expected, strict=True):
            assert (value - wanted).norm() / wanted.norm() < 1e-5
        for name, wanted in expected_gradients.items():
            assert wanted.norm() > 0, name
            assert (gradients[name] - wanted).norm() / wanted.norm() < 1e-5, name


def test_eager_attention_takes_the_mask_too(tmp_path):
    folder = save_student(tmp_path)
    results = []
    for implementation in ("sdpa", "eager"):
        student, prefix, pairs = student_and_pairs(folder, implementation)
        results.append(student(**pack(prefix, pairs, [list(range(9))]).tensors("cpu")))
    for value, wanted in zip(*results, strict=True):
        assert (value - wanted).norm() / wanted.norm() < 1e-5


def test_a_pair_does_not_see_its_neighbour(tmp_path):
    student, prefix, pairs = student_and_pairs(save_student(tmp_path))
    first, *_ = student(**pack(prefix, [pairs[0], pairs[1]], [[0, 1]]).tensors("cpu"))
    other, *_ = student(**pack(prefix, [pairs[0], pairs[2]], [[0, 1]]).tensors("cpu"))
    assert torch.allclose(first[0], other[0], atol=1e-6)
    assert not torch.allclose(first[1], other[1], atol=1e-3)


def test_layout():
    pairs = [
        EncodedPair([11, 12, 13, 14], slice(0, 1), slice(2, 3)),
        EncodedPair([21, 22, 23], slice(0, 2), slice(2, 3)),
    ]
    batch = pack([1, 2], pairs, [[0, 1]])
    assert batch.input_ids.tolist() == [[1, 2, 11, 12, 13, 14, 21, 22, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4]]
    assert batch.segments.tolist() == [[4, 4, 0, 4, 1, 4, 2, 2, 3]]
    assert batch.answer_positions.tolist() == [5, 8]
    mask = batch.attention_mask[0, 0].int().tolist()
    assert mask[5] == [1, 1, 1, 1, 1, 1, 0, 0, 0] and mask[7] == [1, 1, 0, 0, 0, 0, 1, 1, 0]
    assert batch.num_tokens == 9
    assert batch.num_unpacked == 12  # two rows of the longer pair
    padded = pack([1, 2], pairs, [[0], [1]])
    assert padded.attention_mask.tolist() == [[1] * 6, [1] * 5 + [0]]
    assert padded.answer_positions.tolist() == [5, 10]


def test_plan_weighs_padding_prefix_and_attention():
    """A long prefix asks for few rows, dear attention for many; every pair stands once."""
    lengths = np.random.default_rng(0).integers(4, 30, size=40).tolist()
    counts = {}
    for prefix, attention in ((200, 0.01), (1, 0.01), (1, 1000.0)):
        rows = plan_rows(lengths, prefix, ComputeCost(1000.0, attention))
        assert sorted(pair for row in rows for pair in row) == list(range(40))
        counts[prefix, attention] = len(rows)
    assert counts[200, 0.01] < counts[1, 1000.0]
    assert len(plan_rows(lengths, 5, COST, share_prefix=False)) == 40


def test_sliding_window_shorter_than_the_sequence_is_padded():
    window = CAUSAL["qwen2"](100)
    window.use_sliding_window, window.sliding_window = True, 32
    assert not shares_prefix(window, max_length=64)
    assert shares_prefix(window, max_length=32)
    assert shares_prefix(CAUSAL["glm"](100), max_length=10_000)
