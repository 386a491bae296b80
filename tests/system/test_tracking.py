"""The MLflow client of one run leaves the user's environment alone; what has no base is registered too."""

import os

import pytest
from test_tuned_folder import TEXTS, card_of, moved_student, state_of

from flipkd_dist.adapter import save_tuned
from flipkd_dist.config import RunConfig
from flipkd_dist.registry import register
from flipkd_dist.run_folder import RunFolder
from flipkd_dist.tracking import client, start_run

pytestmark = pytest.mark.system


@pytest.mark.parametrize("named", [None, "http://127.0.0.1:5000"])
def test_a_client_does_not_name_a_server_for_the_next_run(tmp_path, monkeypatch, named):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert os.environ.get("MLFLOW_TRACKING_URI") == named


def test_a_model_tuned_as_a_whole_is_registered_and_answers_from_the_registry(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    student, encoder, base = moved_student(tmp_path, "qwen2")
    config = RunConfig.model_validate({"name": "whole", "output_dir": str(tmp_path), "student": {"tuning": "full"}})
    folder = RunFolder(config)
    folder.open()
    save_tuned(folder.adapter, base, state_of(student), encoder, card_of(student, encoder))
    assert register(config, start_run(config), folder.adapter, TEXTS) == ("whole", "1")  # it compares the answers
