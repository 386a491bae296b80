"""The runs of a comparison: their folders, the call that makes one, and the loop that keeps the cluster busy."""

import gc
import logging
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flipkd_dist.comparison import REFERENCE, Row
from flipkd_dist.comparison_rows import PlannedRun
from flipkd_dist.config import RunConfig, TeacherConfig, validate
from flipkd_dist.console import logging_to
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.model_files import one_line
from flipkd_dist.pipeline import Pipeline, absolute_paths
from flipkd_dist.preflight import Inputs, check_inputs
from flipkd_dist.ray_launch import Tasks, trains_in_task
from flipkd_dist.run_folder import RunFolder, digest
from flipkd_dist.stop import handling, stop_at_once
from flipkd_dist.teach import check_teachable

logger = logging.getLogger("flipkd_dist")
POLL_S = 0.5
STAGE = "row"  # in stages.json: the run is all that the table needs


@dataclass(eq=False)
class Run:
    """One run of a row, in its folder."""

    planned: PlannedRun
    config: RunConfig
    inputs: Inputs
    key: str  # of all that its results depend on
    status: str = "waiting"  # running, done, stopped, failed
    reason: str = ""  # of a failure
    started: float = 0.0  # by the monotonic clock

    @property
    def row(self) -> Row:
        return self.planned.row

    @property
    def name(self) -> str:
        return f"{self.row.name} seed {self.planned.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config)

    @property
    def is_finished(self) -> bool:
        return self.folder.done(STAGE, self.key)

    def nest(self, parent_run_id: str | None) -> None:
        """Let MLflow show the run below that of the comparison."""
        tracking = self.config.tracking.model_copy(update={"parent_run_id": parent_run_id})
        self.config = self.config.model_copy(update={"tracking": tracking})

    def entry(self, folder: Path) -> dict[str, Any]:
        """The run in comparison.json, which lies in `folder`."""
        status = "done" if self.is_finished else self.status
        where = str(self.folder.path.relative_to(folder))
        return {"seed": self.planned.seed, "folder": where, "status": status, "reason": self.reason}


def place_runs(planned: list[PlannedRun], folder: Path) -> list[Run]:
    """Check every run and give it a folder `rows/ROW-seedN-HASH`: changed settings or data never meet old results.

    Raises:
        UserError: names the row.
    """
    checked: dict[str, Inputs] = {}  # by row: the seed changes nothing that is checked
    loaded: list[TeacherConfig] = []
    runs: list[Run] = []
    for one in planned:
        name = one.row.name
        placed = absolute_paths(one.config)
        placed = placed.model_copy(update=dict(name=f"{name}-seed{one.seed}", output_dir=str(folder / "rows")))
        if name not in checked:
            try:
                checked[name] = check_inputs(placed, load=placed.teacher not in loaded)
                if one.row.kind == "classic":
                    check_teachable(placed)
            except UserError as error:
                raise UserError(f"row {name}: {error}") from None
            loaded.append(placed.teacher)
        inputs = replace(checked[name], config=placed)
        parts = [inputs.digest("train", "validation", "test"), one.row.kind]
        if one.row.kind == "classic":
            parts += [teaching_run(runs, one.seed).config.name, one.config.teach.model_dump(mode="json")]
        placed = placed.model_copy(update=dict(name=f"{name}-seed{one.seed}-{digest(*parts)[:8]}"))
        inputs = replace(inputs, config=placed, folder=RunFolder(placed))
        runs.append(Run(one, placed, inputs, digest(*parts, placed.train.test_checkpoints)))
    return runs


def teaching_run(runs: list[Run], seed: int) -> Run:
    """The run whose student teaches the encoder of `classic`."""
    return next(run for run in runs if run.row.name == REFERENCE and run.planned.seed == seed)


