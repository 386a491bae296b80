"""A server that cannot be reached stops nothing that is under way; how a run begins, once; what is never stored."""

import json
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from flipkd_dist import run_logger, tracking, tracking_server
from flipkd_dist.config import RunConfig, without_credentials
from flipkd_dist.errors import StoppedAtOnce, UserError
from flipkd_dist.run_logger import RUN_FILE, RunLogger, known_run, send_waiting, training_run
from flipkd_dist.spool import Spool

SECRET = "http://me:hush@there:5000"


class ServerError(RuntimeError):
    """As mlflow's errors are."""

    def __init__(self, code: str, message: str = "no answer from http://me:hush@there:5000"):
        super().__init__(message)
        self.error_code = code


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(run_logger, "PATIENCE_S", 0.2)
    monkeypatch.setattr(send_waiting, "__defaults__", (0.2,))
    monkeypatch.setattr(run_logger, "_senders", {})
    config = RunConfig.model_validate(
        {"name": "x", "output_dir": str(tmp_path), "tracking": {"mlflow_tracking_uri": SECRET}}
    )
    config.run_dir.mkdir()
    return config


@pytest.fixture
def down(monkeypatch):
    monkeypatch.setattr(tracking, "client", lambda _uri: 1 / 0)


def messages(config) -> list[dict]:
    return [message for message, _ in Spool(config.run_dir).messages()]


def test_a_client_that_cannot_be_made_is_said_once_and_nothing_is_lost(config, down, caplog):
    logger = RunLogger(config, "run")
    logger.reopen()
    logger.begin_sending()
    for step in range(20):
        logger.metrics({"loss": 1.0}, step)
    logger.artifact(config.run_dir / "config.yaml")
    logger.finish("KILLED")
    first, last = caplog.messages
    assert first.startswith("warning: mlflow: http://there:5000 does not take what is logged")
    assert last.startswith("warning: mlflow: 23 points and messages wait in") and "division by zero" in last
    assert [message.get("status") for message in messages(config)][:: len(messages(config)) - 1] == [
        "RUNNING",
        "KILLED",
    ]
    assert Spool(config.run_dir).num_waiting() == 23


def test_the_client_is_made_by_the_thread_that_trains_and_a_stop_meanwhile_is_not_swallowed(config, monkeypatch):
    made = []
    monkeypatch.setattr(tracking, "client", lambda _uri: made.append(threading.current_thread()))
    RunLogger(config, "run").begin_sending()
    assert made == [threading.main_thread()]

    def stop(_uri):
        raise StoppedAtOnce("now")

    monkeypatch.setattr(tracking, "client", stop)
    with pytest.raises(StoppedAtOnce):
        RunLogger(config, "other").begin_sending()


def test_other_ranks_say_and_write_nothing(config, down, caplog):
    logger = RunLogger(config, None)
    logger.reopen()
    logger.begin_sending()
    logger.metrics({"loss": 1.0}, 1)
    logger.finish()
    assert not caplog.messages and not any(config.run_dir.iterdir())


def test_steps_that_were_logged_before_a_resume_are_not_logged_again_without_the_server(config, down):
    first = RunLogger(config, "run")
    first.begin_sending()
    for step in range(1, 8):
        first.metrics({"loss": 1.0}, step)
    resumed = RunLogger(config, "run")  # from the checkpoint of step 4
    resumed.begin_sending()
    for step in range(5, 11):
        resumed.metrics({"loss": 2.0, "validation_f1": 0.5}, step)
    points = [(m["step"], key) for m in messages(config) for key in m["metrics"]]
    assert sorted(step for step, key in points if key == "loss") == list(range(1, 11))
    assert sorted(step for step, key in points if key == "validation_f1") == list(range(5, 11))
    other = RunLogger(config, "another run")
    other.begin_sending()
    other.metrics({"loss": 3.0}, 1)
    assert messages(config)[-1]["run"] == "another run"


def test_a_known_run_goes_on_without_the_server_and_a_new_one_does_not_begin(config, monkeypatch):
    def refused(_uri):
        raise ServerError("INTERNAL_ERROR")

    waited = []
    monkeypatch.setattr(tracking, "client", refused)
    monkeypatch.setattr(tracking_server.time, "sleep", waited.append)
    with pytest.raises(UserError) as told:
        training_run(config, "t")
    assert waited == list(tracking_server.DOWN_WAITS_S) and 50 < sum(waited) < 70
    assert str(told.value) == (
        "tracking.mlflow_tracking_uri: http://there:5000: no answer from http://there:5000: start the server, or "
        "correct the address and MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
    )
    known = json.loads((config.run_dir / RUN_FILE).read_text())
    (config.run_dir / RUN_FILE).write_text(json.dumps({**known, "run_id": "r"}))
    assert training_run(config, "t") == "r"
    with pytest.raises(UserError):
        training_run(config, "another training")


