"""The MLflow client of one run leaves the user's environment alone."""

import os

import pytest

from flipkd_dist.tracking import client

pytestmark = pytest.mark.system


@pytest.mark.parametrize("named", [None, "http://127.0.0.1:5000"])
def test_a_client_does_not_name_a_server_for_the_next_run(tmp_path, monkeypatch, named):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert os.environ.get("MLFLOW_TRACKING_URI") == named
