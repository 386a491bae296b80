"""Vectors from an adapter folder, and p(match) of pairs out of them."""

import itertools

import numpy as np
import pytest
import torch
from matchers import saved_adapter, single_scores
from peft.tuners.lora import LoraLayer
from tiny import sentences

from flipkd_dist import predict
from flipkd_dist.batches import BatchMaker
from flipkd_dist.embedder import Embedder
from flipkd_dist.errors import UserError
from flipkd_dist.predict import Matcher

TEXTS = [*sentences(12, seed=3, longest=30), "card " * 150, "kärte 丢失 \U0001f4b3"]
TEXTS += TEXTS[:3]
PAIRS = [*itertools.product(TEXTS[:4], TEXTS[3:9]), (TEXTS[12], TEXTS[0]), (TEXTS[0], TEXTS[12]), (TEXTS[5], TEXTS[5])]
KINDS = [("lora_a", False), ("lasttoken", False), ("mean", False), ("lora_a", True), ("mean", True)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def saved(request, tmp_path_factory):
    reads, both = request.param
    folder = tmp_path_factory.mktemp(f"{reads}{both}")
    return saved_adapter(folder, mode="alone", readout=reads, bidirectional=both)


def test_vectors_are_the_read_outs_of_training(saved):
    adapter, student, encoder = saved
    make_batch = BatchMaker(encoder, student, share_prefix=False)
    with torch.no_grad():
        _, expected, _ = student(**make_batch([(text, text) for text in TEXTS]).tensors("cpu"))
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    embedder = Embedder(adapter)
    assert embedder.dimension == expected.shape[1] == (8 if student.reads == "lora_a" else 48)
    for limits in ((512, 8192), (512, 1), (3, 300)):
        found = embedder.encode(TEXTS, *limits)
        assert found.dtype == np.float32 and np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert np.array_equal(found[-3:], found[:3])
    assert (found @ found.T).min() < 0.95  # they are not all alike
    assert embedder.encode([]).shape == (0, embedder.dimension)


def test_pairs_are_scored_out_of_vectors(saved):
    adapter, student, encoder = saved
    expected = single_scores(student, encoder, PAIRS)
    found = np.stack(Matcher(adapter).predict(PAIRS, 5), axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[:, 0], (1 + found[:, 1]) / 2, rtol=0, atol=2e-6)
    layers = Matcher(adapter).student.model.modules()
    assert sum(isinstance(layer, LoraLayer) for layer in layers) == (student.reads == "lora_a")  # the others are merged
    turned = np.stack(Matcher(adapter).predict([(b, a) for a, b in PAIRS]), axis=1)
    np.testing.assert_allclose(turned, found, rtol=0, atol=1e-6)
    assert found[:, 0].std() > 1e-3


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return Embedder(saved_adapter(tmp_path_factory.mktemp("one"), mode="alone")[0])


def test_windows_change_nothing(embedder, monkeypatch, caplog):
    expected = embedder.encode(TEXTS)
    monkeypatch.setattr("flipkd_dist.token_batches.WINDOW_PAIRS", 4)
    monkeypatch.setattr(predict.logger, "propagate", True)
    np.testing.assert_allclose(embedder.encode(TEXTS), expected, rtol=0, atol=1e-6)
    assert set(caplog.messages) == {"embed: 1 of 17 texts were cut to the maximum length"}
    caplog.clear()
    embedder.matcher.predict(PAIRS)
    assert set(caplog.messages) == {f"predict: 2 of {len(PAIRS)} pairs were cut to the maximum length"}


def test_a_text_is_computed_once_however_many_pairs_have_it(embedder, monkeypatch):
    counted = []
    readouts = embedder.matcher.student.readouts

    def count(**tensors):
        counted.append((len(tensors["last_tokens"]), tensors["input_ids"].numel()))
        return readouts(**tensors)

    monkeypatch.setattr(embedder.matcher.student, "readouts", count)
    best = embedder.matcher.rank(TEXTS[0], TEXTS[1:12])
    assert [texts for texts, _ in counted] == [12] and len(best) == 11
    counted.clear()
    embedder.encode(TEXTS, max_batch_tokens=300)
    assert (
        sum(texts for texts, _ in counted) == 14 and max(tokens for _, tokens in counted) <= 300 and len(counted) == 2
    )


def test_a_text_without_a_token_is_refused(embedder):
    with pytest.raises(UserError, match="into no tokens: remove"):
        embedder.encode(["card", "\u200b"])


def test_a_student_of_pairs_has_no_vectors(tmp_path):
    adapter, *_ = saved_adapter(tmp_path)
    with pytest.raises(
        UserError, match=r"adapter: this student reads two texts together .*student\.mode=alone"
    ) as error:
        Embedder(adapter)
    assert "\n" not in str(error.value)
