"""One version for one adapter, whatever interrupts its registration; MLflow and the model are stood in for."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from flipkd_dist import registry
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.registry import register

EXAMPLE = [("a", "b")]


class Killed(BaseException):
    """Stands in for SIGKILL."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What was made and where the alias points; `answers` is what a version says."""
    found = SimpleNamespace(
        versions=[], alias=None, answers=np.array([0.5]), dies=False, streams=True, logged=None, loaded=[]
    )

    def log(*arguments):
        found.logged, found.tried_with = arguments[-2:]
        found.versions.append(str(len(found.versions) + 1))
        return found.versions[-1]

    class Matcher:
        def __init__(self, _, streamed=False):
            if streamed and not found.streams:
                raise UserError("lacks weights under the names of")
            found.loaded.append((weakref.ref(self), streamed))

        def predict(self, _):
            return np.array([0.5]), np.array([0.5])

    def load(config, uri, example, model_config):
        found.beside, found.asked = [(one(), streamed) for one, streamed in found.loaded], model_config
        if found.dies:
            raise Killed
        return found.answers

    card = SimpleNamespace(threshold=0.5, base_model="base", tuning="lora")
    monkeypatch.setattr(registry, "AdapterCard", SimpleNamespace(read=lambda _: card))
    monkeypatch.setattr(registry, "model_card", lambda *_: "card")
    monkeypatch.setattr(registry, "Matcher", Matcher)
    monkeypatch.setattr(registry, "log_pyfunc", log)
    monkeypatch.setattr(registry, "load_registered", load)
    monkeypatch.setattr(registry, "has_version", lambda config, name, version: version in found.versions)
    monkeypatch.setattr(registry, "point_alias", lambda *arguments: setattr(found, "alias", arguments[2]))
    found.config = RunConfig(name="x", output_dir=str(tmp_path))
    found.adapter = found.config.run_dir / "adapter"
    found.adapter.mkdir(parents=True)
    return found


def call(server, key: str = "k") -> str:
    return register(server.config, "r", server.adapter, EXAMPLE, {}, key)[1]


def test_a_kill_before_the_alias_makes_no_second_version(server):
    server.dies = True
    with pytest.raises(Killed):
        call(server)
    assert server.versions == ["1"] and server.alias is None
    server.dies = False
    assert call(server) == "1" and server.alias == "1" and server.versions == ["1"]
    assert call(server, "another adapter") == "2"


def test_a_version_that_answers_otherwise_is_neither_pointed_at_nor_taken_again(server):
    server.answers = np.array([0.6])
    with pytest.raises(RuntimeError, match="alias not moved"):
        call(server)
    assert server.alias is None
    server.answers = np.array([0.5])
    assert call(server) == "2" and server.alias == "2"


def test_a_version_that_was_deleted_is_made_again(server):
    assert call(server) == "1"
    server.versions[0] = "gone"
    assert call(server) == "2"


@pytest.mark.parametrize("streams", [True, False])
def test_the_base_is_streamed_where_it_can_be_and_never_lies_there_twice(server, streams):
    server.streams = streams
    assert call(server) == "1"
    assert server.logged["streamed"] is False and server.asked == server.tried_with == {"streamed": streams}
    assert server.beside == [(None, streams)]  # one model was made, and it is gone before the registered version comes
