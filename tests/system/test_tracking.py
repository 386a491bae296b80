"""The MLflow client of one run leaves the user's environment alone; what has no base is registered too."""

import os
import subprocess
import sys
import time

import pytest
from test_tuned_folder import TEXTS, card_of, moved_student, state_of

from flipkd_dist import predict
from flipkd_dist.adapter import save_tuned
from flipkd_dist.base_loader import Streamed, Whole
from flipkd_dist.config import RunConfig
from flipkd_dist.registry import register
from flipkd_dist.run_folder import RunFolder
from flipkd_dist.run_logger import RunLogger, send_waiting, training_run
from flipkd_dist.spool import Spool
from flipkd_dist.tracking import client, load_registered
from flipkd_dist.tracking_server import tracking_uri

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
    placements = []
    for kind in (Streamed, Whole):
        monkeypatch.setattr(predict, kind.__name__, lambda device, kind=kind: placements.append(kind) or kind(device))
    student, encoder, base = moved_student(tmp_path, "qwen2")
    config = RunConfig.model_validate({"name": "whole", "output_dir": str(tmp_path), "student": {"tuning": "full"}})
    folder = RunFolder(config)
    folder.open()
    save_tuned(folder.adapter, base, state_of(student), encoder, card_of(student, encoder))
    assert register(config, training_run(config, "t"), folder.adapter, TEXTS) == (
        "whole",
        "1",
    )  # it compares the answers
    assert placements == [Streamed] * 3  # the folder's model, MLflow's own try of the example, the registered one
    load_registered(config, "models:/whole/1", TEXTS)
    assert placements[3:] == [Whole]


def test_what_is_sent_again_stands_once_in_sqlite(tmp_path, monkeypatch):
    """As after a kill between sending and noting it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = RunConfig(name="x", output_dir=str(tmp_path))
    RunFolder(config).open()
    run_id = training_run(config, "t")
    logger = RunLogger(config, run_id)
    logger.begin_sending()
    for step in range(1500):
        logger.metrics({"loss": step / 7, "undefined": float("nan")}, step)
    logger.metrics({"x" * 300: 1.0, "fine": 1.0}, 1500)  # a name that MLflow refuses
    logger.finish("KILLED")
    mlflow = client(tracking_uri(config))
    for again in (False, True):
        if again:
            Spool(config.run_dir).note.unlink()
            assert send_waiting(config)
        for key in ("loss", "undefined"):
            assert [point.step for point in mlflow.get_metric_history(run_id, key)] == list(range(1500))
        [fine] = mlflow.get_metric_history(run_id, "fine")
        run = mlflow.get_run(run_id)
        assert run.info.status == "KILLED" and run.data.params["name"] == "x" and fine.step == 1500
    assert "xxx" in (config.run_dir / "mlflow-refused.jsonl").read_text()


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path):
    """MLflow's migrations of a new SQLite file take seconds; half of them is what no later process can open."""
    program = f"from flipkd_dist.tracking import client; client('sqlite:///{tmp_path}/mlflow.db')"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    client(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()
    assert (tmp_path / "mlflow.db").exists()
