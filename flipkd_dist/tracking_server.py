"""The MLflow server as the rest sees it: which one a run has, what its errors mean, and when it is asked again.

Nothing here needs mlflow: its errors are known by their codes.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from flipkd_dist.config import RunConfig, without_credentials
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.model_files import one_line

logger = logging.getLogger("flipkd_dist")
OWN = "mlflow.db"  # of a run folder where no server is named
LOCKED_WAITS_S = (0.5, 1, 2, 4, 8)  # between tries to begin a run in a database that other runs are writing
DOWN_WAITS_S = (1, 2, 4, 8, 15, 15, 15)  # and on a server that does not answer
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


@contextmanager
def server_errors(config: RunConfig, is_kept: bool = False) -> Iterator[None]:
    """Turn errors of mlflow inside into ours, of one line.

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


def patiently(call: Callable[[], Any]) -> Any:
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