def make_run(config: dict[str, Any], kind: str, taught_by: str | None, key: str) -> tuple[str, str]:
    """Make one run to its end, in a task of the cluster; its messages are in `run.log` of its folder.

    Returns:
        ("done" | "stopped" | "failed", why)
    """
    config = validate(config, "the driver's configuration")
    folder = RunFolder(config)
    folder.open()  # else the log would make it a folder that is not ours
    with suppress(OSError):  # the peak of memory that is measured is this run's, not of what the process did before
        Path("/proc/self/clear_refs").write_text("5")
    with logging_to(str(folder.path / "run.log")):
        try:
            _make(config, kind, taught_by)
            folder.mark_done(STAGE, key)
            return "done", ""
        except StoppedOnRequest as stopped:
            logger.info("%s", stopped)
            return "stopped", str(stopped)
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
            logger.error("%s", traceback.format_exc())
            return "failed", said
        finally:
            gc.collect()


def _make(config: RunConfig, kind: str, taught_by: str | None) -> None:
    if kind == "classic":
        from flipkd_dist import classic

        classic.run(config, Path(taught_by))
        return
    pipeline = Pipeline(config)
    pipeline.score()
    if kind == "untrained":
        pipeline.untrained()
    else:
        pipeline.train(then_evaluate=True)


class Runner:
    """Keeps `at_once` runs in work until all have ended, or until it is asked to stop."""

    def __init__(self, runs: list[Run], at_once: int, note: Callable[[], None]):
        """`note` is called whenever a run has ended."""
        self.runs, self.at_once, self.note, self.stopping = runs, at_once, note, False
        self.tasks = Tasks(make_run)

    def run(self) -> None:
        """
        Raises:
            StoppedOnRequest: asked to stop, or a run was asked by itself; it has written its checkpoint.
        """
        for run in self.runs:
            run.status = "done" if run.is_finished else "waiting"
        finished = sum(run.status == "done" for run in self.runs)
        if finished:
            logger.info("%d of %d runs are finished already", finished, len(self.runs))
        bar = tqdm(total=len(self.runs), initial=finished, desc="compare", unit="run", disable=None)
        with bar, logging_redirect_tqdm([logger]), self._listening():
            while self._start_some() or self.tasks.running:
                for run, result in self.tasks.ended(POLL_S):
                    self._ended(run, result)
                    self.note()
                    bar.update()
                if self.stopping:
                    self._ask_to_stop()
        if any(run.status in ("waiting", "stopped") for run in self.runs):
            finished = sum(run.status == "done" for run in self.runs)
            raise StoppedOnRequest(
                f"stopped on request with {finished} of {len(self.runs)} runs finished: run the same command again "
                "to go on"
            )

    def _start_some(self) -> bool:
        """Fill free places; whether anything is left that may start."""
        for run in self.runs:
            if self.stopping or len(self.tasks.running) >= self.at_once:
                break
            if run.status != "waiting":
                continue
            teacher = teaching_run(self.runs, run.planned.seed) if run.row.kind == "classic" else None
            if teacher is not None and teacher.status in ("waiting", "running"):
                continue
            if teacher is not None and teacher.status != "done":  # failed, or stopped by itself
                run.status, run.reason = teacher.status, f"{REFERENCE} of the same seed has {teacher.status}"
                continue
            run.status, run.started = "running", time.monotonic()
            run.folder.stop.unlink(missing_ok=True)
            taught_by = None if teacher is None else str(teacher.folder.path)
            values = run.config.model_dump(mode="json")
            classic = run.row.kind == "classic"
            computes = classic or trains_in_task(run.config)
            self.tasks.start(run, run.config, computes, classic, values, run.row.kind, taught_by, run.key)
        return not self.stopping and any(run.status == "waiting" for run in self.runs)

    def _ended(self, run: Run, result: Any) -> None:
        run.status, run.reason = result if isinstance(result, tuple) else ("failed", one_line(result))
        took = time.monotonic() - run.started
        if run.status == "failed":
            logger.error("%s: failed: %s (%s)", run.name, run.reason, run.folder.path / "run.log")
        else:
            logger.info("%s: %s after %.0f s", run.name, run.status, took)

    def _ask_to_stop(self) -> None:
        """Again at every look: a run that has just begun forgets what it was asked before."""
        for run in self.tasks.running.values():
            if run.folder.path.exists():
                run.folder.stop.touch()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def ask(number: int, frame: object) -> None:
            if self.stopping:
                stop_at_once(number, frame)
            self.stopping = True
            logger.info("stopping: runs in work write their checkpoints first")

        with handling(ask):
            before = signal.signal(signal.SIGINT, ask)
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, before)
