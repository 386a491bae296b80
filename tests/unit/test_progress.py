"""What a checkpoint of a training relies on."""

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from flipkd_dist import progress
from flipkd_dist.errors import UserError
from flipkd_dist.progress import Progress
from flipkd_dist.world import World


def let_lines(made: Progress, write: Callable[[], None]) -> None:
    made.log.flush = made.log.save = write


@pytest.fixture
def made(tmp_path, monkeypatch) -> Progress:
    """One whose parts note what is asked of them."""
    made, world = Progress.__new__(Progress), World()
    made.asked = []
    monkeypatch.setattr(progress, "save_checkpoint", lambda *_: made.asked.append("checkpoint"))
    engine = SimpleNamespace(shapes=dict, slices=dict)
    made.bench = SimpleNamespace(world=world, engine=engine, inputs=SimpleNamespace(base_fingerprint="base"))
    made.order = SimpleNamespace(seed=1, contrast_batch_size=2, accumulation=1)
    made.log = SimpleNamespace(path=tmp_path / "metrics.jsonl", state=dict)
    let_lines(made, lambda: made.asked.append("lines"))
    made.folder, made.keep, made.inputs, made.num_steps, made.base_answers = tmp_path / "checkpoints", 1, "", 4, []
    monkeypatch.setattr(progress, "version", lambda name: "1")
    return made


def test_lines_that_wait_for_room_are_in_the_file_before_a_checkpoint_is(made):
    made._save(2, unvalidated=False)
    assert made.asked == ["lines", "checkpoint"]


def test_lines_that_find_no_room_end_the_training_before_the_checkpoint(made):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(made.log.path))

    let_lines(made, full)
    with pytest.raises(UserError, match=r"metrics.jsonl was not written, no checkpoint is complete yet: make room"):
        made._save(2, unvalidated=False)
    assert made.asked == []
