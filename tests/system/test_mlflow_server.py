"""MLflow for real: a server on PostgreSQL, runs that log at once, a server that goes away, versions and aliases."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow_server import mlflow_server
from test_run import tiny_config
from tiny import fill_store

from flipkd_dist.config import RunConfig, load_config
from flipkd_dist.evaluation import evaluate
from flipkd_dist.pipeline import Pipeline
from flipkd_dist.predict import Matcher
from flipkd_dist.promotion import promote
from flipkd_dist.registry import register
from flipkd_dist.run_folder import RunFolder, read_json
from flipkd_dist.run_logger import RUN_FILE, RunLogger, send_waiting, training_run
from flipkd_dist.spool import Spool
from flipkd_dist.tracking import client
from flipkd_dist.tracking_server import patiently

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
NUM_STEPS = 400
WRITER = """
import sys, time
from pathlib import Path
from flipkd_dist.config import RunConfig
from flipkd_dist.run_logger import RunLogger, training_run
from flipkd_dist.tracking import client
name, folder, uri, num_steps = *sys.argv[1:4], int(sys.argv[4])
config = RunConfig.model_validate(
    {"name": name, "output_dir": folder, "tracking": {"mlflow_tracking_uri": uri, "experiment": "race"}}
)
config.run_dir.mkdir(parents=True)
(config.run_dir / "config.yaml").write_text(config.to_yaml())
client(uri)
(Path(folder) / f"{name}.ready").touch()
while len(list(Path(folder).glob("*.ready"))) < 2:
    time.sleep(0.01)
logger = RunLogger(config, training_run(config, "t"))
logger.begin_sending()
for step in range(num_steps):
    logger.metrics({"loss": step / 7, "undefined": float("nan")}, step)
logger.finish()
"""


@pytest.fixture(scope="module")
def server():
    with mlflow_server() as found:
        yield found


@pytest.fixture
def mlflow(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    return client(server.uri)


def runs_of(mlflow, experiment: str) -> list:
    return mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])


def history(mlflow, run_id: str, key: str) -> list[int]:
    return sorted(point.step for point in mlflow.get_metric_history(run_id, key))


def start(*command, **variables) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_runs_log_thousands_of_points_into_one_new_experiment(server, mlflow, tmp_path):
    writers = [start("-c", WRITER, name, tmp_path, server.uri, "3000") for name in ("a", "b")]
    for writer in writers:
        _, said = writer.communicate(timeout=300)
        assert (writer.returncode, said) == (0, "")
    found = runs_of(mlflow, "race")
    assert sorted(run.info.run_name for run in found) == ["a", "b"]
    for run in found:
        assert run.info.status == "FINISHED" and run.data.params["tracking.experiment"] == "race"
        assert history(mlflow, run.info.run_id, "loss") == history(mlflow, run.info.run_id, "undefined")
        assert history(mlflow, run.info.run_id, "loss") == list(range(3000))
    [again] = [run for run in found if run.info.run_name == "a"]
    values = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "a.yaml")
    Spool(config.run_dir).note.unlink()  # a crash between sending and its note: all of it goes again
    assert send_waiting(config) and not Spool(config.run_dir).waits()
    assert history(mlflow, again.info.run_id, "undefined") == list(range(3000))  # PostgreSQL has each point once
    assert mlflow.get_run(again.info.run_id).info.status == "FINISHED"


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    """A configuration whose teacher's store is full: it trains in one process, without Ray."""
    path = tiny_config(tmp_path_factory.mktemp("trained"))
    values = yaml.safe_load(path.read_text())
    values["train"] |= {"max_steps": NUM_STEPS, "logging_steps": 1, "eval_steps": NUM_STEPS, "learning_rate": 1e-3}
    values["distributed"] = {"num_workers": 1, "deepspeed": None}
    values["tracking"] = {"experiment": "faults", "registered_model": "tiny"}
    path.write_text(yaml.safe_dump(values))
    fill_store(load_config(path))
    return path


