"""Evaluation of several checkpoints and of the untrained base, from a configuration to the files, on 1 and 2 ranks."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gang import run_gang
from tiny import fill_store, save_student, save_teacher, write_pairs

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.batches import BatchMaker
from flipkd_dist.checkpoint import best_checkpoints, checkpoints
from flipkd_dist.comparison_reading import read_matrix
from flipkd_dist.config import RunConfig
from flipkd_dist.evaluate import best_threshold, binary_metrics, hard_negatives, pair_texts, student_scores
from flipkd_dist.evaluation import evaluate
from flipkd_dist.preflight import check_inputs
from flipkd_dist.similarity_matrix import matrix_pairs
from flipkd_dist.student import load_student
from flipkd_dist.train import train
from flipkd_dist.world import World

pytestmark = pytest.mark.parity
WORLDS = [(1, None), (1, "ds_configs/zero1.json"), (2, "ds_configs/zero3.json")]


def train_and_evaluate(config: RunConfig) -> None:
    train(config)
    evaluate(config)


def configured(folder, workers: int, deepspeed: str | None, name: str = "trained") -> RunConfig:
    data = {
        split: write_pairs(folder / f"{split}.jsonl", 20, seed) for seed, split in enumerate(("train", "validation"))
    }
    return RunConfig(
        name=name,
        output_dir=str(folder / "runs"),
        data={**data, "test": write_pairs(folder / "test.jsonl", 23, 7), "max_length": 64},
        teacher={"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
        student={
            "model_name_or_path": str(save_student(folder / "student")),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
        },
        loss={"threshold": None},
        train={
            "max_steps": 6,
            "eval_steps": 1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 5,
            "learning_rate": 1e-2,
            "test_checkpoints": 3,
        },
        distributed={"num_workers": workers, "deepspeed": deepspeed, "timeout_s": 60},
    )


def scores_by_hand(config: RunConfig, weights: dict | None) -> dict[str, np.ndarray]:
    """p(match) and cosine of each split's pairs [2, N] by a plain student with these LoRA tensors; None: as loaded."""
    inputs = check_inputs(config)
    student = load_student(inputs.base_folder, config.student, inputs.encoder.answer_ids, inputs.lora_rank, config.seed)
    for name, parameter in student.trained_parameters().items():
        if weights is not None:
            parameter.data.copy_(weights[name])
    make_batch = BatchMaker(inputs.encoder, student, inputs.share_prefix)
    return {
        split: np.stack(student_scores(student, World(), make_batch, pair_texts(inputs.splits[split]), 64))
        for split in ("validation", "test")
    }


@torch.no_grad()
def matrix_by_hand(config: RunConfig) -> np.ndarray:
    """Cosines of the matching test pairs' first texts (rows) with their second texts, by the untrained student."""
    inputs = check_inputs(config)
    student = load_student(inputs.base_folder, config.student, inputs.encoder.answer_ids, inputs.lora_rank, config.seed)
    texts, chosen = pair_texts(inputs.splits["test"]), matrix_pairs(inputs.splits["test"])
    batch = BatchMaker(inputs.encoder, student, inputs.share_prefix)([texts[pair] for pair in chosen])
    _, first, second = student.eval()(**batch.tensors("cpu"))
    return torch.cosine_similarity(first[:, None], second[None], dim=2).numpy()


def stored(config: RunConfig) -> dict[tuple[str, int], np.ndarray]:
    """(split, step) -> p_match and similarity [2, N], by pair."""
    found: dict[tuple[str, int], list] = {}
    for record in pq.read_table(config.run_dir / "scores.parquet").to_pylist():
        rows = found.setdefault((record["split"], record["step"]), [])
        assert record["pair"] == len(rows)
        rows.append([record["p_match"], record["similarity"]])
    return {key: np.array(rows).T for key, rows in found.items()}


