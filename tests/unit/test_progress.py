"""What stands on the disk when a checkpoint is written; student and engine are stood in for."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from flipkd_dist import progress
from flipkd_dist.checkpoint import checkpoints
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.progress import Progress
from flipkd_dist.spool import SPOOL
from flipkd_dist.world import World


@pytest.fixture
def training(tmp_path, monkeypatch):
    found = object.__new__(Progress)
    found.folder, found.keep, found.num_steps, found.inputs, found.base_answers = tmp_path, 1, 5, "hash", []
    found.order = SimpleNamespace(seed=0, contrast_batch_size=8, accumulation=1)
    engine = SimpleNamespace(shapes=dict, slices=dict)
    found.bench = SimpleNamespace(world=World(), engine=engine, inputs=SimpleNamespace(base_fingerprint="f"))
    monkeypatch.setattr(progress, "version", lambda _: "1")
    return found


@pytest.fixture
def done(training, monkeypatch):
    """The order in which lines and checkpoints, both stood in for, are written."""
    done = []
    training.log = SimpleNamespace(
        path=training.folder / "metrics.jsonl", state=dict, save=lambda: done.append("lines")
    )
    monkeypatch.setattr(progress, "save_checkpoint", lambda *_: done.append("checkpoint"))
    return done


def test_lines_that_waited_for_room_are_written_before_the_checkpoint_that_goes_on_after_them(training, done):
    training._save(3, False)
    assert done == ["lines", "checkpoint"]


def test_without_room_for_them_no_checkpoint_says_that_they_are_there(training, done):
    def full():
        raise OSError(28, "No space left on device")

    training.log.save = full
    with pytest.raises(UserError, match=r"no space left on device.*metrics\.jsonl.*run the same command again"):
        training._save(3, False)
    assert done == []


class Disk:
    """What a power loss would leave of each file: what it held when it was last synced."""

    def __init__(self, monkeypatch):
        self.kept: dict[str, str] = {}
        self.synced: list[str] = []  # by name, in order
        self.at_manifest: list[dict[str, str]] = []  # what else was kept when a checkpoint's manifest reached the disk
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.synced.append(path.name)
        if path.name.startswith("manifest.json"):
            self.at_manifest.append(dict(self.kept))
        elif path.suffix == ".jsonl":
            self.kept[path.name] = path.read_text()


@pytest.fixture
def logged(training, tmp_path, monkeypatch):
    """Real lines, real messages to MLflow, which nobody sends, and real checkpoints: every second step, validated
    every fourth."""
    config = RunConfig.model_validate({"name": "x", "output_dir": str(tmp_path)})
    config.run_dir.mkdir()
    training.folder = config.run_dir / "checkpoints"
    training.log = MetricLog(config, World(), config.run_dir / "metrics.jsonl", 5, "run", SimpleNamespace())
    training.log._keep_lines(0)
    training.eval_steps, training.save_steps = 4, 2

    def candidate(step):
        training.log.write(step, {"validation_f1": 0.5})
        return {"score": 0.5, "threshold": 0.5, "probes": [0.1]}

    training._candidate = candidate
    return training


def told(kept: dict[str, str], name: str) -> list[tuple[int, str]]:
    """Step and metric of each point in a file of lines."""
    lines = [json.loads(line) for line in kept[name].splitlines()]
    points = [(line.pop("step"), line.get("metrics", line)) for line in lines]
    return [(step, key) for step, values in points for key in values]


def test_a_power_loss_takes_nothing_of_the_steps_up_to_a_checkpoint(logged, monkeypatch):
    disk = Disk(monkeypatch)
    for step in range(1, 5):
        logged.log.write(step, {"loss": 1.0})
        logged.save_if_due(step, stopping=False)
    steps = [(step, "loss") for step in range(1, 5)]
    expected = [steps[:2], steps, [*steps, (4, "validation_f1")]]  # steps 2, 4, and 4 once it is validated
    for name in ("metrics.jsonl", SPOOL):
        assert [told(kept, name) for kept in disk.at_manifest] == expected
        assert disk.synced.count(name) == len(expected)  # none a step
    first = disk.synced[: disk.synced.index("manifest.json.tmp")]
    assert first.index("metrics.jsonl") < first.index(SPOOL) < first.index("x", first.index(SPOOL))  # names too
    assert [found.step for found in checkpoints(logged.folder)] == [4]


def test_where_points_for_mlflow_find_no_room_no_checkpoint_says_that_they_are_there(logged, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logged.log.tracker._spool, "put", full)
    logged.log.write(2, {"loss": 1.0})
    with pytest.raises(UserError, match=r"^no space left on device: .*mlflow-spool\.jsonl was not written, no check"):
        logged.save_if_due(2, stopping=False)
    assert not logged.folder.exists()
