"""MLflow's client: how a run is begun, the way of a spool to the server, registered models.

The only module that imports mlflow, inside the functions that need it (besides `pyfunc_model.py`, which MLflow runs).
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig, without_credentials
from flipkd_dist.console import quiet_others
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.model_files import one_line
from flipkd_dist.spool import POINTS_AT_ONCE

logger = logging.getLogger("flipkd_dist")
OWN = "mlflow.db"  # of a run folder where no server is named
LONGEST_PARAMETER = 500  # characters; what every MLflow store accepts
MOST_PARAMETERS = 100  # of one request
LOCKED_WAITS_S = (0.5, 1, 2, 4, 8)  # between tries to begin a run in a database that other runs are writing
DOWN_WAITS_S = (1, 2, 4, 8, 15, 15, 15)  # and on a server that does not answer
PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows a run below another
KEY = "flipkd.key"  # the tag by which a run is found again whose creation was not seen to end
# A request that fails is tried again by us, with what is new: mlflow's own way is seven times, for four minutes.
BRIEF = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
FAULTS = {  # by the error codes of mlflow
    "server": {
        "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED",
        "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED",
    },
    "item": {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"},
    "run": {"RESOURCE_DOES_NOT_EXIST"},
}  # fmt: skip
DENIED = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "NOT_FOUND"}


def tracking_uri(config: RunConfig) -> str:
    """The server that is named, else a SQLite file in the run folder; credentials may stand in the environment only."""
    named, known = config.tracking.mlflow_tracking_uri, os.environ.get("MLFLOW_TRACKING_URI")
    if named and known and _as_shown(known) == _as_shown(named):
        return known
    return named or known or f"sqlite:///{(config.run_dir / OWN).resolve()}"


def has_store(config: RunConfig) -> bool:
    """Whether there is something to ask: a server is named, or the run folder has a database of its own."""
    named = config.tracking.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return bool(named) or (config.run_dir / OWN).exists()


def shown_uri(config: RunConfig) -> str:
    """The tracking server as it may be shown and stored."""
    return _as_shown(tracking_uri(config))


def _as_shown(uri: str) -> str:
    return without_credentials(uri).rstrip("/")


def model_name(config: RunConfig) -> str:
    """The registered model that the run's adapter is a version of."""
    return config.tracking.registered_model or config.name


def client(uri: str):
    """A client of tracking server and registry at `uri`."""
    for key, value in BRIEF.items():
        os.environ.setdefault(key, value)  # read by mlflow at every request
    import mlflow

    quiet_others()  # importing mlflow sets its own levels
    _make_whole(uri)
    named = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # writes the variable, which the next run of this process would take for the user's
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if named is not None:
        os.environ["MLFLOW_TRACKING_URI"] = named
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient(uri, uri)


def _make_whole(uri: str) -> None:
    """Make a new SQLite file aside: a kill amid MLflow's migrations would leave one that nobody can open again."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or "?" in uri or path.exists() or not path.parent.is_dir():
        return
    import mlflow

    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        mlflow.MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        try:
            os.link(draft, path)
        except FileExistsError:  # another process was quicker: its file stays
            pass
        except OSError:  # a file system without links
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _transferring(*keys: str) -> Iterator[None]:
    """A server may take its time over files, and a registration is tried again as mlflow does by itself.

    Args:
        keys: of BRIEF; without any all of them hold for nobody now.
    """
    ours = {key: os.environ.pop(key) for key in keys or BRIEF if os.environ.get(key) == BRIEF[key]}
    try:
        yield
    finally:
        os.environ.update(ours)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted parameters as texts of a length that every store takes."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (value if isinstance(value, str) else json.dumps(value))[:LONGEST_PARAMETER]
    return flat


def start_run(config: RunConfig, key: str) -> str:
    """Create the training's MLflow run; its id. Called again with the same key, it finds the run that there is.

    Raises:
        UserError: the server is down, or refuses.
    """
    with server_errors(config):
        return _patiently(lambda: _find_or_create(client(tracking_uri(config)), config, key))


@contextmanager
def server_errors(config: RunConfig, is_kept: bool = False) -> Iterator[None]:
    """
    Args:
        is_kept: the same command goes on with what was done before.
    Raises:
        UserError: for any error of mlflow: the server refuses, or it is down.
        StoppedOnRequest: it is down, and `is_kept`.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "error_code") and not type(error).__module__.startswith("requests."):
            raise
        where = f"tracking.mlflow_tracking_uri: {shown_uri(config)}: {without_credentials(one_line(error))}"
        if fault(error) in ("item", "run"):
            raise UserError(
                f"{where}: correct it, or restore what was deleted there (`mlflow runs restore`, `mlflow experiments "
                "restore`)"
            ) from None
        if is_kept and getattr(error, "error_code", None) not in DENIED:
            raise StoppedOnRequest(
                f"{where}: the server does not answer; everything is kept: run the same command again"
            ) from None
        raise UserError(
            f"{where}: start the server, or correct the address and MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
        ) from None


def check_run(config: RunConfig, run_id: str) -> None:
    """Ask the server for the run; waits for one that is down."""
    _patiently(lambda: client(tracking_uri(config)).get_run(run_id))


