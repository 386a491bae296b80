"""Prediction answers as pair by pair, however pairs are grouped; LoRA in the base's weights; ranking."""

import dataclasses

import numpy as np
import pytest
import torch
from matchers import saved_adapter, single_scores
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import sentences

from flipkd_dist import predict
from flipkd_dist.adapter import WEIGHTS
from flipkd_dist.batches import BatchMaker
from flipkd_dist.errors import UserError
from flipkd_dist.predict import Matcher, Ranked
from flipkd_dist.token_batches import BatchLimits

QUERIES = sentences(4, seed=3, longest=30)
CANDIDATES = sentences(9, seed=4, longest=20)
TEXTS = [
    *((query, text) for text in CANDIDATES for query in QUERIES),
    ("card " * 90, "lost pin " * 40),  # cut to the maximum length
    ("card " * 90, "lost"),  # its first text too, but at another length
    ("kärte 丢失 \U0001f4b3", "my card"),
    (CANDIDATES[0], CANDIDATES[0]),
]


@pytest.fixture(scope="module", params=["glm", "qwen2", "glm_original"])
def saved(request, tmp_path_factory):
    module = "query_key_value" if request.param == "glm_original" else "q_proj"
    adapter, student, encoder = saved_adapter(tmp_path_factory.mktemp(request.param), request.param, module)
    return adapter, single_scores(student, encoder, TEXTS)


def test_a_streamed_base_answers_the_same_and_stays_out_of_memory(saved):
    adapter, expected = saved
    matcher = Matcher(adapter, streamed=True)
    found = np.stack(matcher.predict(TEXTS), axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    frozen = [parameter for parameter in matcher.student.parameters() if not parameter.requires_grad]
    held = sum(parameter.untyped_storage().nbytes() for parameter in frozen)
    assert len(frozen) > 10 and held == sum(parameter.element_size() for parameter in frozen)  # a number in each place


LIMITS = [BatchLimits(), BatchLimits(1), BatchLimits(400), BatchLimits(10_000, 3)]


def test_scores_are_those_of_single_pairs_in_their_order(saved):
    adapter, expected = saved
    assert expected[:, 0].std() > 1e-2 and expected[:, 1].std() > 1e-3
    for merge in (True, False):
        matcher = Matcher(adapter, merge=merge)
        assert matcher.make_batch.share_prefix == ("glm_original" not in str(adapter))
        for limits in LIMITS:
            found = np.stack(matcher.predict(TEXTS, limits.pairs, limits.tokens), axis=1)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert [part.shape for part in matcher.predict([])] == [(0,), (0,)]


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    return Matcher(saved_adapter(tmp_path_factory.mktemp("glm"))[0])


def test_batches_follow_the_limits(matcher, monkeypatch):
    made = []
    make_batch = matcher.make_batch

    class Noting:
        encoder, share_prefix = make_batch.encoder, True

        def of_encoded(self, pairs):
            made.append(len(pairs))
            return make_batch.of_encoded(pairs)

    monkeypatch.setattr(matcher, "make_batch", Noting())
    matcher.predict(TEXTS, 7)
    assert max(made) == 7 and sum(made) == len(TEXTS)
    made.clear()
    matcher.predict(TEXTS)
    assert made == [len(TEXTS)]


def test_padded_batches_are_cut_by_padded_tokens(matcher, monkeypatch):
    sizes = []
    padded = BatchMaker(matcher.make_batch.encoder, matcher.student, share_prefix=False)
    forward = matcher.student.forward

    def note(**tensors):
        sizes.append(tensors["input_ids"].numel())
        return forward(**tensors)

    expected = matcher.predict(TEXTS)
    monkeypatch.setattr(matcher, "make_batch", padded)
    monkeypatch.setattr(matcher.student, "forward", note)
    np.testing.assert_allclose(matcher.predict(TEXTS, max_batch_tokens=300), expected, rtol=0, atol=1e-5)
    assert 150 < np.median(sizes) <= max(sizes) <= 300


def test_a_pair_is_turned_into_tokens_once(matcher, monkeypatch):
    encoded = []
    encoder = matcher.make_batch.encoder
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *pair: encoded.append(pair) or encode(*pair))
    matcher.predict(TEXTS, 7)
    assert sorted(encoded) == sorted(TEXTS)


def test_a_pair_that_comes_again_is_computed_once_and_scores_the_same(matcher, monkeypatch):
    counted = []
    forward = matcher.student.forward

    def count(**tensors):
        counted.append(len(tensors["answer_positions"]))
        return forward(**tensors)

    monkeypatch.setattr(matcher.student, "forward", count)
    texts = [pair for pair in TEXTS[:6] for _ in range(3)] + TEXTS[:6]
    p_match, similarity = matcher.predict(texts, 4)
    assert sum(counted) == 6
    for scores in (p_match, similarity):
        assert scores[:18].reshape(6, 3).tolist() == [[score] * 3 for score in scores[18:]]


