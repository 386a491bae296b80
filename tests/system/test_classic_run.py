"""Classic distillation with a tiny student and encoder: it learns the student's answers, goes on, is not repeated."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from matchers import MadeUpMatcher, saved_adapter
from safetensors.torch import load_file
from test_teach_run import TOPICS, write_topics
from tiny import save_teacher

from flipkd_dist import classic, soft_labels, teach_trainer
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.run_folder import read_json
from flipkd_dist.teacher_source import text_teacher

pytestmark = pytest.mark.system


class Knowing(MadeUpMatcher):
    """A student that knows the topics, and is never quite sure. The labels of its training pairs are all wrong."""

    def __init__(self, *_, **__):
        super().__init__()

    def scores(self, texts, limits, done) -> np.ndarray:
        done(len(texts), 0)
        topics = [[sum(word in TOPICS[0] for word in text.split()) > 1 for text in pair] for pair in texts]
        return np.array([[0.8 if first == second else 0.3, 0.0] for first, second in topics])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    sizes = {"train": 120, "validation": 60, "test": 60}
    data = {
        split: write_topics(folder / f"{split}.jsonl", count, seed) for seed, (split, count) in enumerate(sizes.items())
    }
    train = folder / "train.jsonl"
    records = [json.loads(line) for line in train.read_text().splitlines()]
    train.write_text("".join(json.dumps(record | {"label": 1 - record["label"]}) + "\n" for record in records))
    adapter, *_ = saved_adapter(folder / "sft")
    return {"data": data, "base": str(save_teacher(folder / "base")), "sft": adapter.parent}


@pytest.fixture(autouse=True)
def student(monkeypatch):
    """The student's class; a test may take the real one."""
    monkeypatch.setattr(soft_labels, "Matcher", Knowing)


def config(inputs: dict, output, **changes) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "classic",
            "output_dir": str(output),
            "data": inputs["data"],
            "teacher": {"model_name_or_path": inputs["base"], "max_length": 32},
            "teach": {"learning_rate": 5e-3},
            "train": {"max_steps": 20, "per_device_train_batch_size": 16, "eval_steps": 6},
            "distributed": {"num_workers": 2},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory) -> RunConfig:
    """A finished row."""
    settings = config(inputs, tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_labels, "Matcher", Knowing)
        classic.run(settings, inputs["sft"])
    return settings


