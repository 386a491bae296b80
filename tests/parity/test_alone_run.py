"""Training, evaluation and prediction of texts alone, and of pairs with another read-out, from a configuration on."""

import json

import numpy as np
import pytest
from gang import run_gang
from sklearn.metrics import roc_auc_score
from test_scores_run import logged, train_and_evaluate
from tiny import fill_store, save_student, save_teacher, write_pairs

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.config import RunConfig, validate
from flipkd_dist.embedder import Embedder
from flipkd_dist.errors import UserError
from flipkd_dist.export import export
from flipkd_dist.pair_files import read_records
from flipkd_dist.predict import Matcher

pytestmark = pytest.mark.parity


def configured(folder, student: dict, workers: int, loss=None) -> RunConfig:
    files = {split: write_pairs(folder / f"{split}.jsonl", n, n) for split, n in (("train", 24), ("validation", 12))}
    values = {
        "name": "alone",
        "output_dir": str(folder),
        "data": {**files, "max_length": 64},
        "teacher": {"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
        "student": {"model_name_or_path": str(save_student(folder / "student")), **student},
        "loss": {"threshold": None, **(loss or {})},
        "train": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
        "distributed": {"num_workers": workers, "timeout_s": 60},
    }
    if workers == 1:
        values["distributed"]["deepspeed"] = None
    return validate(values, "test")


ALONE = {"mode": "alone", "prompt": "help {text} ="}
PAIR = {"prompt": "same ? {text_a} | {text_b} =", "answers": ["yes", "no"], "readout": "lasttoken"}


@pytest.mark.parametrize(
    ("student", "workers", "loss"),
    [(ALONE, 2, None), ({**ALONE, "readout": "mean", "bidirectional": True}, 1, None), (PAIR, 1, {"sup_weight": 0.0})],
)
def test_a_run(tmp_path, student, workers, loss):
    config = configured(tmp_path, student, workers, loss)
    fill_store(config)
    run_gang(workers, train_and_evaluate, config)
    adapter = config.run_dir / "adapter"
    card, alone = AdapterCard.read(adapter), "mode" in student
    found = (card.mode, card.readout, card.bidirectional)
    assert found == (config.student.mode, config.student.reads, config.student.bidirectional)
    assert (0 if loss else 0.01) < min(line["loss_sup"] for line in logged(config))
    records = [record for _, record in read_records(config.data.validation)]
    texts = [(record["text_a"], record["text_b"]) for record in records]
    p_match, similarity = Matcher(adapter).predict(texts)
    lines = (config.run_dir / "predictions-validation.jsonl").read_text().splitlines()
    for name, values in (("student", p_match), ("student_readout", similarity)):
        np.testing.assert_allclose([json.loads(line)[name] for line in lines], values, rtol=0, atol=1e-5)
    metrics = json.loads((config.run_dir / "metrics.json").read_text())["validation"]
    kept = [row for row, record in enumerate(records) if record["kind"] != "hard"]
    labels = [records[row]["label"] for row in kept]
    assert metrics["student"]["roc_auc"] == pytest.approx(roc_auc_score(labels, p_match[kept]))
    assert (metrics["student"]["roc_auc"] == metrics["student_readout"]["roc_auc"]) == alone
    if alone:
        a, b = (Embedder(adapter).encode([pair[side] for pair in texts]) for side in (0, 1))
        np.testing.assert_allclose((a * b).sum(axis=1), similarity, rtol=0, atol=1e-5)
        with pytest.raises(UserError, match="this student encodes texts alone"):
            export(str(config.run_dir), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
