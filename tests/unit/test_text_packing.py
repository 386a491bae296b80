"""Texts encoded alone, packed, against one text a row in transformers' own forward."""

import itertools

import numpy as np
import pytest
import torch
from tiny import save_student, sentences, started_student

from flipkd_dist.batches import BatchMaker
from flipkd_dist.prompt import EncodedText
from flipkd_dist.text_packing import pack_texts

WORDS = sentences(9, seed=4)
LONG = " ".join(WORDS)
# A text in three pairs, on both sides; a pair that stands twice; one of equal texts; a text twice as long as others.
PAIRS = [(WORDS[0], WORDS[1]), (WORDS[2], WORDS[0]), (WORDS[3], LONG), (WORDS[0], WORDS[4]), (WORDS[0], WORDS[1])]
PAIRS += [(WORDS[5], WORDS[5]), (WORDS[6], WORDS[7])]
READS = ("lora_a", "lasttoken", "mean")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_student(tmp_path_factory.mktemp(name), name) for name in ("glm", "qwen2", "llama")}


def alone(folder, reads, bidirectional=False, **settings):
    return started_student(folder, mode="alone", readout=reads, bidirectional=bidirectional, **settings)


def outputs_and_gradients(student, outputs):
    weights = [torch.randn(value.shape, generator=torch.Generator().manual_seed(7)) for value in outputs]
    student.zero_grad()
    sum((value * weight).sum() for value, weight in zip(outputs, weights, strict=True)).backward()
    return {name: parameter.grad for name, parameter in student.trained_parameters().items()}


def plain_vector(student, encoder, text, reads, bidirectional):
    """One text in eager attention, causal or with a mask of ones, read by hand."""
    ids = encoder.prefix + encoder.encode(text).ids
    hidden_of_a = []
    queries = student.model.get_base_model().model.layers[-1].self_attn.q_proj
    hook = queries.lora_A["default"].register_forward_hook(lambda _module, _inputs, output: hidden_of_a.append(output))
    zeros = torch.zeros(1, 1, len(ids), len(ids)) if bidirectional else None  # added to the scores: all are seen
    with hook:
        hidden = student.model.get_base_model().model(torch.tensor([ids]), attention_mask=zeros).last_hidden_state[0]
    if reads == "lasttoken":
        return hidden[-1]
    values = hidden_of_a[0][0] if reads == "lora_a" else hidden
    return values[len(encoder.prefix) : len(ids) - len(encoder.suffix)].mean(dim=0)


@pytest.mark.parametrize(
    ("family", "reads", "bidirectional"), itertools.product(("glm", "qwen2", "llama"), READS, (False, True))
)
def test_packed_is_one_text_a_row(folders, family, reads, bidirectional):
    student, encoder = alone(folders[family], reads, bidirectional)
    batch = BatchMaker(encoder, student, share_prefix=True)(PAIRS)
    assert len(batch.input_ids) == 1 and len(batch.paths) > 1 and len(batch.last_tokens) == 9
    found = student(**batch.tensors("cpu"))
    gradients = outputs_and_gradients(student, found)

    plain, encoder = started_student(folders[family], mode="alone", readout=reads, attn_implementation="eager")
    sides = [
        torch.stack([plain_vector(plain, encoder, text, reads, bidirectional) for text in side])
        for side in zip(*PAIRS, strict=True)
    ]
    cosine = torch.cosine_similarity(*(side.double() for side in sides), dim=1).clamp(max=1 - 2e-6)  # of equal texts
    expected = [torch.stack([(1 + cosine) / 2, (1 - cosine) / 2], dim=1).log().float(), *sides]
    for value, wanted in zip(found, expected, strict=True):
        assert (value - wanted).norm() / wanted.norm() < 1e-5
    assert found[0].std() > 0.1
    wanted = outputs_and_gradients(plain, expected)
    idle = {name for name, value in wanted.items() if value is None}
    assert len(idle) == (7 if reads == "lora_a" else 0)  # of the last layer but the A that is read
    for name, gradient in gradients.items():
        if name in idle:
            assert gradient.norm() == 0, name
        else:
            assert (gradient - wanted[name]).norm() / wanted[name].norm() < 1e-5 and wanted[name].norm() > 0, name


