"""MLflow: one run per training, created by the driver, logged into by rank 0; a logging failure never stops training.

The only module that imports mlflow, inside the functions that need it (besides `pyfunc_model.py`, which MLflow runs).
"""

import json
import logging
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig
from flipkd_dist.console import quiet_others
from flipkd_dist.run_folder import read_json, write_json

logger = logging.getLogger("flipkd_dist")
LONGEST_PARAMETER = 500  # characters; what every MLflow store accepts
RUN_FILE = "mlflow.json"
MOST_PARAMETERS = 100  # of one request
LOCKED_WAITS_S = (0.5, 1, 2, 4, 8)  # between tries to write a database that other runs are writing
PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows a run below another


def tracking_uri(config: RunConfig) -> str:
    """The server that is named, else a SQLite file in the run folder."""
    named = config.tracking.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return named or f"sqlite:///{(config.run_dir / 'mlflow.db').resolve()}"


def client(uri: str):
    """A client of tracking server and registry at `uri`."""
    import mlflow

    quiet_others()  # importing mlflow sets its own levels
    named = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # writes the variable, which the next run of this process would take for the user's
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if named is not None:
        os.environ["MLFLOW_TRACKING_URI"] = named
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient(uri, uri)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted parameters as texts of a length that every store takes."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (value if isinstance(value, str) else json.dumps(value))[:LONGEST_PARAMETER]
    return flat


def start_run(config: RunConfig) -> str:
    """Create the training's MLflow run and log the configuration; the run's id. Called once, by the driver."""
    uri = tracking_uri(config)
    mlflow_client = client(uri)
    from mlflow.entities import Param

    experiment = _patiently(mlflow_client.get_experiment_by_name, config.tracking.experiment)
    if experiment is None:
        # A named store keeps its own place for artifacts; the one in the run folder has them beside it.
        database = Path(uri.removeprefix("sqlite:///"))
        location = (database.parent / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:///") else None
        create = mlflow_client.create_experiment
        experiment_id = _patiently(create, config.tracking.experiment, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    parent = config.tracking.parent_run_id
    tags = {PARENT: parent} if parent else {}
    run_id = _patiently(mlflow_client.create_run, experiment_id, run_name=config.name, tags=tags).info.run_id
    parameters = [Param(key, value) for key, value in flatten(config.model_dump(mode="json")).items()]
    for start in range(0, len(parameters), MOST_PARAMETERS):
        _patiently(
            mlflow_client.log_batch, run_id, params=parameters[start : start + MOST_PARAMETERS], synchronous=True
        )
    _patiently(mlflow_client.log_artifact, run_id, str(config.run_dir / "config.yaml"))
    return run_id


def _patiently(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The call's result; where several runs write one SQLite file, again after a while."""
    for wait_s in LOCKED_WAITS_S:
        try:
            return call(*arguments, **options)
        except Exception as error:
            if "database is locked" not in str(error):
                raise
        time.sleep(wait_s)
    return call(*arguments, **options)


def training_run(config: RunConfig, training: str) -> str:
    """The MLflow run of the training with this hash, begun if there is none; noted in the run folder."""
    path, uri = config.run_dir / RUN_FILE, tracking_uri(config)
    known = read_json(path) or {}
    if known.get("training") == training and known.get("uri") == uri:
        return known["run_id"]
    run_id = start_run(config)
    write_json(path, {"run_id": run_id, "uri": uri, "training": training})
    return run_id


class RunLogger:
    """Metrics into an MLflow run; does nothing without a run id (other ranks)."""

    def __init__(self, uri: str, run_id: str | None):
        self.uri, self.run_id, self._client = uri, run_id, None
        self._known: dict[str, set[int]] = {}  # metric -> steps that MLflow has from before a resume

    def _quietly(self, what: str, call: Callable[[Any], Any]) -> None:
        """`call(client)`, and a warning where it fails."""
        if self.run_id is None:
            return
        try:
            self._client = self._client or client(self.uri)
            call(self._client)
        except Exception as error:  # whatever the server does, training goes on: metrics.jsonl has it all
            logger.warning("mlflow: %s was not logged (%s)", what, " ".join(str(error).split())[:200])

    def pass_over_known(self) -> None:
        """Send no point again that MLflow has from before a resume: it cannot take points back."""

        def learn(mlflow_client) -> None:
            for key in mlflow_client.get_run(self.run_id).data.metrics:
                self._known[key] = {point.step for point in mlflow_client.get_metric_history(self.run_id, key)}

        self._quietly("the resume", learn)

    def metrics(self, values: dict[str, float], step: int) -> None:
        values = {key: value for key, value in values.items() if step not in self._known.get(key, ())}

        def send(mlflow_client) -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            mlflow_client.log_batch(
                self.run_id, [Metric(key, float(value), now, step) for key, value in values.items()]
            )

        if values:
            self._quietly(f"step {step}", send)

    def artifact(self, path: Path) -> None:
        self._quietly(path.name, lambda mlflow_client: mlflow_client.log_artifact(self.run_id, str(path)))

    def reopen(self) -> None:
        """A run that had ended goes on."""
        self._quietly("the resume", lambda mlflow_client: mlflow_client.update_run(self.run_id, status="RUNNING"))

    def finish(self, status: str = "FINISHED") -> None:
        self._quietly("the end of the run", lambda mlflow_client: mlflow_client.set_terminated(self.run_id, status))


def log_pyfunc(
    config: RunConfig,
    run_id: str,
    name: str,
    code: Path,
    adapter: Path,
    example: list[tuple[str, str]],
    outputs: dict[str, Any],
    model_config: dict[str, Any],
    description: str,
) -> str:
    """Log the adapter as a models-from-code pyfunc in the training's run and register it; the new version."""
    mlflow_client = client(tracking_uri(config))
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    inputs = pd.DataFrame(example, columns=["text_a", "text_b"])
    with mlflow.start_run(run_id=run_id):
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
    mlflow_client.update_model_version(name, info.registered_model_version, description)
    return str(info.registered_model_version)


def load_registered(config: RunConfig, uri: str, example: list[tuple[str, str]]) -> Any:
    """p(match) of the example from the registered version, loaded as any MLflow user would."""
    client(tracking_uri(config))
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(uri)
    return model.predict(pd.DataFrame(example, columns=["text_a", "text_b"]))["p_match"].to_numpy()


def point_alias(config: RunConfig, name: str, version: str) -> None:
    client(tracking_uri(config)).set_registered_model_alias(name, config.tracking.alias, version)


def download_model(uri: str, model: str, target: str) -> str:
    """Files of a registered model; the local folder."""
    client(uri)
    import mlflow

    return mlflow.artifacts.download_artifacts(artifact_uri=model, dst_path=target, tracking_uri=uri)