def test_credentials_are_neither_stored_nor_sent(config, monkeypatch):
    monkeypatch.setattr(run_logger, "start_run", lambda *_: "r")
    assert tracking_server.tracking_uri(config) == SECRET
    training_run(config, "t")
    RunLogger(config, "r").reopen()
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    for path in config.run_dir.iterdir():
        assert "hush" not in path.read_text() and "there:5000" in path.read_text(), path
    assert without_credentials("postgresql://a:b@c/d, https://u:p@q@h:1/x@y") == "postgresql://c/d, https://h:1/x@y"
    for untouched in ("sqlite:////tmp/a@b.db", "http://h:5000/x@y", "https://h/a:b@c", "http://h", "", None):
        assert without_credentials(untouched) == untouched
    assert without_credentials("postgresql://u:pa/ss@h/db?x=1") == "postgresql://h/db?x=1"
    assert without_credentials("mysql://h/db?user=me&password=hush&x=1 not") == "mysql://h/db?user=me&password=&x=1 not"
    teacher = {"api_base": "https://u:hush@h/v1", "model_name_or_path": "m"}
    shown = RunConfig.model_validate({"name": "x", "teacher": teacher}).shown()
    assert shown["teacher"]["api_base"] == "https://h/v1"


def test_a_full_disk_is_said_once_and_what_is_logged_waits_for_room(config, down, caplog, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    put = Spool.put
    monkeypatch.setattr(Spool, "put", full)
    logger, before = RunLogger(config, "r"), time.time() * 1000 - 1
    logger.metrics({"loss": 1.0}, 1)
    logger.metrics({"loss": 1.0}, 2)
    [said] = caplog.messages
    assert "No space left" in said
    after = time.time() * 1000
    monkeypatch.setattr(Spool, "put", put)
    logger.metrics({"loss": 1.0}, 3)
    assert [message["step"] for message in messages(config)] == [1, 2, 3]
    assert before <= messages(config)[0]["time"] <= after  # when it was logged
    monkeypatch.setattr(Spool, "put", full)
    logger.finish("KILLED")
    assert any("1 messages are lost" in line for line in caplog.messages)


def test_what_waits_for_another_server_stays_and_nothing_is_logged_to_the_wrong_one(config, monkeypatch, caplog):
    monkeypatch.setattr(run_logger, "start_run", lambda *_: "r")
    training_run(config, "t")
    waiting = len(messages(config))
    sent = []
    monkeypatch.setattr(run_logger, "_sender", lambda config: sent.append(config))
    elsewhere = config.model_copy(update={"tracking": config.tracking.model_copy(update={"mlflow_tracking_uri": None})})
    assert not send_waiting(elsewhere) and not sent
    assert f"{waiting} points and messages wait" in caplog.messages[-1]
    assert "for http://there:5000" in caplog.messages[-1] and "mlflow.db" in caplog.messages[-1]
    assert known_run(elsewhere) is None and "nothing is logged" in caplog.messages[-1]
    assert known_run(config) == "r"
    assert not (config.run_dir / "mlflow-refused.jsonl").exists()


@pytest.mark.parametrize("uri", ["http://there:5000/", "http://me:hush@there:5000/"])
def test_a_slash_at_the_end_names_the_same_server(config, monkeypatch, uri):
    monkeypatch.setattr(run_logger, "start_run", lambda *_: "r")
    training_run(config, "t")
    slash = config.model_copy(update={"tracking": config.tracking.model_copy(update={"mlflow_tracking_uri": uri})})
    assert known_run(slash) == "r" and tracking_server.shown_uri(slash) == "http://there:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    plain = {"tracking": config.tracking.model_copy(update={"mlflow_tracking_uri": "http://there:5000/"})}
    assert tracking_server.tracking_uri(config.model_copy(update=plain)) == SECRET


def test_a_run_folder_moves_with_its_own_database(config, monkeypatch, tmp_path):
    monkeypatch.setattr(run_logger, "start_run", lambda *_: "r")
    own = config.model_copy(update={"tracking": config.tracking.model_copy(update={"mlflow_tracking_uri": None})})
    training_run(own, "t")
    (own.run_dir / "mlflow.db").touch()
    own.run_dir.rename(tmp_path / "moved")
    moved = own.model_copy(update={"name": "moved"})
    assert known_run(moved) == "r"
    (moved.run_dir / "mlflow.db").unlink()
    assert known_run(moved) is None


class Store:
    """Notes the requests; as often as told it is in another process's hands, or down."""

    def __init__(self, locked: int = 0, error: Exception | None = None):
        self.left, self.error = locked, error or RuntimeError("(sqlite3.OperationalError) database is locked")
        self.batches, self.runs, self.experiment, self.is_beaten = [], {}, None, False

    def _answer(self) -> None:
        if self.left:
            self.left -= 1
            raise self.error

    def get_experiment_by_name(self, name):
        self._answer()
        return self.experiment

    def create_experiment(self, name, artifact_location):
        self.experiment = SimpleNamespace(experiment_id="1")
        if self.is_beaten:
            raise ServerError("RESOURCE_ALREADY_EXISTS")
        return "1"

    def search_runs(self, experiments, query, max_results):
        key = query.split("'")[1]
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run, known in self.runs.items() if known == key]

    def create_run(self, experiment_id, run_name, tags):
        self._answer()
        run = f"r{len(self.runs)}"
        self.runs[run] = tags[tracking.KEY]
        self._answer()
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_batch(self, run_id, params, synchronous):
        assert synchronous
        self.batches.append(params)