class Training:
    """A training in a process of its own, whose steps are counted by its own file."""

    def __init__(self, path: Path, uri: str):
        self.file = load_config(path).run_dir / "metrics.jsonl"
        self.process = start(ROOT / "launchers" / "deepspeed_train.py", path, MLFLOW_TRACKING_URI=uri)

    @property
    def num_lines(self) -> int:
        return len(self.file.read_text().splitlines()) if self.file.exists() else 0

    def go_on(self, lines: int) -> float:
        """Wait for so many more lines; seconds."""
        start, target = time.monotonic(), self.num_lines + lines
        while self.num_lines < target:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() - start < 240
            time.sleep(0.02)
        return time.monotonic() - start

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=300)
        return self.process.returncode, said


def test_a_server_that_goes_away_loses_nothing_and_delays_no_step(server, mlflow, trained):
    config = load_config(trained)
    training = Training(trained, server.uri)
    try:
        training.go_on(20)
        [run] = runs_of(mlflow, "faults")
        wait = time.monotonic() + 60
        while not mlflow.get_metric_history(run.info.run_id, "loss"):
            assert time.monotonic() < wait
            time.sleep(0.1)
        calm = training.go_on(20)
        server.database.stop()  # the server answers with errors of its own
        without_database = training.go_on(20)
        server.database.start()
        with_database = time.monotonic()
        before = patiently(lambda: history(mlflow, run.info.run_id, "loss"))[-1]  # it recovers first
        while patiently(lambda: history(mlflow, run.info.run_id, "loss"))[-1] <= before + 5:
            assert time.monotonic() - with_database < 60
            time.sleep(0.1)
        back = time.monotonic() - with_database
        server.kill()
        without_server = training.go_on(20)
        training.process.terminate()
        code, said = training.end()
        assert code == 75, said
        assert len(re.findall("does not take what is logged", said)) == 2  # once for each time it went down
        assert len(re.findall("takes it again", said)) == 1
        assert re.search(r"\d+ points and messages wait in .*mlflow-spool.jsonl: http.* does not take them", said)
        assert said.splitlines()[-1].startswith("flipkd: stopped on request")

        training = Training(trained, server.uri)  # the same command, still without the server
        code, said = training.end()
        assert code == 0, said
        assert "resumed at step" in said and "points and messages wait in" in said
    finally:
        training.process.kill()
    assert max(without_database, without_server) < calm + 5  # one request that fails takes as long, and there are 20
    print(f"20 steps: {calm:.2f} s; {without_database:.2f} without database, {without_server:.2f} without server")
    began = time.monotonic()
    server.start()
    assert send_waiting(config)
    print(f"database back: sent after {back:.1f} s; server back and all sent: {time.monotonic() - began:.1f} s")
    [run] = runs_of(mlflow, "faults")
    assert run.info.status == "FINISHED" and run.data.params["train.max_steps"] == str(NUM_STEPS)
    assert history(mlflow, run.info.run_id, "loss") == list(range(1, NUM_STEPS + 1))
    assert history(mlflow, run.info.run_id, "validation_roc_auc") == [NUM_STEPS]
    names = {file.path for file in mlflow.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "metrics.jsonl"} <= names and run.info.artifact_uri.startswith("mlflow-artifacts:")
    sent = {p.step: p.value for p in mlflow.get_metric_history(run.info.run_id, "loss")}
    logged = [json.loads(line) for line in training.file.read_text().splitlines()]
    np.testing.assert_allclose(
        [sent[one["step"]] for one in logged if "loss" in one],
        [one["loss"] for one in logged if "loss" in one],
        rtol=1e-4,
    )