@pytest.mark.parametrize(("workers", "deepspeed"), WORLDS)
def test_each_of_the_best_checkpoints_scores_for_itself(tmp_path, workers, deepspeed):
    config = configured(tmp_path, workers, deepspeed)
    fill_store(config)
    run_gang(workers, train_and_evaluate, config)
    best = best_checkpoints(config.run_dir / "checkpoints", 3)
    steps, table = [found.step for found in best], stored(config)
    assert (
        len(checkpoints(config.run_dir / "checkpoints")) > 3
        and steps[0] == AdapterCard.read(config.run_dir / "adapter").step
    )
    assert list(table) == [(split, step) for step in steps for split in ("validation", "test")]

    splits, figures = check_inputs(config).splits, []
    for found in best:
        wanted = scores_by_hand(config, found.weights())
        easy = {split: ~hard_negatives(pairs) for split, pairs in splits.items()}
        thresholds = []
        for split, scores in wanted.items():
            np.testing.assert_allclose(table[split, found.step], scores, atol=2e-5)
        for reading in (0, 1):
            chosen = table["validation", found.step][reading][easy["validation"]]
            thresholds.append(best_threshold(chosen, splits["validation"].label[easy["validation"]]))
        values = [table["test", found.step][reading][easy["test"]] for reading in (0, 1)]
        labels = splits["test"].label[easy["test"]]
        figures.append(
            [
                binary_metrics(*pair, threshold)
                for *pair, threshold in zip(values, [labels] * 2, thresholds, strict=True)
            ]
        )
    metrics = json.loads((config.run_dir / "metrics.json").read_text())
    means = metrics["test_checkpoints"]
    assert means["steps"] == steps and means.keys() == {"steps", "test", "test_hard"} and metrics["step"] == steps[0]
    for reading, row in enumerate(("student", "student_readout")):
        for key in ("accuracy", "f1", "roc_auc", "threshold"):
            expected = np.mean([checkpoint[reading][key] for checkpoint in figures])
            assert means["test"][row][key] == pytest.approx(expected, abs=1e-9)
        assert metrics["test"][row] == pytest.approx(figures[0][reading])
        assert means["test"][row]["num_pairs"] == int((~hard_negatives(splits["test"])).sum())
    spread = [table["test", step][0] for step in steps]
    assert min(np.abs(spread[0] - other).max() for other in spread[1:]) > 1e-3  # they are not one and the same

    matrix = read_matrix(config.run_dir)
    assert matrix.pairs == matrix_pairs(splits["test"]).tolist() and matrix.student.shape == (11, 11)
    np.testing.assert_allclose(np.diag(matrix.student), table["test", steps[0]][1][matrix.pairs], atol=1e-5)
    teacher = [json.loads(line)["teacher"] for line in (config.run_dir / "predictions-test.jsonl").open()]
    np.testing.assert_allclose(np.diag(matrix.teacher), np.array(teacher)[matrix.pairs], atol=1e-5)


def test_the_untrained_base_is_scored_as_it_is(tmp_path):
    config = configured(tmp_path, 2, "ds_configs/zero3.json", "untrained")
    fill_store(config)
    run_gang(2, evaluate, config, True)
    table, wanted = stored(config), scores_by_hand(config, None)
    assert list(table) == [("validation", 0), ("test", 0)]
    for split, scores in wanted.items():
        np.testing.assert_allclose(table[split, 0], scores, atol=2e-5)
    metrics = json.loads((config.run_dir / "metrics.json").read_text())
    assert metrics["step"] == 0 and "test_checkpoints" not in metrics and metrics["test"]["student"]["num_pairs"] == 20
    matrix, wanted = read_matrix(config.run_dir), matrix_by_hand(config)
    assert matrix.student.shape == (11, 11) and np.abs(wanted - wanted.T).max() > 1e-3
    np.testing.assert_allclose(matrix.student, wanted, atol=2e-5)


def test_fewer_checkpoints_than_asked_for_are_averaged_and_it_is_said(tmp_path, caplog):
    config = configured(tmp_path, 1, None)
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 2})})
    fill_store(config)
    lines = run_gang(1, _log_of, config)[0]
    assert len([line for line in lines if "train.test_checkpoints is 3, there are 2 to average" in line]) == 1
    assert len({step for _, step in stored(config)}) == 2


def _log_of(config: RunConfig) -> list[str]:
    import logging

    lines, handler, logger = [], logging.Handler(), logging.getLogger("flipkd_dist")
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    train_and_evaluate(config)
    return lines
