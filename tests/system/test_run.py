"""The main job on tiny models: two Ray workers under ZeRO-3, from pairs to the registry and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tiny import save_student, save_teacher, write_pairs

pytestmark = pytest.mark.system
FLIPKD = [sys.executable, "-m", "flipkd_dist"]


def tiny_config(folder: Path) -> Path:
    """The configuration file of a run in `folder`: tiny models, two workers."""
    values = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "data": {
            **{
                s: str(write_pairs(folder / f"{s}.jsonl", n, i))
                for i, (s, n) in enumerate([("train", 44), ("validation", 21), ("test", 31)])
            },
            "max_length": 64,
        },
        "teacher": {"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
        "student": {
            "model_name_or_path": str(save_student(folder / "student")),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
        },
        "loss": {"threshold": None},
        "train": {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_steps": 3},
        "distributed": {"num_workers": 2},
    }
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder, its configuration file and what it printed."""
    config = tiny_config(tmp_path_factory.mktemp("run"))
    return config.parent / "runs" / "tiny", config, call("run", config)


def call(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [*FLIPKD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def test_the_run_folder_is_complete(run):
    folder, _, result = run
    assert result.returncode == 0, result.stderr[-3000:]
    assert "PreemptionWatcher" not in result.stdout + result.stderr  # of Ray Train, no error, and left out
    for name in (
        "config.yaml", "teacher/manifest.json", "checkpoints/step-000003/manifest.json",
        "checkpoints/step-000006/manifest.json", "adapter/adapter_model.safetensors", "adapter/flipkd.json",
        "metrics.json", "metrics.jsonl", "mlflow.db", "mlartifacts",
    ):  # fmt: skip
        assert (folder / name).exists(), name
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = {"accuracy", "f1", "precision", "recall", "roc_auc", "average_precision", "threshold", "num_pairs"}
    for split in ("test", "test_hard", "validation"):
        assert metrics[split].keys() == {"student", "student_readout", "teacher", "token_overlap"}
        assert all(row.keys() == figures for row in metrics[split].values())
    assert metrics["test"]["student"]["num_pairs"] == 27  # 4 of 31 are hard
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 6 and any("loss_mcl" in step for step in steps)


def test_one_mlflow_run_and_one_version_under_the_alias(run):
    from flipkd_dist.tracking import client

    folder, *_ = run
    mlflow = client(f"sqlite:///{folder / 'mlflow.db'}")
    [tracked] = mlflow.search_runs([e.experiment_id for e in mlflow.search_experiments()])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["train.learning_rate"] == "0.01"
    assert [point.step for point in mlflow.get_metric_history(tracked.info.run_id, "loss")] == [1, 6]
    [version] = mlflow.search_model_versions("name='tiny'")
    assert mlflow.get_model_version_by_alias("tiny", "champion").version == version.version
    assert version.run_id == tracked.info.run_id


def test_the_registered_model_holds_neither_the_base_nor_a_pickle(run):
    folder, *_ = run
    files = [path for path in (folder / "mlartifacts").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"adapter_model.safetensors", "flipkd.json", "MLmodel", "input_example.json", "README.md"} <= names
    assert "model.safetensors" not in names and not any(name.endswith((".pkl", ".pickle", ".bin")) for name in names)


@pytest.mark.parametrize("model", ["models:/tiny@champion", "the run folder"])
def test_predict_gives_the_probabilities_of_evaluate(run, tmp_path, model):
    folder, config, _ = run
    test = yaml.safe_load(config.read_text())["data"]["test"]
    output = tmp_path / "answers.jsonl"
    name = str(folder) if model == "the run folder" else model
    result = call(
        "predict", name, "--input", test, "--output", output, "--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line)["p_match"] for line in output.read_text().splitlines()]
    evaluated = [json.loads(line)["student"] for line in (folder / "predictions-test.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(found, evaluated, atol=1e-5)
    assert np.std(found) > 1e-4  # not one answer for all


def test_a_second_run_skips_every_stage(run):
    folder, config, _ = run
    before = {path: path.stat().st_mtime_ns for path in (folder / "adapter").rglob("*")}
    result = call("run", config)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "nothing to do" in result.stderr
    for stage in ("train", "evaluate", "register"):
        assert f"{stage}: complete for the same inputs, skipped" in result.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "adapter").rglob("*")}


def test_another_configuration_in_the_same_folder_is_refused(run):
    _, config, _ = run
    result = call("run", config, "train.learning_rate=1e-3")
    assert result.returncode == 2 and "train.learning_rate" in result.stderr


@pytest.mark.soak
def test_the_original_glm_goes_the_same_way(run, tmp_path):
    """From its published files to the registry and to predictions."""
    folder, config, _ = run
    student = save_student(tmp_path / "glm", "glm_original")
    result = call("run", config, "name=glm", f"student.model_name_or_path={student}", "train.max_steps=3")
    assert result.returncode == 0, result.stderr[-3000:]
    adapter = folder.parent / "glm" / "adapter"
    assert json.loads((adapter / "flipkd.json").read_text())["encoder_module"] == "query_key_value"
    assert {name.split(".")[-3] for name in load_file(adapter / "adapter_model.safetensors")} == {"query_key_value"}
    test, output = yaml.safe_load(config.read_text())["data"]["test"], tmp_path / "answers.jsonl"
    assert call("predict", adapter.parent, "--input", test, "--output", output).returncode == 0
    found = [json.loads(line)["p_match"] for line in output.read_text().splitlines()]
    lines = (folder.parent / "glm" / "predictions-test.jsonl").read_text().splitlines()
    np.testing.assert_allclose(found, [json.loads(line)["student"] for line in lines], atol=1e-5)
    assert np.std(found) > 1e-4