def _find_or_create(mlflow_client: Any, config: RunConfig, key: str) -> str:
    uri, name = tracking_uri(config), config.tracking.experiment
    # A named store keeps its own place for artifacts; the one in the run folder has them beside it.
    database = Path(uri.removeprefix("sqlite:///"))
    location = (database.parent / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:///") else None
    experiment = mlflow_client.get_experiment_by_name(name)
    if experiment is None:
        try:
            experiment_id = mlflow_client.create_experiment(name, artifact_location=location)
        except Exception as error:
            experiment = mlflow_client.get_experiment_by_name(name)
            if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise  # else another run was quicker
    if experiment is not None:
        experiment_id = experiment.experiment_id
    found = mlflow_client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
    if found:  # made by a process, or a request, whose end nobody saw
        return found[0].info.run_id
    parent = config.tracking.parent_run_id
    tags = {KEY: key} | ({PARENT: parent} if parent else {})
    return mlflow_client.create_run(experiment_id, run_name=config.name, tags=tags).info.run_id


def _patiently(call: Callable[[], Any]) -> Any:
    """The call's result; again after a while where a file is locked by other runs, or a server is just starting."""
    for number in count():
        try:
            return call()
        except Exception as error:
            code, is_away = getattr(error, "error_code", None), fault(error) in ("server", "unknown")
            waits_s = DOWN_WAITS_S if code is not None and code not in DENIED and is_away else ()
            waits_s = LOCKED_WAITS_S if "database is locked" in str(error) else waits_s
            if number >= len(waits_s):
                raise
            if number == 0 and waits_s == DOWN_WAITS_S:
                logger.warning("warning: mlflow: %s: tried for a minute", without_credentials(one_line(error)))
        time.sleep(waits_s[number])


def fault(error: Exception) -> str:
    """Whose fault an error of mlflow is, as `mlflow_sender.Post` says it."""
    code = getattr(error, "error_code", None)
    if isinstance(error, FileNotFoundError):
        return "item"
    return next((fault for fault, codes in FAULTS.items() if code in codes), "unknown")


class ServerPost:
    """The way to one server; its client is made when it is needed."""

    def __init__(self, uri: str):
        self.uri, self._client, self.fault = uri, None, fault

    @property
    def client(self) -> Any:
        self._client = self._client or client(self.uri)
        return self._client

    def prepare(self) -> None:
        """Import mlflow in this thread: other libraries trip over what another thread has imported by half."""
        with suppress(Exception):  # the sender will say it
            self.client  # noqa: B018

    def answers(self, run: str) -> bool:
        try:
            self.client.get_run(run)
            return True
        except Exception as error:
            return fault(error) == "run"

    def send(self, run: str, kind: str, items: list[Any]) -> None:
        mlflow_client = self.client
        from mlflow.entities import Metric, Param

        if kind == "metrics":
            for start in range(0, len(items), POINTS_AT_ONCE):
                points = [Metric(*point) for point in items[start : start + POINTS_AT_ONCE]]
                mlflow_client.log_batch(run, metrics=points, synchronous=True)
            return
        [message] = items
        if kind == "params":
            parameters = [Param(*pair) for pair in message["params"].items()]
            for start in range(0, len(parameters), MOST_PARAMETERS):
                mlflow_client.log_batch(run, params=parameters[start : start + MOST_PARAMETERS], synchronous=True)
        elif kind == "artifact":
            with _transferring("MLFLOW_HTTP_REQUEST_TIMEOUT"):
                mlflow_client.log_artifact(run, message["artifact"])
        elif message["status"] == "RUNNING":
            mlflow_client.update_run(run, status="RUNNING")
        else:
            mlflow_client.set_terminated(run, message["status"], end_time=message["time"])


def log_pyfunc(
    config: RunConfig,
    run_id: str,
    name: str,
    code: Path,
    adapter: Path,
    example: list[tuple[str, str]],
    outputs: dict[str, Any],
    model_config: dict[str, Any],
) -> str:
    """Log the adapter as a models-from-code pyfunc in the training's run and register it; the new version."""
    client(tracking_uri(config))
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    inputs = pd.DataFrame(example, columns=["text_a", "text_b"])
    with _transferring(), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(code),
            artifacts={"adapter": str(adapter)},
            model_config=model_config,
            signature=infer_signature(inputs, pd.DataFrame(outputs)),
            input_example=inputs,
            pip_requirements=[f"flipkd_dist=={version('flipkd_dist')}"],
            registered_model_name=name,
        )
    return str(info.registered_model_version)


def load_registered(config: RunConfig, uri: str, example: list[tuple[str, str]]) -> Any:
    """p(match) of the example from the registered version, loaded as any MLflow user would."""
    client(tracking_uri(config))
    import mlflow
    import pandas as pd

    with _transferring():
        model = mlflow.pyfunc.load_model(uri)
    return model.predict(pd.DataFrame(example, columns=["text_a", "text_b"]))["p_match"].to_numpy()


def point_alias(config: RunConfig, name: str, version: str, description: str, tags: dict[str, str]) -> None:
    """Describe and tag the version, and let the configured alias mean it."""

    def point() -> None:
        mlflow_client = client(tracking_uri(config))
        mlflow_client.update_model_version(name, version, description)
        for key, value in tags.items():
            mlflow_client.set_model_version_tag(name, version, key, value)
        mlflow_client.set_registered_model_alias(name, config.tracking.alias, version)

    _patiently(point)


def has_version(config: RunConfig, name: str, version: str) -> bool:
    try:
        client(tracking_uri(config)).get_model_version(name, version)
    except Exception as error:
        if fault(error) not in ("run", "item"):
            raise
        return False
    return True


def download_model(uri: str, model: str, target: str) -> str:
    """Files of a registered model; the local folder."""
    client(uri)
    import mlflow

    with _transferring():
        return mlflow.artifacts.download_artifacts(artifact_uri=model, dst_path=target, tracking_uri=uri)
