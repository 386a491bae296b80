"""`flipkd compare`: the rows of a table as runs on one cluster, then its statistics and its report."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flipkd_dist import comparison_report
from flipkd_dist.comparison import ENCODERS, Comparison, Row
from flipkd_dist.comparison_reading import INDEX, SPLITS, read_comparison
from flipkd_dist.comparison_rows import chosen_rows, planned_runs, settings_of
from flipkd_dist.comparison_runs import Run, Runner, place_runs
from flipkd_dist.config import RunConfig
from flipkd_dist.durable import one_at_a_time
from flipkd_dist.errors import StoppedAtOnce, UserError
from flipkd_dist.pipeline import absolute_paths, told
from flipkd_dist.ray_launch import check_room, join_or_start_ray, runs_at_once
from flipkd_dist.run_folder import RunFolder, read_json, write_json
from flipkd_dist.run_logger import RunLogger, known_run, training_run
from flipkd_dist.score_stage import fill_stores
from flipkd_dist.statistics import compare_rows, table
from flipkd_dist.teacher_stage import is_scored
from flipkd_dist.tracking_server import tracking_uri

logger = logging.getLogger("flipkd_dist")


def compare(
    config: RunConfig,
    names: Sequence[str] | None = None,
    num_seeds: int = 5,
    sweeps: Sequence[str] = (),
    teachers: Sequence[str] = (),
    settings: Sequence[str] = (),
    jobs: int | None = None,
) -> bool:
    """Make the runs that are not finished, print the table and write the report; whether all runs are finished.

    Args:
        names, sweeps, teachers, settings: as `comparison_rows.chosen_rows` takes them.
        jobs: the most runs at once; None for what the cluster has room for.
    Raises:
        UserError: before anything is written.
        StoppedOnRequest, StoppedAtOnce: asked to stop, or a run was; the next call goes on.
    """
    made = Table(config, chosen_rows(config, names, sweeps, teachers, settings), num_seeds)
    is_finished = all(run.is_finished for run in made.runs)
    busy = f"{made.folder.path}: another `flipkd compare` is at work there: wait for it, or choose another name"
    try:
        if not is_finished:
            made.join()
        with one_at_a_time(made.folder.path, busy):
            made.open()
            if not is_finished:
                made.make(jobs)
            made.conclude()
    except KeyboardInterrupt:  # as any other signal that asks to stop
        raise StoppedAtOnce("stopped by SIGINT: run the same command again to go on") from None
    return made.say_failures() == 0


class Table:
    """A comparison on its way: the folder, the rows and their runs."""

    def __init__(self, config: RunConfig, rows: list[Row], num_seeds: int):
        """Checks every run; writes nothing.

        Raises:
            UserError: names the row.
        """
        config = absolute_paths(config)
        if config.data.test is None:
            raise UserError("data.test is missing: a comparison needs pairs to compare on")
        self.name, self.rows = config.name, rows
        self.config = config.model_copy(update={"name": f"{config.name}-compare"})
        self.folder = RunFolder(self.config)
        self.folder.check()
        self.shared = _shared(config, self.folder.path, tracking_uri(self.config))
        self.runs = place_runs(planned_runs(self.shared, rows, num_seeds), self.folder.path)

    def join(self) -> None:
        """
        Raises:
            UserError: the cluster has no room for a worker.
        """
        join_or_start_ray(self.shared, log_to_driver=False)
        for run in self.runs:
            check_room(run.config)

    def make(self, jobs: int | None) -> None:
        """Make the runs on the joined cluster; what ends this early leaves every finished one.

        Raises:
            StoppedOnRequest
        """
        tracker = RunLogger(self.config, training_run(self.config, None))
        tracker.reopen()
        for run in self.runs:
            run.nest(tracker.run_id)
        with told(tracker):
            for run in self.runs:
                if not run.is_finished and not is_scored(run.inputs):
                    fill_stores(run.inputs)
            Runner(self.runs, runs_at_once([run.config for run in self.runs], jobs), self.note).run()
            self.note()
        tracker.finish("FAILED" if any(run.status == "failed" for run in self.runs) else "FINISHED")

    def open(self) -> None:
        self.folder.open()
        self.note()

    def note(self) -> None:
        """Say in the folder what belongs to the table now."""
        entries = []
        for row in self.rows:
            runs = self._students_of(row) if row.kind in ENCODERS else [run for run in self.runs if run.row == row]
            entries.append({**asdict(row), "runs": [run.entry(self.folder.path) for run in runs]})
        write_json(self.folder.path / INDEX, {"name": self.name, "rows": entries})

    def _students_of(self, encoder: Row) -> list[Run]:
        """Runs whose predictions hold what the encoder says: those with the same teacher."""
        teacher = settings_of(self.shared, encoder).teacher
        return [run for run in self.runs if run.row.kind == "student" and run.planned.config.teacher == teacher]

    def comparison(self) -> Comparison:
        tables = self.runs[0].inputs.splits
        return read_comparison(self.folder.path, {split: tables[split] for split in SPLITS if split in tables})

    def conclude(self) -> None:
        """Statistics and report out of what is finished; printed, written and logged."""
        comparison, folder = self.comparison(), self.folder.path
        results = compare_rows(comparison)
        write_json(folder / INDEX, {**read_json(folder / INDEX), "results": results.as_dict()})
        comparison_report.write(folder, comparison, results, self._flip())
        print(table(results))
        print(f"\ncomparison folder: {folder}\nreport:            {folder / 'report.html'}")
        tracker = RunLogger(self.config, known_run(self.config))
        tracker.metrics(
            {
                f"{row.split}.{row.name}.{row.reading}.{name}": metric.mean
                for row in results.rows
                for name, metric in row.metrics.items()
                if metric.mean is not None
            },
            0,
        )
        for name in (INDEX, "report.html", "report.md"):
            tracker.artifact(folder / name)
        tracker.settle()

    def _flip(self) -> RunConfig:
        return next((run.config for run in self.runs if run.row.name == "flip"), self.shared)

    def say_failures(self) -> int:
        """One line for each run that has failed; how many there are."""
        failed = [run for run in self.runs if run.status == "failed"]
        for run in failed:
            print(f"failed: {run.name}: {run.reason} ({run.folder.path / 'run.log'})")
        return len(failed)


def _shared(config: RunConfig, folder: Path, uri: str) -> RunConfig:
    """What all rows have in common besides the user's settings: one teacher's store, one MLflow store."""
    teacher = config.teacher.model_copy(update={"store_path": config.teacher.store_path or str(folder / "teacher")})
    keep = max(config.train.keep_checkpoints, config.train.test_checkpoints)
    train = config.train.model_copy(update={"keep_checkpoints": keep})
    tracking = config.tracking.model_copy(update={"mlflow_tracking_uri": uri})
    return config.model_copy(update={"teacher": teacher, "train": train, "tracking": tracking})
