"""Soft labels are the matcher's answers on the training pairs, kept whole or not at all."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from matchers import MadeUpMatcher, made_up_score, saved_adapter, single_scores
from tiny import pair_table

from flipkd_dist import soft_labels as module
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.evaluate import pair_texts
from flipkd_dist.soft_labels import soft_labels, student_fingerprint
from flipkd_dist.stop import StopRequest

PAIRS = pair_table(30)


@pytest.fixture
def label(tmp_path, monkeypatch):
    """`soft_labels` with a made-up student; `label.matchers` are those that were loaded."""
    matchers = []

    def load(*_, **__):
        matchers.append(MadeUpMatcher())
        return matchers[-1]

    monkeypatch.setattr(module, "Matcher", load)

    def found(inputs: str = "a") -> np.ndarray:
        stop = StopRequest(tmp_path / "stop")
        return soft_labels(tmp_path / "soft_labels.parquet", inputs, tmp_path, PAIRS, "cpu", stop)

    found.matchers = matchers
    return found


def test_they_are_those_of_the_adapter(tmp_path):
    adapter, student, encoder = saved_adapter(tmp_path)
    path = tmp_path / "labels.parquet"
    found = soft_labels(path, "a", adapter, PAIRS, "cpu", StopRequest(tmp_path / "stop"))
    expected = single_scores(student, encoder, pair_texts(PAIRS))[:, 0]
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)
    table = pq.read_table(path).to_pydict()
    assert table == {"pair": list(range(30)), "p_match": found.tolist()}


def test_the_same_inputs_are_scored_once(label, tmp_path):
    first = label()
    np.testing.assert_array_equal(first, [made_up_score(pair)[0] for pair in pair_texts(PAIRS)])
    np.testing.assert_array_equal(label(), first)
    assert len(label.matchers) == 1
    label("b")
    assert len(label.matchers) == 2
    (tmp_path / "soft_labels.parquet").write_bytes(b"PAR1")  # damaged
    np.testing.assert_array_equal(label("b"), first)
    assert len(label.matchers) == 3


def test_a_stop_leaves_nothing(label, tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(StoppedOnRequest, match="same command"):
        label()
    assert [path.name for path in tmp_path.iterdir()] == ["stop"]


def test_a_student_is_known_by_its_weights_and_its_card(tmp_path):
    with pytest.raises(UserError, match="no adapter yet: train the student first"):
        student_fingerprint(tmp_path)
    adapter, *_ = saved_adapter(tmp_path)
    before = student_fingerprint(adapter)
    card = adapter / "flipkd.json"
    card.write_text(card.read_text().replace('"step": 7', '"step": 8'))
    other = student_fingerprint(adapter)
    assert other != before
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert student_fingerprint(adapter) not in (before, other)
