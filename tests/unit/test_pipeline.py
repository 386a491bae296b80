"""Which stages the driver asks workers for, and when it asks again; workers are stood in for."""

from dataclasses import dataclass

import numpy as np
import pytest
from tiny import fill_store, save_student, save_teacher, write_pairs

from flipkd_dist import pipeline
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import binary_metrics
from flipkd_dist.run_folder import write_json
from flipkd_dist.world import World

MATCHES = binary_metrics(np.array([0.4, 0.9]), np.array([1, 1]), 0.5)  # without ranking metrics
FIGURES = {"student": MATCHES, "student_readout": binary_metrics(np.array([0.4, 0.9]), np.array([0, 1]), 0.25)}


@pytest.fixture
def asked(monkeypatch):
    stages = []

    def work(config, names, _):
        stages.append(names)
        means = {"test_checkpoints": {"steps": [2, 1], "test": FIGURES}}
        write_json(config.run_dir / "metrics.json", {"step": 2, "threshold_from": "0.5", "test": FIGURES, **means})

    for name in ("join_or_start_ray", "check_room", "check_reached"):
        monkeypatch.setattr(pipeline, name, lambda _: None)
    monkeypatch.setattr(pipeline, "run_workers", work)
    return stages


@pytest.fixture
def config(tmp_path) -> RunConfig:
    config = RunConfig(
        name="x",
        output_dir=str(tmp_path / "runs"),
        data={"train": write_pairs(tmp_path / "train.jsonl", 8, 0), "test": write_pairs(tmp_path / "test.jsonl", 8, 1)},
        teacher={"model_name_or_path": str(save_teacher(tmp_path / "teacher")), "max_length": 32},
        student={
            "model_name_or_path": str(save_student(tmp_path / "student")),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
        },
    )
    fill_store(config)
    return config


def with_checkpoints(config: RunConfig, count: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"test_checkpoints": count})})


def test_the_untrained_base_is_evaluated_once(config, asked):
    pipeline.Pipeline(config).untrained()
    pipeline.Pipeline(config).untrained()
    assert asked == [["untrained"]]
    pipeline.Pipeline(with_checkpoints(config, 2)).untrained()
    assert asked == [["untrained"]] * 2


def test_the_untrained_base_has_a_run_of_its_own(config, asked):
    (config.run_dir / "adapter").mkdir()
    with pytest.raises(UserError, match="holds a training: choose another name"):
        pipeline.Pipeline(config).untrained()
    assert asked == []


def test_another_number_of_checkpoints_is_evaluated_again(config, asked, monkeypatch):
    sent = {}
    monkeypatch.setattr(pipeline.RunLogger, "metrics", lambda self, values, step: sent.update(values))
    (config.run_dir / "adapter").mkdir()
    write_json(config.run_dir / "adapter" / "flipkd.json", {})
    for count in (1, 1, 3):
        run = pipeline.Pipeline(with_checkpoints(config, count))
        run.evaluate()
    assert asked == [["evaluate"]] * 2
    assert sent["mean_test.student_readout.roc_auc"] == sent["test.student_readout.roc_auc"] == 1
    assert sent["mean_test.student.accuracy"] == 0.5 and "mean_test.student.roc_auc" not in sent
    assert {key.split(".")[0] for key in sent} == {"test", "mean_test"}


@dataclass(frozen=True)
class Second(World):
    """Rank 1 of 2, whose file system is behind: what rank 0 has seen decides."""

    seen: tuple[bool, bool] = (True, True)
    rank: int = 1
    size: int = 2

    def gather_object(self, value):
        return [[self.seen], value]

    def any(self, flag: bool) -> bool:
        return True  # rank 0 has looked


def test_what_rank_0_sees_is_what_all_ranks_do(config, monkeypatch):
    trained = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(pipeline, "train", lambda *_: trained.append(1))
    config = config.model_copy(update={"distributed": config.distributed.model_copy(update={"num_workers": 2})})
    monkeypatch.setattr(pipeline, "join_world", lambda *_: Second(seen=(True, True)))
    pipeline.train_here(config)
    assert not trained
    monkeypatch.setattr(pipeline, "join_world", lambda *_: Second(seen=(False, False)))
    with pytest.raises(UserError, match="the teacher's store lacks texts: run `flipkd score` first"):
        pipeline.train_here(config)
    monkeypatch.setattr(pipeline, "join_world", lambda *_: Second(seen=(True, False)))
    pipeline.train_here(config)
    assert trained
