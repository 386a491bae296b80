"""One MLflow run per training, begun by the driver, logged into by rank 0 by way of the run folder's spool."""

import logging
import uuid
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig
from flipkd_dist.mlflow_sender import Sender
from flipkd_dist.run_folder import read_json, write_json
from flipkd_dist.spool import Spool
from flipkd_dist.tracking import ServerPost, flatten, shown_uri, start_run, tracking_uri

logger = logging.getLogger("flipkd_dist")
RUN_FILE = "mlflow.json"
PATIENCE_S = 10.0  # for a server at the end of a process


def training_run(config: RunConfig, training: str | None) -> str:
    """The MLflow run of the training with this hash, begun if there is none; noted in the run folder.

    A run that is known goes on without asking the server.

    Raises:
        UserError: a new run, and the server is down, or refuses.
    """
    path, uri = config.run_dir / RUN_FILE, shown_uri(config)
    known = read_json(path) or {}
    if (known.get("training"), known.get("uri")) != (training, uri):
        known = {"uri": uri, "training": training, "key": uuid.uuid4().hex}
        write_json(path, known)  # first: whoever is killed now finds the run by its key
    if "run_id" not in known:
        known["run_id"] = start_run(config, known["key"])
        logger = RunLogger(config, known["run_id"])
        logger.put(params=flatten(config.shown()))
        logger.artifact(config.run_dir / "config.yaml")
        write_json(path, known)
    return known["run_id"]


def known_run(config: RunConfig) -> str | None:
    """The MLflow run of the run folder, if it has one."""
    return (read_json(config.run_dir / RUN_FILE) or {}).get("run_id")


_senders: dict[tuple[Path, str], Sender] = {}  # of this process: one for each run folder and server


def _sender(config: RunConfig) -> Sender:
    place = (config.run_dir.resolve(), tracking_uri(config))
    if place not in _senders:
        _senders[place] = Sender(Spool(place[0]), ServerPost(place[1]), shown_uri(config))
    return _senders[place]


def send_waiting(config: RunConfig, patience_s: float = PATIENCE_S) -> bool:
    """Send what earlier processes and this one left in the run's spool; False, and a line, if it had to stay there."""
    if not Spool(config.run_dir).waits():
        return True
    sender = _sender(config)
    left = sender.settle(patience_s)
    if left:
        logger.warning(
            "warning: mlflow: %d points and messages wait in %s: %s does not take them (%s); they are sent by the next "
            "`flipkd run`, `train`, `evaluate` or `register` of this run",
            left, sender.spool.path, sender.to, sender.trouble or "it is slow",
        )  # fmt: skip
    return not left


class RunLogger:
    """Messages to an MLflow run, by way of the run folder's spool; does nothing without a run id (other ranks)."""

    def __init__(self, config: RunConfig, run_id: str | None):
        self.config, self.run_id = config, run_id
        self._spool, self._to = Spool(config.run_dir), shown_uri(config)
        self._known: dict[str, set[int]] = {}  # metric -> steps that were logged before a resume
        self._sender: Sender | None = None  # of who logs while it works
        self._is_full = False

    def put(self, **message: Any) -> None:
        """Into the spool, whatever happens to the server."""
        if self.run_id is None:
            return
        try:
            self._spool.put(to=self._to, run=self.run_id, **message)
        except OSError as error:  # metrics.jsonl has it, if anything has
            if not self._is_full:
                logger.warning("warning: mlflow: not logged: %s cannot be written (%s)", self._spool.path, error)
            self._is_full = True
            return
        if self._sender is not None:
            self._sender.wake()

    def begin_sending(self) -> None:
        """From now on this process sends what is logged, at once and in the background.

        No point is logged again that was logged before a resume: MLflow cannot take points back.
        """
        if self.run_id is None:
            return
        self._known = self._spool.steps(self.run_id)
        self._sender = _sender(self.config)
        self._sender.post.prepare()
        if self._spool.waits():
            self._sender.wake()

    def metrics(self, values: dict[str, float], step: int) -> None:
        values = {key: float(value) for key, value in values.items() if step not in self._known.get(key, ())}
        if values:
            self.put(metrics=values, step=step)

    def artifact(self, path: Path) -> None:
        self.put(artifact=str(path.resolve()))

    def reopen(self) -> None:
        """A run that had ended goes on."""
        self.put(status="RUNNING")

    def finish(self, status: str = "FINISHED") -> None:
        """The run has ended so; waits a little for the server."""
        self.put(status=status)
        self.settle()

    def settle(self) -> None:
        """Before this process ends: wait a little until all is sent, and say what had to stay in the spool."""
        if self.run_id is not None:
            send_waiting(self.config)
