"""What stands on the disk when a checkpoint is written; the checkpoint itself is stood in for."""

from types import SimpleNamespace

import pytest

from flipkd_dist import progress
from flipkd_dist.errors import UserError
from flipkd_dist.progress import Progress
from flipkd_dist.world import World


@pytest.fixture
def training(tmp_path, monkeypatch):
    done, found = [], object.__new__(Progress)
    found.folder, found.keep, found.num_steps, found.inputs, found.base_answers = tmp_path, 1, 5, "hash", []
    found.order = SimpleNamespace(seed=0, contrast_batch_size=8, accumulation=1)
    engine = SimpleNamespace(shapes=dict, slices=dict)
    found.bench = SimpleNamespace(world=World(), engine=engine, inputs=SimpleNamespace(base_fingerprint="f"))
    found.log = SimpleNamespace(path=tmp_path / "metrics.jsonl", state=dict, save=lambda: done.append("lines"))
    monkeypatch.setattr(progress, "save_checkpoint", lambda *_: done.append("checkpoint"))
    monkeypatch.setattr(progress, "version", lambda _: "1")
    found.done = done
    return found


def test_lines_that_waited_for_room_are_written_before_the_checkpoint_that_goes_on_after_them(training):
    training._save(3, False)
    assert training.done == ["lines", "checkpoint"]


def test_without_room_for_them_no_checkpoint_says_that_they_are_there(training):
    def full():
        raise OSError(28, "No space left on device")

    training.log.save = full
    with pytest.raises(UserError, match=r"no space left on device.*metrics\.jsonl.*run the same command again"):
        training._save(3, False)
    assert training.done == []
