"""MLflow's client: how a run is begun, the way of a spool to the server, registered models.

The only module that imports mlflow, inside the functions that need it (besides `pyfunc_model.py`, which MLflow runs).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig
from flipkd_dist.console import quiet_others
from flipkd_dist.spool import POINTS_AT_ONCE
from flipkd_dist.tracking_server import fault, patiently, server_errors, tracking_uri

LONGEST_PARAMETER = 500  # characters; what every MLflow store accepts
MOST_PARAMETERS = 100  # of one request
PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows a run below another
KEY = "flipkd.key"  # the tag by which a run is found again whose creation was not seen to end
# A request that fails is tried again by us, with what is new: mlflow's own way is seven times, for four minutes.
BRIEF = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


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
        return patiently(lambda: _find_or_create(client(tracking_uri(config)), config, key))


def check_run(config: RunConfig, run_id: str) -> None:
    """Ask the server for the run; waits for one that is down."""
    patiently(lambda: client(tracking_uri(config)).get_run(run_id))


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


@contextmanager
def _loading_with(model_config: dict[str, Any]) -> Iterator[None]:
    """Every load by MLflow takes these values."""
    key = "MLFLOW_PYFUNC_INFERENCE_CONFIG"
    before = os.environ.get(key)
    os.environ[key] = json.dumps(model_config)
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def log_pyfunc(
    config: RunConfig,
    run_id: str,
    name: str,
    code: Path,
    adapter: Path,
    example: list[tuple[str, str]],
    outputs: dict[str, Any],
    model_config: dict[str, Any],
    tried_with: dict[str, Any],
) -> str:
    """Log the adapter as a models-from-code pyfunc in the training's run and register it; the new version.

    Args:
        tried_with: other values of `model_config` for the load by which MLflow tries the example.
    """
    client(tracking_uri(config))
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    inputs = pd.DataFrame(example, columns=["text_a", "text_b"])
    with _transferring(), _loading_with(tried_with), mlflow.start_run(run_id=run_id):
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


def load_registered(
    config: RunConfig, uri: str, example: list[tuple[str, str]], model_config: dict[str, Any] | None = None
) -> Any:
    """p(match) of the example from the registered version, loaded as any MLflow user would.

    Args:
        model_config: other values for keys that the version was logged with; MLflow leaves out those that it was not.
    """
    client(tracking_uri(config))
    import mlflow
    import pandas as pd

    with _transferring():
        model = mlflow.pyfunc.load_model(uri, model_config=model_config)
    return model.predict(pd.DataFrame(example, columns=["text_a", "text_b"]))["p_match"].to_numpy()


def point_alias(config: RunConfig, name: str, version: str, description: str, tags: dict[str, str]) -> None:
    """Describe and tag the version, and let the configured alias mean it."""

    def point() -> None:
        mlflow_client = client(tracking_uri(config))
        mlflow_client.update_model_version(name, version, description)
        for key, value in tags.items():
            mlflow_client.set_model_version_tag(name, version, key, value)
        mlflow_client.set_registered_model_alias(name, config.tracking.alias, version)

    patiently(point)


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