@pytest.fixture
def waits(monkeypatch):
    """How long it was waited; mlflow itself, which may be absent, is not needed."""
    found, entities = [], ModuleType("mlflow.entities")
    entities.Param = entities.Metric = lambda key, value: SimpleNamespace(key=key, value=value)
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(tracking_server.time, "sleep", found.append)
    return found


def begin(monkeypatch, store: Store, key: str = "k") -> str:
    monkeypatch.setattr(tracking, "client", lambda _uri: store)
    return tracking.start_run(RunConfig(name="x"), key)


def test_parameters_go_in_few_requests_that_every_store_takes(monkeypatch, waits):
    store, config = Store(), RunConfig(name="x")
    monkeypatch.setattr(tracking, "client", lambda _uri: store)
    flat = tracking.flatten(config.shown())
    tracking.ServerPost("http://a").send("r", "params", [{"params": flat}])
    assert max(map(len, store.batches)) <= 100 and len(store.batches) <= 2
    assert {one.key: one.value for batch in store.batches for one in batch} == flat


def test_a_locked_database_is_waited_for_and_no_run_is_begun_twice(monkeypatch, waits):
    store = Store(5)
    assert begin(monkeypatch, store) == "r0" and len(store.runs) == 1
    assert waits == [0.5, 1, 2, 4, 8]


def test_a_run_whose_creation_was_not_seen_to_end_is_found_again(monkeypatch, waits):
    store = Store(error=ServerError("INTERNAL_ERROR", "read timed out"))
    create = store.create_run

    def made_without_an_answer(*arguments, **options):
        create(*arguments, **options)
        raise store.error

    store.create_run = made_without_an_answer
    assert begin(monkeypatch, store) == "r0" and len(store.runs) == 1 and waits == [1]
    store.create_run = create
    assert begin(monkeypatch, store, "another") == "r1"


def test_an_experiment_that_another_run_has_just_created_is_used(monkeypatch, waits):
    store = Store()
    store.is_beaten = True
    assert begin(monkeypatch, store) == "r0" and not waits


@pytest.mark.parametrize(
    "locked, error, num_waits", [(9, RuntimeError("database is locked"), 5), (1, RuntimeError("no such server"), 0)]
)
def test_any_other_mistake_of_the_store_is_told_at_once(monkeypatch, waits, locked, error, num_waits):
    with pytest.raises(RuntimeError, match=str(error)):
        begin(monkeypatch, Store(locked, error))
    assert len(waits) == num_waits


def test_what_the_server_refuses_is_told_at_once(monkeypatch, waits):
    with pytest.raises(UserError, match="experiment is deleted"):
        begin(monkeypatch, Store(9, ServerError("INVALID_PARAMETER_VALUE", "the experiment is deleted")))
    assert not waits


@pytest.mark.parametrize("code, num_waits", [("INTERNAL_ERROR", 7), ("UNAUTHENTICATED", 0), ("NOT_FOUND", 0)])
def test_a_server_that_is_away_is_asked_for_a_minute_and_one_that_refuses_once(
    config, monkeypatch, waits, code, num_waits
):
    def refused(_uri):
        raise ServerError(code)

    monkeypatch.setattr(tracking, "client", refused)
    with pytest.raises(ServerError):
        tracking.check_run(config, "r")
    assert len(waits) == num_waits


def test_every_request_is_brief_unless_the_user_says_otherwise(monkeypatch):
    mlflow = ModuleType("mlflow")
    mlflow.set_tracking_uri = mlflow.set_registry_uri = lambda _uri: None
    mlflow.MlflowClient = lambda *_: None
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    tracking.client("http://a")
    assert tracking.os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    with tracking._transferring():
        assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in tracking.os.environ
        assert tracking.os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "33"
    assert tracking.os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