def weights(settings: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(settings.run_dir / "encoder" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def scores(settings: RunConfig, split: str) -> dict[str, np.ndarray]:
    table = pq.read_table(settings.run_dir / "scores.parquet")
    rows = [row for row in table.to_pylist() if row["split"] == split]
    return {name: np.array([row[name] for row in rows]) for name in table.column_names}


def test_the_encoder_moves_towards_the_students_answers(inputs, done):
    lesson = classic.check(done, inputs["sft"])
    pairs = lesson.teaching.splits["test"]
    expected = Knowing().scores(list(pairs.labelled_texts()), None, lambda *_: None)[:, 0]
    before = classic.similarities(text_teacher(done, taught=False), lesson.teaching)["test"]
    after = scores(done, "test")["similarity"]
    assert np.corrcoef(before, expected)[0, 1] < 0.3 and np.corrcoef(after, expected)[0, 1] > 0.8
    for answer in (0.3, 0.8):  # neither 0 nor 1
        assert abs(after[expected == answer].mean() - answer) < 0.1


def test_what_stands_in_the_folder(inputs, done):
    folder = done.run_dir
    assert {path.name for path in folder.iterdir()} - {"mlartifacts"} == {
        "config.yaml", "cost.json", "encoder", "metrics.json", "mlflow.db", "mlflow.json", "mlflow-spool.jsonl",
        "mlflow-spool.sent.json", "scores.parquet", "soft_labels.parquet", "stages.json",
    }  # fmt: skip
    table = pq.read_table(folder / "scores.parquet")
    assert dict(zip(table.column_names, map(str, table.schema.types), strict=True)) == {
        "split": "string", "step": "int64", "pair": "int64", "p_match": "double", "similarity": "double",
    }  # fmt: skip
    assert table["p_match"].null_count == len(table) == 120 and table["similarity"].null_count == 0
    assert set(table["step"].to_pylist()) == {20} and scores(done, "test")["pair"].tolist() == list(range(60))
    metrics, cost = read_json(folder / "metrics.json"), read_json(folder / "cost.json")
    assert metrics["step"] == 20 and set(metrics["test"]) == set(metrics["validation"]) == {"encoder"}
    assert metrics["test"]["encoder"]["threshold"] == metrics["validation"]["encoder"]["threshold"]
    assert cost["trainable_parameters"] == sum(value.numel() for value in weights(done).values())
    assert cost["tokens"] == 5 * 120 * 2 * 10 and cost["seconds"] > 0 and cost["peak_memory"] > 2**20
    manifest = read_json(folder / "encoder" / "flipkd.json")
    assert manifest["teach"]["max_steps"] == 20 and manifest["teach"]["per_device_train_batch_size"] == 32
    assert set(read_json(folder / "stages.json")) == {"train", "evaluate"}


def test_the_budget_is_that_of_the_student(inputs, tmp_path):
    train = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    teach = classic.check(config(inputs, tmp_path, train=train), inputs["sft"]).teaching.config.teach
    assert (teach.per_device_train_batch_size, teach.max_steps) == (48, 2 * 3)
    assert teach.loss == "cosine" and not (tmp_path / "classic").exists()


def test_a_killed_row_goes_on_as_if_undisturbed(inputs, done, tmp_path, monkeypatch):
    settings = config(inputs, tmp_path)
    step_end = teach_trainer._Course.on_step_end

    def dying(self, args, state, control, **others):
        step_end(self, args, state, control, **others)
        if state.global_step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teach_trainer._Course, "on_step_end", dying)
        with pytest.raises(KeyboardInterrupt):
            classic.run(settings, inputs["sft"])
    assert not (settings.run_dir / "encoder").exists()
    monkeypatch.setattr(soft_labels, "Matcher", None)  # not needed again
    seen = []
    monkeypatch.setattr(
        teach_trainer._Course,
        "on_step_end",
        lambda self, *a, **k: seen.append(a[1].global_step) or step_end(self, *a, **k),
    )
    classic.run(settings, inputs["sft"])
    assert seen == list(range(7, 21)) and equal(weights(settings), weights(done))
    assert not (settings.run_dir / "encoder.checkpoints").exists()


def test_the_stop_file_saves_and_stops(inputs, done, tmp_path, monkeypatch):
    settings = config(inputs, tmp_path)
    step_end = teach_trainer._Course.on_step_end

    def asking(self, args, state, control, **others):
        if state.global_step == 3:
            (settings.run_dir / "stop").touch()
        step_end(self, args, state, control, **others)

    with monkeypatch.context() as patch:
        patch.setattr(teach_trainer._Course, "on_step_end", asking)
        with pytest.raises(StoppedOnRequest, match="same command"):
            classic.run(settings, inputs["sft"])
    assert [path.name for path in (settings.run_dir / "encoder.checkpoints").iterdir()] == ["checkpoint-3"]
    classic.run(settings, inputs["sft"])
    assert equal(weights(settings), weights(done))


def test_the_same_again_is_skipped_and_another_student_is_not(inputs, tmp_path, monkeypatch):
    settings = config(inputs, tmp_path, train={"max_steps": 2, "per_device_train_batch_size": 16})
    classic.run(settings, inputs["sft"])
    before = weights(settings)
    with monkeypatch.context() as patch:
        patch.setattr(classic, "fine_tune", None)
        patch.setattr(classic, "similarities", None)
        classic.run(settings, inputs["sft"])
    fewer = dict(inputs, data=dict(inputs["data"], test=inputs["data"]["validation"]))
    with monkeypatch.context() as patch:
        patch.setattr(classic, "fine_tune", None)
        classic.run(config(fewer, tmp_path, train=settings.train.model_dump()), inputs["sft"])
    assert scores(settings, "test")["similarity"].tolist() == scores(settings, "validation")["similarity"].tolist()
    other, *_ = saved_adapter(tmp_path / "other", rank=4)
    monkeypatch.setattr(soft_labels, "Matcher", lambda *_, **__: MadeUpMatcher())
    classic.run(settings, other.parent)
    assert not equal(weights(settings), before)


def test_a_student_that_is_not_trained_is_refused_before_anything_is_written(inputs, tmp_path):
    with pytest.raises(UserError, match="no adapter yet: train the student first"):
        classic.run(config(inputs, tmp_path), tmp_path)
    assert not (tmp_path / "classic").exists()
