"""One MLflow run per training, begun by the driver, logged into by rank 0 by way of the run folder's spool."""

import logging
import time
import uuid
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig
from flipkd_dist.durable import sync_file
from flipkd_dist.mlflow_sender import Sender
from flipkd_dist.run_folder import read_json, write_json
from flipkd_dist.spool import Spool
from flipkd_dist.tracking import ServerPost, flatten, start_run
from flipkd_dist.tracking_server import OWN, shown_uri, tracking_uri

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


def elsewhere(config: RunConfig) -> str | None:
    """The server that has the run folder's MLflow run, where it is another one than is named now."""
    known, now, own = (read_json(config.run_dir / RUN_FILE) or {}).get("uri"), shown_uri(config), config.run_dir / OWN
    if known in (None, now):
        return None
    moved = now == f"sqlite:///{own.resolve()}" and own.exists() and Path(known.removeprefix("sqlite:///")).name == OWN
    return None if moved else known  # a run folder may move with its own database


def known_run(config: RunConfig) -> str | None:
    """The MLflow run of the run folder on the server that is named now, if it has one; a line, if another has it."""
    if (other := elsewhere(config)) is not None:
        logger.warning(
            "warning: mlflow: nothing is logged: the run of %s is on %s, not on %s: name that server",
            config.run_dir, other, shown_uri(config),
        )  # fmt: skip
        return None
    return (read_json(config.run_dir / RUN_FILE) or {}).get("run_id")


_senders: dict[tuple[Path, str], Sender] = {}  # of this process: one for each run folder and server


def _sender(config: RunConfig) -> Sender:
    place = (config.run_dir.resolve(), tracking_uri(config))
    if place not in _senders:
        _senders[place] = Sender(Spool(place[0]), ServerPost(place[1]), shown_uri(config))
    return _senders[place]


def send_waiting(config: RunConfig, patience_s: float = PATIENCE_S) -> bool:
    """Send what earlier processes and this one left in the run's spool; False, and a line, if it had to stay there."""
    if not (spool := Spool(config.run_dir)).waits():
        return True
    if (other := elsewhere(config)) is not None:
        logger.warning(
            "warning: mlflow: %d points and messages wait in %s for %s; now %s is named: name theirs",
            spool.num_waiting(), spool.path, other, shown_uri(config),
        )  # fmt: skip
        return False
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
        self._unwritten: list[dict[str, Any]] = []  # messages that a full disk has refused

    def put(self, **message: Any) -> None:
        """Into the spool, whatever happens to the server."""
        if self.run_id is not None:
            self._unwritten.append({"time": int(time.time() * 1000), **message})
            self.flush()

    def flush(self) -> None:
        """Write what waits for room, in order."""
        was_full = len(self._unwritten) > 1
        try:
            self._write()
        except OSError as error:
            if not was_full:
                logger.warning("warning: mlflow: %s: %s: its lines wait for room", self._spool.path, error.strerror)

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._spool.put(to=self._to, run=self.run_id, **self._unwritten[0])
                del self._unwritten[0]
        finally:
            if self._sender is not None:
                self._sender.wake()

    def save(self) -> None:
        """Write what waits; after this a power loss takes none of it.

        Raises:
            OSError: the disk is full or broken.
        """
        if self.run_id is not None:
            self._write()
            sync_file(self._spool.path)

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
        if self.run_id is None:
            return
        self.flush()
        if self._unwritten:
            logger.warning(
                "warning: mlflow: %d messages are lost: there was no room for them in %s",
                len(self._unwritten), self._spool.path,
            )  # fmt: skip
        send_waiting(self.config)