def test_cut_pairs_are_counted_over_all_windows(matcher, monkeypatch, caplog):
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 5)
    monkeypatch.setattr(predict.logger, "propagate", True)
    expected = matcher.predict([*TEXTS[:12], TEXTS[-4], TEXTS[-4]])
    # A set: pytest may listen at the logger and at the root, where an earlier test has stopped propagation.
    assert set(caplog.messages) == {"predict: 2 of 14 pairs were cut to the maximum length"}
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 4096)
    found = matcher.predict([*TEXTS[:12], TEXTS[-4], TEXTS[-4]])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_text_without_a_token_is_refused(matcher):
    with pytest.raises(UserError, match="into no tokens: remove this pair"):
        matcher.predict([("card", "\u200b")])


def test_lora_is_in_the_weights_but_where_the_readout_needs_it(matcher, tmp_path):
    def with_lora(one):
        return [name for name, module in one.student.model.named_modules() if isinstance(module, LoraLayer)]

    assert with_lora(matcher) == [matcher.student.encoder_name]
    adapter, student, _ = saved_adapter(tmp_path)
    assert len(with_lora(Matcher(adapter, merge=False))) == 8
    plain = [module for module in student.model.modules() if isinstance(module, LoraLayer)]
    name = matcher.student.encoder_name.replace("q_proj", "v_proj")
    wanted = plain[[n for n, m in student.model.named_modules() if isinstance(m, LoraLayer)].index(name)]
    delta = wanted.lora_B["default"].weight @ wanted.lora_A["default"].weight
    merged = matcher.student.model.get_submodule(name).weight
    torch.testing.assert_close(merged, wanted.base_layer.weight + delta, rtol=0, atol=1e-6)
    assert delta.abs().max() > 1e-2


def test_four_bits_and_bf16_are_not_merged(tmp_path, monkeypatch):
    """Not even where merging is asked for. By what is called: four bits do not run in a unit test."""
    adapter, *_ = saved_adapter(tmp_path)
    card = predict.AdapterCard.read(adapter)
    merged = []
    monkeypatch.setattr(predict, "merge_lora", merged.append)
    Matcher(adapter)
    assert len(merged) == 1
    in_bf16 = dataclasses.replace(card, dtype="bfloat16")
    monkeypatch.setattr(predict.AdapterCard, "read", lambda _: in_bf16)
    Matcher(adapter, device="cpu:0", merge=True)  # a CPU by another name, which does not turn bf16 into fp32
    assert len(merged) == 1
    monkeypatch.setattr(predict, "load_student", _without(predict.load_student, "load_in_4bit"))
    in_four_bits = dataclasses.replace(card, load_in_4bit=True)
    monkeypatch.setattr(predict.AdapterCard, "read", lambda _: in_four_bits)
    Matcher(adapter, merge=True)
    assert len(merged) == 1


def _without(load, setting):
    return lambda base, settings, *rest, **more: load(base, settings.model_copy(update={setting: False}), *rest, **more)


@pytest.mark.parametrize("damage", ["no update", "another base"])
def test_the_probe_still_tells_what_was_not_trained(tmp_path, damage):
    adapter, *_ = saved_adapter(tmp_path)
    path = adapter / WEIGHTS if damage == "no update" else tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if damage == "another base" or ".lora_B." in name:
            weights[name] = weights[name] * 0.5
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(RuntimeError if damage == "no update" else UserError, match=r"probe pair|not the base"):
        Matcher(adapter)


def test_rank_sorts_by_p_match(matcher):
    p_match, similarity = matcher.predict([(QUERIES[0], text) for text in CANDIDATES])
    best = matcher.rank(QUERIES[0], CANDIDATES)
    assert [one.index for one in best] == np.argsort(-p_match).tolist()
    np.testing.assert_allclose([one.p_match for one in best], np.sort(p_match)[::-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose([one.similarity for one in best], similarity[np.argsort(-p_match)], rtol=0, atol=1e-6)
    assert matcher.rank(QUERIES[0], CANDIDATES, top_k=3) == best[:3]
    assert len(matcher.rank(QUERIES[0], CANDIDATES, top_k=100)) == len(CANDIDATES)
    assert matcher.rank(QUERIES[0], []) == []
    assert len({one.p_match for one in best}) == len(CANDIDATES)


def test_equal_candidates_keep_their_order(matcher):
    best = matcher.rank(QUERIES[0], [CANDIDATES[1], CANDIDATES[0], CANDIDATES[1], CANDIDATES[0]], batch_size=1)
    assert [one.index for one in best] in ([0, 2, 1, 3], [1, 3, 0, 2])
    assert predict.ranked([0.5, 0.7, 0.5], [0.1, 0.2, 0.3], 2) == [Ranked(1, 0.7, 0.2), Ranked(0, 0.5, 0.1)]
