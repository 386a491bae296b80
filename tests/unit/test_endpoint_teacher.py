"""The teacher behind an endpoint: order, retries, pace, errors in one line, and never a key that shows."""

import json
import logging
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from embedding_server import DIM, EmbeddingServer, vector_of

from flipkd_dist import endpoint_teacher
from flipkd_dist.config import validate
from flipkd_dist.errors import UserError
from flipkd_dist.teacher_source import largest_hidden_size, text_teacher

pytest.importorskip("openai")
TEXTS = [f"question {number}" for number in range(7)]
SECRET = "sk-this-is-secret"


@pytest.fixture
def server(monkeypatch):
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", SECRET)
    server = EmbeddingServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(server, tmp_path):
    def make(**teacher):
        address = {"model_name_or_path": "tiny", "api_base": server.api_base, "api_key_env": "TEST_KEY"}
        return validate({"name": "run", "output_dir": str(tmp_path), "teacher": address | teacher}, "test")

    return make


def unit(texts, model="tiny"):
    vectors = np.array([vector_of(text, model) for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_in_the_order_given_of_unit_length(server, config):
    source = text_teacher(config())
    assert (source.spec.hidden_size, source.largest_hidden_size, largest_hidden_size(config())) == (DIM,) * 3
    teacher = pickle.loads(pickle.dumps(source)).load()
    server.sizes.clear()
    vectors = teacher.encode(TEXTS, batch_size=3)
    assert server.sizes == [3, 3, 1]
    assert vectors.dtype == np.float32 and np.abs(vectors - unit(TEXTS)).max() < 1e-6
    assert teacher.num_truncated == 0 and teacher.encode([], 3).shape == (0, DIM)


def test_the_prompt_stands_before_every_text(config):
    source = text_teacher(config(prompt="query: "))
    assert source.spec.prompt == "query: " and source.spec.key != text_teacher(config()).spec.key
    assert np.abs(source.load().encode(["a"], 3) - unit(["query: a"])).max() < 1e-6


def test_failures_that_pass_are_retried(server, config):
    teacher = text_teacher(config()).load()
    server.times.clear()
    server.failures = [429, 500, "cut", 503, 429]
    assert np.abs(teacher.encode(TEXTS, 64) - unit(TEXTS)).max() < 1e-6
    assert len(server.times) == 6


def test_the_rate_of_all_workers_together_is_kept(server, config, monkeypatch):
    source = text_teacher(config(requests_per_minute=1200, num_workers=[1, 2]))
    assert source.parts[0].endpoint.requests_per_minute == 600  # 0.1 s apart
    teacher = source.load()
    server.times.clear()
    teacher.encode(TEXTS[:4], 1)
    assert server.times[-1] - server.times[0] > 0.2  # 0.3 but for the server's own delays
    slept = []
    monkeypatch.setattr(endpoint_teacher, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: 7.0))
    teacher = source.load()
    assert slept == [0]
    teacher.encode(TEXTS[:2], 1)
    assert np.allclose(slept, [0, 0.1, 0.1])
    text_teacher(config()).load().encode(TEXTS[:4], 1)
    assert len(slept) == 3  # no rate, no waiting


def changed(**values):
    return lambda answer: answer | values


def bad_vector(value):
    def change(answer):
        answer["data"][0]["embedding"] = value
        return answer

    return change


def same_index(answer):
    answer["data"][0]["index"] = 0
    return answer


@pytest.mark.parametrize(
    "failure, said",
    [
        (401, "the key in TEST_KEY is refused"),
        (403, "the key in TEST_KEY is refused"),
        (404, "no such model or address"),
        (429, "lower teacher.requests_per_minute"),
        (500, "fails after 8 retries with status 500"),
        ("cut", "cannot be reached"),
        (lambda answer: b"<html>", "does not answer with"),
        (lambda answer: {}, "does not answer with"),
        (lambda answer: [1], "does not answer with"),
        (changed(data=[]), "does not answer with"),
        (lambda answer: answer | {"data": answer["data"][:-1]}, "6 vectors for 7 texts"),
        (same_index, "one vector per text"),
        (bad_vector([0.5] * (DIM - 1)), "one vector per text"),
        (bad_vector("no numbers"), "one vector per text"),
        (bad_vector([float("nan")] * DIM), "zero or not finite"),
        (bad_vector([0.0] * DIM), "zero or not finite"),
        (lambda a: a | {"data": [d | {"embedding": [1.0] * 5} for d in a["data"]]}, "of 5 numbers, before of 12"),
    ],
)
def test_errors_are_one_line_without_the_key(server, config, caplog, failure, said):
    teacher = text_teacher(config()).load()
    server.always = failure
    with caplog.at_level(logging.DEBUG, logger="flipkd_dist"), pytest.raises(UserError) as error:
        teacher.encode(TEXTS, 64)
    message = str(error.value)
    assert SECRET[:12] not in message
    assert said in message and "127.0.0.1" in message and "\n" not in message
    assert SECRET not in message + caplog.text


def test_a_server_that_is_not_there(config, server, monkeypatch):
    monkeypatch.setattr(endpoint_teacher, "MAX_RETRIES", 1)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be reached"):
        text_teacher(config())


def test_another_model_is_named(config):
    with pytest.raises(UserError, match="no such model"):
        text_teacher(config(model_name_or_path="other"))


def test_a_text_that_is_too_long_is_named(server, config):
    teacher = text_teacher(config()).load()
    with pytest.raises(UserError) as error:
        teacher.encode([*TEXTS, "too long a tale " * 20, "b"], 64)
    assert "'too long a tale too" in str(error.value) and "maximum context length" in str(error.value)
    server.failures = [400, 422]  # the server took offence at the size of the batch alone
    assert np.abs(teacher.encode(TEXTS, 64) - unit(TEXTS)).max() < 1e-6


def test_a_server_that_needs_no_key(server, config, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    text_teacher(config())
    assert {*server.keys} == {"Bearer EMPTY"}
    server.always = 401
    with pytest.raises(UserError, match="the key in TEST_KEY is missing: set TEST_KEY"):
        text_teacher(config())


def test_the_key_is_sent_and_nowhere_kept(server, config, tmp_path):
    source = text_teacher(config())
    source.load().encode(TEXTS, 3)
    assert {*server.keys} == {f"Bearer {SECRET}"}
    assert SECRET.encode() not in pickle.dumps(source) and SECRET not in repr(source)
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(stored) == 1 and SECRET not in stored[0].read_text()


def test_no_package(config, monkeypatch):
    monkeypatch.setattr(endpoint_teacher, "_packages", set)
    with pytest.raises(UserError, match="pip install"):
        text_teacher(config())


def test_a_run_that_has_vectors_needs_the_server_only_for_more(server, config, tmp_path):
    source = text_teacher(config())
    teacher = source.load()
    assert not list(tmp_path.iterdir())  # checking writes nothing
    teacher.encode(TEXTS, 3)
    server.times.clear()
    server.noise = 1e-3  # what another batch on a GPU does
    again = text_teacher(config())
    assert again.spec.key == source.spec.key and not server.times
    again.load().encode(TEXTS, 3)
    assert text_teacher(config()).spec.key == source.spec.key


def test_the_probe_that_is_kept_is_the_runs_own(server, config):
    """A server whose vectors tremble gives every actor another probe: workers must still find the run's store."""
    server.noise = 1e-3
    source = text_teacher(config())
    source.load().encode(TEXTS, 3)
    assert text_teacher(config()).spec.key == source.spec.key


def test_a_server_may_move(server, config):
    text_teacher(config()).load().encode(TEXTS, 3)
    moved = config(api_base=server.api_base.replace("127.0.0.1", "localhost"))
    assert text_teacher(moved).spec.key == text_teacher(config()).spec.key


def test_a_model_that_was_changed_behind_the_endpoint(server, config, tmp_path):
    source = text_teacher(config())
    teacher = source.load()
    teacher.encode(TEXTS, 3)
    server.weights = "other weights"
    with pytest.raises(UserError, match="the model has changed"):
        text_teacher(config()).load()
    (record,) = tmp_path.rglob("endpoint-*.json")
    record.unlink()
    assert text_teacher(config()).spec.key != source.spec.key


def test_a_damaged_record(config, tmp_path):
    text_teacher(config()).load().encode(TEXTS, 3)
    (record,) = tmp_path.rglob("endpoint-*.json")
    assert json.loads(record.read_text())["model"] == "tiny"
    for text in ("{", "[]", '{"probe": []}', '{"probe": ["a"]}'):
        record.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            text_teacher(config())