def test_a_challenger_becomes_champion_and_goes_back(server, mlflow, trained, tmp_path):
    """Needs the training of the test before."""
    challenge = load_config(trained, ["tracking.alias=challenger"])
    if not (challenge.run_dir / "adapter").exists():
        pytest.skip("nothing was trained before")
    pipeline = Pipeline(challenge, on_ray=False)
    evaluate(pipeline.config)
    pipeline.folder.mark_done("evaluate", pipeline.evaluated)
    pipeline.register()
    version = mlflow.get_model_version_by_alias("tiny", "challenger")
    assert version.run_id == read_json(challenge.run_dir / RUN_FILE)["run_id"] and "flipkd.test.roc_auc" in version.tags
    first = call_server(server, "promote", trained)
    assert first.returncode == 0 and "@champion is version 1 now: test roc_auc" in first.stdout, first.stderr
    champion = load_config(trained)
    Pipeline(champion, on_ray=False).register()  # the same adapter: no second version
    assert [one.version for one in mlflow.search_model_versions("name='tiny'")] == ["1"]

    answers = tmp_path / "answers.jsonl"
    done = call_server(server, "predict", "models:/tiny@champion", "--input", champion.data.test, "--output", answers)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    texts = [(record["text_a"], record["text_b"]) for record in records]
    expected = Matcher(champion.run_dir / "adapter").predict(texts)[0]
    np.testing.assert_allclose([record["p_match"] for record in records], expected, atol=1e-5)
    files = {path.name for path in server.artifacts.rglob("*")}
    assert {"adapter_model.safetensors", "flipkd.json", "MLmodel"} <= files  # the server has them, no client's folder
    assert not (champion.run_dir / "mlartifacts").exists()

    made_of = (read_json(challenge.run_dir / RUN_FILE)["run_id"], champion.run_dir / "adapter", texts[:2])
    assert register(challenge, *made_of, version.tags, "of something else") == ("tiny", "2")
    for source, expected in (
        ("challenger", {"challenger": "2", "champion": "2", "previous": "1"}),
        ("previous", {"challenger": "2", "champion": "1", "previous": "1"}),
    ):
        for _ in range(2):
            promote(champion, source)
            assert {key: str(one) for key, one in mlflow.get_registered_model("tiny").aliases.items()} == expected


def call_server(server, *arguments) -> subprocess.CompletedProcess:
    process = start("-m", "flipkd_dist", *arguments, MLFLOW_TRACKING_URI=server.uri)
    out, said = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, said)


@pytest.mark.soak
def test_a_minute_without_the_server(server, mlflow, tmp_path, monkeypatch, capfd):
    config = RunConfig.model_validate(
        {"name": "minute", "output_dir": str(tmp_path), "tracking": {"experiment": "minute"}}
    )
    RunFolder(config).open()
    logger = RunLogger(config, training_run(config, "t"))
    logger.begin_sending()
    slowest, start, step = 0.0, time.monotonic(), 0
    server.kill()
    while time.monotonic() - start < 60:
        began = time.monotonic()
        logger.metrics({"loss": step / 7}, step)
        slowest, step = max(slowest, time.monotonic() - began), step + 1
        time.sleep(0.02)
    server.start()
    back = time.monotonic()
    assert send_waiting(config, patience_s=30)
    print(
        f"{step} points in a minute without the server, the slowest took {slowest * 1000:.1f} ms; all there "
        f"{time.monotonic() - back:.1f} s after it was back"
    )
    assert history(mlflow, logger.run_id, "loss") == list(range(step))


@pytest.mark.soak
def test_kills_while_sending_lose_and_repeat_nothing(server, mlflow, tmp_path):
    """Five times SIGKILL of a process that logs and sends, each going on a little behind the last."""
    (tmp_path / "b.ready").touch()  # it waits for nobody
    for attempt in range(5):
        (tmp_path / "kills").mkdir(exist_ok=True)
        writer = start(
            "-c", WRITER.replace("parents=True", "exist_ok=True"), "kills", tmp_path, server.uri, 400 * (attempt + 1)
        )
        spool, begin = Spool(tmp_path / "kills"), time.monotonic()
        try:
            before = spool.sent
            while spool.sent <= before:
                assert writer.poll() is None and time.monotonic() - begin < 120, writer.communicate()
                time.sleep(0.001)
            time.sleep(0.01 * attempt)
        finally:
            writer.kill()
            writer.wait()
    config = RunConfig.model_validate(
        {"name": "kills", "output_dir": str(tmp_path), "tracking": {"mlflow_tracking_uri": server.uri}}
    )
    assert send_waiting(config)
    run_id = read_json(config.run_dir / RUN_FILE)["run_id"]
    logged = [message["step"] for message, _ in spool.messages() if message and "step" in message]
    assert len(logged) == len(set(logged)) and history(mlflow, run_id, "loss") == sorted(logged)
    print(f"{len(logged)} points of 5 processes that were killed: each once")
