"""Shared rows against padded ones, span by span and to the last gradient."""

import pytest
import torch
from tiny import CAUSAL, save_student, sentences, started_student
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from flipkd_dist.base import shares_prefix
from flipkd_dist.batches import BatchMaker
from flipkd_dist.errors import UserError
from flipkd_dist.packing import pack
from flipkd_dist.prompt import EncodedPair
from flipkd_dist.shared_attention import SHARED, row_of_paths, shared_attention

TEXTS = sentences(19, seed=4)
LONG = " ".join(TEXTS[:7])
# Texts apart, one first text in three pairs, another in two, a pair that stands twice, a path twice as long as others.
PAIRS = [
    *zip(TEXTS[:8:2], TEXTS[1:8:2], strict=True),
    *((TEXTS[8], text) for text in TEXTS[9:12]),
    *((TEXTS[12], text) for text in TEXTS[13:15]),
    (TEXTS[15], TEXTS[16]),
    (TEXTS[15], TEXTS[16]),
    (LONG, TEXTS[17]),
]


def student_and_pairs(folder, **settings):
    student, encoder = started_student(folder, **settings)
    return student, encoder.prefix, [encoder.encode(a, b) for a, b in PAIRS]


def outputs_and_gradients(student, batch):
    outputs = student(**batch.tensors("cpu"))
    weights = [torch.randn(value.shape, generator=torch.Generator().manual_seed(7)) for value in outputs]
    student.zero_grad()
    sum((value * weight).sum() for value, weight in zip(outputs, weights, strict=True)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.trained_parameters().items()}
    return outputs, gradients


@pytest.mark.parametrize(
    ("family", "reads"), [*((family, "auto") for family in sorted(CAUSAL)), ("glm", "lasttoken"), ("qwen2", "mean")]
)
def test_shared_equals_padded(tmp_path, family, reads):
    student, prefix, pairs = student_and_pairs(save_student(tmp_path, family), readout=reads)
    padded, shared = pack(prefix, pairs, share=False), pack(prefix, pairs)
    assert padded.attention_mask.dim() == 2 and len(padded.input_ids) == len(pairs)
    assert len(shared.input_ids) == 1 and len(shared.paths) > 1
    first = {tuple(pair.ids[: pair.text_b.start]) for pair in pairs}
    assert len(first) == 8
    once = len(prefix) + sum(map(len, first)) + sum(len(pair.ids) - pair.text_b.start for pair in pairs)
    assert shared.num_tokens == shared.input_ids.numel() == once < padded.num_tokens
    expected, expected_gradients = outputs_and_gradients(student, padded)
    found, gradients = outputs_and_gradients(student, shared)
    for value, wanted in zip(found, expected, strict=True):
        assert (value - wanted).norm() / wanted.norm() < 1e-5
    for name, wanted in expected_gradients.items():
        assert wanted.norm() > 0, name
        assert (gradients[name] - wanted).norm() / wanted.norm() < 1e-5, name