@pytest.mark.parametrize(("reads", "bidirectional"), itertools.product(READS, (False, True)))
@torch.no_grad()
def test_layouts_agree(folders, reads, bidirectional):
    """A row, padded rows in sdpa and in eager attention; pairs in another order and turned round."""
    student, encoder = alone(folders["glm"], reads, bidirectional)
    eager, _ = alone(folders["glm"], reads, bidirectional, attn_implementation="eager")
    expected = student(**BatchMaker(encoder, student, True)(PAIRS).tensors("cpu"))
    for other, share in ((student, False), (eager, True)):
        batch = BatchMaker(encoder, other, share)(PAIRS)
        assert len(batch.input_ids) == 9
        for value, wanted in zip(other(**batch.tensors("cpu")), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    for text in (PAIRS[0][0], LONG):  # one row without padding, for which transformers makes no mask
        one, row = (student(**BatchMaker(encoder, student, share)([(text, text)]).tensors("cpu")) for share in (0, 1))
        torch.testing.assert_close(one[1], row[1], rtol=1e-5, atol=1e-5)
    turned = student(**BatchMaker(encoder, student, True)([(b, a) for a, b in PAIRS[::-1]]).tensors("cpu"))
    logits, first, second = (value.flip(0) for value in turned)
    for value, wanted in zip((logits, second, first), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_directions_differ_and_texts_do_not_see_each_other(folders, bidirectional):
    vectors = {}
    for reads in READS:
        student, encoder = alone(folders["glm"], reads, bidirectional)
        assert bidirectional != any(getattr(part, "is_causal", False) for part in student.model.modules())
        make_batch = BatchMaker(encoder, student, True)
        alone_, other = (student(**make_batch(pairs).tensors("cpu"))[1] for pairs in (PAIRS[:1], PAIRS))
        torch.testing.assert_close(alone_[0], other[0], rtol=1e-5, atol=1e-6)
        causal, _ = alone(folders["glm"], reads)
        vectors[reads] = causal(**BatchMaker(encoder, causal, True)(PAIRS).tensors("cpu"))[1]
        assert torch.allclose(vectors[reads], other, atol=1e-3) != bidirectional


def test_layout():
    texts = [EncodedText([11, 12, 7], slice(0, 2)), EncodedText([21, 7], slice(0, 1), truncated=True)]
    batch = pack_texts([1, 2], texts, [(0, 1), (1, 0), (0, 0)])
    assert batch.input_ids.tolist() == [[1, 2, 11, 12, 7, 21, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.segments.tolist() == [[2, 2, 0, 0, 2, 1, 2]]
    assert batch.first_texts.tolist() == [0, 1, 0] and batch.second_texts.tolist() == [1, 0, 0]
    assert batch.last_tokens.tolist() == batch.answer_positions.tolist() == [4, 6]
    assert sorted(path.tolist() for path in batch.paths) == [[[0, 1, 2, 3, 4]], [[0, 1, 5, 6]]]
    assert (batch.num_tokens, batch.num_truncated, batch.num_unpacked) == (7, 2, 30) and batch.path_masks == ()
    apart = pack_texts([1, 2], texts, [(0, 1)], bidirectional=True)
    assert apart.input_ids.tolist() == [[1, 2, 11, 12, 7, 1, 2, 21, 7]]
    assert apart.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert apart.segments.tolist() == [[2, 2, 0, 0, 2, 2, 2, 1, 2]] and apart.last_tokens.tolist() == [4, 8]
    padded = pack_texts([1, 2], texts, [(0, 1)], share=False)
    assert padded.input_ids.tolist() == [[1, 2, 11, 12, 7], [1, 2, 21, 7, 0]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert padded.segments.tolist() == [[2, 2, 0, 0, 2], [2, 2, 1, 2, 2]] and padded.last_tokens.tolist() == [4, 8]
    vectors = pack_texts([1, 2], texts)
    assert vectors.first_texts.tolist() == [0, 1] and vectors.second_texts.tolist() == []
    assert (vectors.num_truncated, vectors.num_unpacked) == (1, 10)


def test_masks_say_where_paths_have_tokens():
    texts = [EncodedText([5] * length, slice(0, length)) for length in (5, 6, 7, 40)]
    batch = pack_texts([1], texts, bidirectional=True)
    lengths = np.concatenate([mask.sum(dim=(1, 2, 3)).numpy() for mask in batch.path_masks])
    assert sorted(lengths.tolist()) == [6, 7, 8, 41]
    for path, mask in zip(batch.paths, batch.path_masks, strict=True):
        assert mask.shape == (len(path), 1, 1, path.shape[1]) and not path[~mask[:, 0, 0]].any()
