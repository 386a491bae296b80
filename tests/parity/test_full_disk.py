"""A disk that is full or broken ends a training on all ranks alike, with what is complete; freed, it goes on as if
nothing had been."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from gang import run_gang
from test_resume_parity import STEPS, assert_equal, lines, prepared, resume, run_config, undisturbed  # noqa: F401, fixtures  # fmt: skip

from flipkd_dist import checkpoint, progress, train
from flipkd_dist.checkpoint import checkpoints
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import StoppedOnRequest, UserError

pytestmark = pytest.mark.parity


def on_disk(prepared: RunConfig, disk: Path, name: str) -> RunConfig:  # noqa: F811
    shutil.copytree(prepared.run_dir / "teacher", disk / name / "teacher")
    return run_config(prepared.model_copy(update={"output_dir": str(disk)}), name, 2)


def leave_room(disk: Path, nbytes: float) -> None:
    """Let a file take all but `nbytes` of a file system."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(free - nbytes))


def end_of(config: RunConfig, sabotage=None) -> tuple[str, str]:
    """How a training ends: the error's kind and line."""
    if sabotage is not None:
        sabotage()
    try:
        train.train(config)
    except (StoppedOnRequest, UserError) as error:
        return type(error).__name__, str(error)
    return "finished", ""


def checkpoint_size(config: RunConfig) -> int:
    """Bytes of a checkpoint of a finished run."""
    return sum(file.stat().st_size for file in checkpoints(config.run_dir / "checkpoints")[-1].path.iterdir())


def test_a_disk_that_fills_up_then_is_freed(prepared, undisturbed, run_disk):  # noqa: F811
    config = on_disk(prepared, run_disk, "full")
    each = checkpoint_size(undisturbed)
    leave_room(run_disk, 2.6 * each + 65536)  # for steps 2 and 4, not for step 6
    ends = run_gang(2, end_of, config)
    assert ends[0] == ends[1]  # one line for all
    kind, line = ends[0]
    print(line)
    assert kind == "StoppedOnRequest"
    assert line.startswith(f"no space left on device: {config.run_dir}/checkpoints/.step-000006.tmp (rank ")
    assert "step 6's checkpoint was not written, step 4's checkpoint is complete: free " in line
    assert line.endswith("MB and run the same command again")
    folder = config.run_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]  # no draft
    leave_room(run_disk, 0.5 * each)
    kind, line = run_gang(2, end_of, config)[0]
    assert kind == "UserError" and line.startswith(f"output_dir: {config.run_dir}: ") and "make room" in line
    (run_disk / "ballast").unlink()
    assert resume(config, 2) == 4
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)


def _break_disk_of_rank_1() -> None:
    """From step 4 on; in this fork alone."""
    whole = checkpoint.save_file

    def save_file(tensors, path):
        if os.environ["RANK"] == "1" and "step-000004" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        whole(tensors, path)

    checkpoint.save_file = save_file


def test_storage_that_fails_on_one_rank(prepared):  # noqa: F811
    config = run_config(prepared, "broken", 2)
    ends = run_gang(2, end_of, config, _break_disk_of_rank_1)
    assert ends[0] == ends[1]
    kind, line = ends[0]
    assert kind == "StoppedOnRequest"
    assert line.startswith("input/output error: ") and f"(rank 1 on {os.uname().nodename})" in line
    assert line.endswith(
        "step 4's checkpoint was not written, step 2's checkpoint is complete: look at the storage and run the same "
        "command again"
    )


def _fill_before_the_adapter(disk: Path):
    def sabotage() -> None:
        whole = train.save_adapter

        def save_adapter(*arguments):
            leave_room(disk, 4096)
            whole(*arguments)

        train.save_adapter = save_adapter

    return sabotage


def test_no_half_adapter_and_no_validation_is_lost(prepared, undisturbed, run_disk):  # noqa: F811
    config = on_disk(prepared, run_disk, "adapter")
    ends = run_gang(2, end_of, config, _fill_before_the_adapter(run_disk))
    assert ends[0] == ends[1]
    kind, line = ends[0]
    assert kind == "StoppedOnRequest"
    assert f"the adapter was not written, step {STEPS}'s checkpoint is complete: make room" in line
    assert not [path.name for path in config.run_dir.iterdir() if "adapter" in path.name]
    (run_disk / "ballast").unlink()
    assert resume(config, 2) == STEPS
    assert_equal(config, undisturbed)


def _refuse_the_validation() -> None:
    def amend(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    progress.amend_manifest = amend


def test_a_quota_that_refuses_what_rank_0_alone_writes(prepared, undisturbed):  # noqa: F811
    """The other rank learns of it too, and does not wait in the next step."""
    config = run_config(prepared, "quota", 2)
    ends = run_gang(2, end_of, config, _refuse_the_validation)
    assert ends[0] == ends[1]
    assert ends[0][0] == "StoppedOnRequest" and ends[0][1].startswith("disk quota exceeded: ")
    assert "step 4's validation was not written, step 4's checkpoint is complete: make room" in ends[0][1]
    assert resume(config, 2) == 4
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)