def test_eager_attention_is_padded(tmp_path):
    folder = save_student(tmp_path)
    results = []
    for implementation in ("sdpa", "eager"):
        student, encoder = started_student(folder, attn_implementation=implementation)
        batch = BatchMaker(encoder, student, share_prefix=True)(PAIRS)
        assert len(batch.input_ids) == (1 if implementation == "sdpa" else len(PAIRS))
        results.append(student(**batch.tensors("cpu")))
    for value, wanted in zip(*results, strict=True):
        assert (value - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("number", [1, 5])  # a stranger, and a second text behind the same first text
def test_a_pair_does_not_see_its_neighbour(tmp_path, number):
    student, prefix, pairs = student_and_pairs(save_student(tmp_path))
    first, *_ = student(**pack(prefix, [pairs[4], pairs[number]]).tensors("cpu"))
    other, *_ = student(**pack(prefix, [pairs[4], pairs[number + 1]]).tensors("cpu"))
    assert torch.allclose(first[0], other[0], atol=1e-6)
    assert not torch.allclose(first[1], other[1], atol=1e-3)


def test_only_answers_pass_the_last_layers_end(tmp_path):
    student, prefix, pairs = student_and_pairs(save_student(tmp_path))
    rows = {}

    def count(name):
        return lambda _module, inputs: rows.update({name: inputs[0].shape[:-1].numel()})

    for name, module in student.named_modules():
        if name.endswith(("mlp.down_proj", "o_proj.lora_A.default", "q_proj.lora_A.default")):
            module.register_forward_pre_hook(count(name.split("layers.")[1]))
    batch = pack(prefix, pairs)
    student(**batch.tensors("cpu"))
    every, answers = batch.num_tokens, len(pairs)
    assert rows == {
        **{f"{layer}.self_attn.q_proj.lora_A.default": every for layer in (0, 1)},
        **{"0.self_attn.o_proj.lora_A.default": every, "1.self_attn.o_proj.lora_A.default": answers},
        **{"0.mlp.down_proj": every, "1.mlp.down_proj": answers},
    }


@pytest.mark.parametrize("encoder", ["o_proj", "down_proj"])
def test_a_readout_behind_the_attention_sees_every_token(tmp_path, encoder):
    targets = ["q_proj", "o_proj", "down_proj"]
    folder = save_student(tmp_path)
    student, prompt = started_student(folder, lora_target_modules=targets, encoder_module=encoder)
    pairs = [prompt.encode(a, b) for a, b in PAIRS]
    student.forward(**pack(prompt.prefix, pairs).tensors("cpu"))
    seen = []
    inner = student.model.get_submodule(student.encoder_name).lora_A["default"]
    inner.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    batch = pack(prompt.prefix, pairs)
    student(**batch.tensors("cpu"))
    assert seen == [batch.num_tokens]


def test_layers_behind_the_read_out_see_every_token(tmp_path):
    folder = save_student(tmp_path)
    student, prompt = started_student(folder, lora_target_modules=["0.self_attn.q_proj"], encoder_module="q_proj")
    pairs = [prompt.encode(a, b) for a, b in PAIRS]
    found = student(**pack(prompt.prefix, pairs).tensors("cpu"))
    assert student.behind_attention == []
    whole, prompt = started_student(folder)
    assert len(whole.behind_attention) == 2 and ".0." in student.encoder_name and ".1." in whole.encoder_name
    expected = student(**pack(prompt.prefix, pairs, share=False).tensors("cpu"))
    assert torch.allclose(found[0], expected[0], atol=1e-4)


def test_values_narrower_than_queries(tmp_path):
    """Multi-head latent attention (DeepSeek-V3): its values have a width of their own."""
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    latent = dict(q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
    torch.manual_seed(0)
    config = DeepseekV3Config(**shape, **latent, num_key_value_heads=4, first_k_dense_replace=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    pairs = [EncodedPair(list(range(5 + k, 12 + 2 * k)), slice(0, 2), slice(3, 5)) for k in range(3)]
    outputs = []
    for share in (False, True):
        batch = pack([1, 2, 3], pairs, share)
        mask, extra = batch.attention_mask, {}
        if share:
            model.set_attn_implementation(SHARED)
            mask, extra = row_of_paths("cpu"), {"paths": batch.paths, "places": batch.places}
        hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, **extra)
        outputs.append(hidden.last_hidden_state.flatten(0, 1)[batch.answer_positions])
    assert torch.allclose(*outputs, atol=1e-5) and outputs[0].std() > 1e-3


def test_paths_that_got_lost_are_told():
    states, marker = torch.randn(1, 2, 5, 4), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(UserError, match=r"^student\.attn_implementation: Identity does not hand the paths.*eager$"):
        shared_attention(nn.Identity(), states, states, states, marker)


def test_layout():
    pairs = [
        EncodedPair([11, 12, 13, 14], slice(0, 1), slice(2, 3)),
        EncodedPair([21, 22, 23], slice(0, 1), slice(2, 3)),
        EncodedPair([11, 12, 15, 16, 17], slice(0, 1), slice(2, 4)),
    ]
    batch = pack([1, 2], pairs)
    assert batch.input_ids.tolist() == [[1, 2, 11, 12, 13, 14, 15, 16, 17, 21, 22, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6, 2, 3, 4]]
    assert batch.segments.tolist() == [[6, 6, 0, 6, 1, 6, 5, 5, 6, 2, 6, 3]]
    assert batch.first_texts.tolist() == [0, 2, 0] and batch.answer_positions.tolist() == [5, 11, 8]
    assert batch.second_texts.tolist() == [1, 3, 5] and batch.last_tokens.tolist() == [2, 4, 9, 11, 0, 7]
    assert [path.tolist() for path in batch.paths] == [
        [[0, 1, 2, 3, 4, 5, 0], [0, 1, 9, 10, 11, 0, 0], [0, 1, 2, 3, 6, 7, 8]]
    ]
    flat = batch.paths[0].flatten()
    assert flat[batch.places].tolist() == list(range(12))
    assert batch.num_tokens == 12 and batch.num_unpacked == 21  # three rows of the longest pair
    padded = pack([1, 2], pairs, share=False)
    assert padded.attention_mask.tolist() == [[1] * 6 + [0], [1] * 5 + [0, 0], [1] * 7]
    assert padded.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert padded.answer_positions.tolist() == [5, 11, 20] and padded.first_texts.tolist() == [0, 2, 4]
    assert padded.second_texts.tolist() == [1, 3, 5] and padded.last_tokens.tolist() == [2, 4, 9, 11, 16, 19]
    assert padded.paths == () and padded.num_tokens == 18


def test_paths_of_like_length_share_a_rectangle():
    pairs = [EncodedPair([5] * length, slice(0, 1), slice(1, 2)) for length in (3, 4, 60, 4, 33)]
    pairs = [EncodedPair([number, *pair.ids[1:]], pair.text_a, pair.text_b) for number, pair in enumerate(pairs)]
    batch = pack([1], pairs)
    assert sorted(path.shape for path in batch.paths) == [(1, 4), (2, 5), (2, 61)]
    flat = torch.cat([path.flatten() for path in batch.paths])
    assert flat[batch.places].tolist() == list(range(batch.num_tokens))


def test_sliding_window_shorter_than_the_sequence_is_padded():
    window = CAUSAL["qwen2"](100)
    window.use_sliding_window, window.sliding_window = True, 32
    assert not shares_prefix(window, max_length=64)
    assert shares_prefix(window, max_length=32)
    assert shares_prefix(CAUSAL["glm"](100), max_length=10_000)


def test_what_the_last_layers_end_computes_for_each_read_out(tmp_path):
    """Answers alone, last tokens too, or every token; texts alone have no answer."""
    folder, rows = save_student(tmp_path), {}
    for mode in ("pair", "alone"):
        for reads in ("lora_a", "lasttoken", "mean"):
            student, encoder = started_student(folder, mode=mode, readout=reads)
            down = student.model.get_base_model().model.layers[-1].mlp.down_proj
            down.register_forward_pre_hook(
                lambda _module, inputs, key=(mode, reads): rows.update({key: inputs[0].shape[1]})
            )
            batch = BatchMaker(encoder, student, True)(PAIRS)
            student(**batch.tensors("cpu"))
            rows[mode, reads, "tokens"] = batch.num_tokens
    texts = len({text for pair in PAIRS for text in pair})
    assert rows["pair", "lora_a"] == len(PAIRS) and rows["alone", "lora_a"] == rows["alone", "lasttoken"] == texts
    assert rows["pair", "lasttoken"] == 1 + 2 * len(PAIRS) + 8  # token 0, answers, second texts, first texts
    assert all(rows[mode, "mean"] == rows[mode, "mean", "tokens"] for mode in ("pair", "alone"))
