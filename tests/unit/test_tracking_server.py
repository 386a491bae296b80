"""Which MLflow server a run has, and whose mistake its errors are."""

import pytest
from test_run_logger import SECRET, ServerError, config  # noqa: F401

from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.tracking_server import server_errors, tracking_uri


def test_credentials_in_the_environment_serve_a_configuration_that_names_the_same_server(config, monkeypatch):  # noqa: F811
    plain = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"mlflow_tracking_uri": "http://there:5000"})}
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    assert tracking_uri(plain) == SECRET
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@elsewhere:5000")
    assert tracking_uri(plain) == "http://there:5000"


class Dropped(OSError):
    """As the errors of requests are that mlflow hands on."""


Dropped.__module__ = "requests.exceptions"


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (
            ServerError("INTERNAL_ERROR"),
            StoppedOnRequest,
            "the server does not answer; everything is kept: run the same",
        ),
        (ServerError("TEMPORARILY_UNAVAILABLE"), StoppedOnRequest, "everything is kept"),
        (Dropped("reset"), StoppedOnRequest, "everything is kept"),
        (ServerError("UNAUTHENTICATED"), UserError, "MLFLOW_TRACKING_PASSWORD"),
        (ServerError("PERMISSION_DENIED"), UserError, "MLFLOW_TRACKING_PASSWORD"),
        (ServerError("INVALID_PARAMETER_VALUE"), UserError, "restore what was deleted"),
        (ServerError("RESOURCE_DOES_NOT_EXIST"), UserError, "`mlflow runs restore`"),
        (OSError(5, "broken disk"), OSError, "broken disk"),
    ],
)
def test_a_server_that_is_away_is_no_mistake_of_the_user_where_the_work_is_kept(config, error, kind, said):  # noqa: F811
    with pytest.raises(kind, match=said), server_errors(config, is_kept=True):
        raise error
