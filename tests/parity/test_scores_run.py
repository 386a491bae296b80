"""Training and evaluation with a teacher of pairs, from a configuration to the metrics."""

import json

import numpy as np
import pytest
from gang import run_gang
from sklearn.metrics import roc_auc_score
from tiny import fill_store, save_cross_encoder, save_student, write_pairs

from flipkd_dist.config import RunConfig, validate
from flipkd_dist.evaluation import evaluate
from flipkd_dist.pair_files import read_records
from flipkd_dist.train import train

pytestmark = pytest.mark.parity


def train_and_evaluate(config: RunConfig) -> None:
    train(config)
    evaluate(config)


def configured(folder, teacher: dict, workers: int, **loss) -> RunConfig:
    values = {
        "name": "pairs",
        "output_dir": str(folder),
        "data": {
            "train": write_pairs(folder / "train.jsonl", 24, 0),
            "validation": write_pairs(folder / "validation.jsonl", 11, 1),
            "max_length": 64,
        },
        "teacher": teacher,
        "student": {
            "model_name_or_path": str(save_student(folder / "student")),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
            "lora_r": 8,
        },
        "loss": {"threshold": None, **loss},
        "train": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
        "distributed": {"num_workers": workers, "timeout_s": 60},
    }
    if workers == 1:
        values["distributed"]["deepspeed"] = None
    return validate(values, "test")


def logged(config: RunConfig) -> list[dict]:
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss_mcl" in line]


def test_a_calibrated_cross_encoder_with_neighbours(tmp_path):
    teacher = {"cross_encoder": str(save_cross_encoder(tmp_path / "cross")), "neighbours": 2, "calibrate": True}
    config = configured(tmp_path, teacher, workers=2)
    fill_store(config)
    run_gang(2, train_and_evaluate, config)
    metrics = json.loads((config.run_dir / "metrics.json").read_text())
    assert metrics["validation"]["teacher"]["num_pairs"] == 9  # two are hard
    assert all(line["loss_mcl"] > 0 and line["kept_off_diagonal"] == 1 for line in logged(config))


def test_a_scored_file_and_nothing_off_the_diagonal(tmp_path):
    scores = tmp_path / "scores.jsonl"
    config = configured(tmp_path, {"scores": str(scores)}, workers=1, mcl_weight=0.0)
    labels, values = [], np.random.default_rng(0).random(35)
    with scores.open("w") as file:
        records = [record for path in (config.data.train, config.data.validation) for _, record in read_records(path)]
        for record, value in zip(records, values, strict=True):
            labels.append(record["label"])
            file.write(json.dumps({key: record[key] for key in ("text_a", "text_b")} | {"score": value}) + "\n")
    fill_store(config)
    run_gang(1, train_and_evaluate, config)
    metrics = json.loads((config.run_dir / "metrics.json").read_text())
    assert metrics["validation"]["teacher"]["roc_auc"] == roc_auc_score(
        labels[25:34], values[25:34]
    )  # the others are hard
    assert all(line["loss_mcl"] == 0 and line["loss_dist"] > 0 for line in logged(config))
