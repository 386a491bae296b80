"""A server that cannot be reached stops nothing, and a stop is not taken for its failure; how a run begins."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from flipkd_dist import tracking
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import StoppedAtOnce


def test_a_client_that_cannot_be_made_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(tracking, "client", lambda _uri: 1 / 0)
    logger = tracking.RunLogger("http://127.0.0.1:1", "run")
    logger.pass_over_known()
    logger.reopen()
    logger.metrics({"loss": 1.0}, 3)
    logger.finish("KILLED")
    assert [line.startswith("mlflow: ") for line in caplog.messages] == [True] * 4


def test_a_stop_while_it_is_made_is_not_swallowed(monkeypatch):
    def stop(_uri):
        raise StoppedAtOnce("now")

    monkeypatch.setattr(tracking, "client", stop)
    with pytest.raises(StoppedAtOnce):
        tracking.RunLogger("http://127.0.0.1:1", "run").reopen()


def test_other_ranks_say_nothing(monkeypatch, caplog):
    monkeypatch.setattr(tracking, "client", lambda _uri: 1 / 0)
    tracking.RunLogger("http://127.0.0.1:1", None).finish()
    assert not caplog.messages


class Store:
    """Notes the requests; as often as told the database is in another process's hands."""

    def __init__(self, locked: int, reason: str = "(sqlite3.OperationalError) database is locked"):
        self.left, self.reason, self.batches, self.num_runs = locked, reason, [], 0

    def _answer(self) -> None:
        if self.left:
            self.left -= 1
            raise RuntimeError(self.reason)

    def get_experiment_by_name(self, name):
        self._answer()
        return SimpleNamespace(experiment_id="1")

    def create_run(self, experiment_id, run_name, tags):
        self._answer()
        self.num_runs += 1
        return SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def log_batch(self, run_id, params, synchronous):
        assert synchronous
        self._answer()
        self.batches.append(params)

    def log_artifact(self, run_id, path):
        self._answer()


@pytest.fixture
def waits(monkeypatch):
    """How long it was waited; mlflow itself, which may be absent, is not needed."""
    found, entities = [], ModuleType("mlflow.entities")
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(tracking.time, "sleep", found.append)
    return found


def test_a_run_begins_with_few_requests_that_every_store_takes(monkeypatch, waits):
    store, config = Store(0), RunConfig(name="x")
    monkeypatch.setattr(tracking, "client", lambda _uri: store)
    assert tracking.start_run(config) == "r" and not waits
    assert max(map(len, store.batches)) <= 100 and len(store.batches) <= 2
    logged = {one.key: one.value for batch in store.batches for one in batch}
    assert logged == tracking.flatten(config.model_dump(mode="json"))


def test_a_locked_database_is_waited_for_and_no_run_is_begun_twice(monkeypatch, waits):
    store = Store(5)
    monkeypatch.setattr(tracking, "client", lambda _uri: store)
    assert tracking.start_run(RunConfig(name="x")) == "r" and store.num_runs == 1
    assert waits == [0.5, 1, 2, 4, 8]


@pytest.mark.parametrize("locked, reason, num_waits", [(9, "database is locked", 5), (1, "no such server", 0)])
def test_any_other_mistake_of_the_store_is_told_at_once(monkeypatch, waits, locked, reason, num_waits):
    monkeypatch.setattr(tracking, "client", lambda _uri: Store(locked, reason))
    with pytest.raises(RuntimeError, match=reason):
        tracking.start_run(RunConfig(name="x"))
    assert len(waits) == num_waits
