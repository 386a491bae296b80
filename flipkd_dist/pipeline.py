"""The stages of a run: score, train, evaluate, register. One that is complete for the same inputs says so."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from flipkd_dist.beir_folder import is_beir_folder
from flipkd_dist.config import RunConfig, without_credentials
from flipkd_dist.errors import StoppedAtOnce, StoppedOnRequest, UserError
from flipkd_dist.evaluate import format_table, pair_texts, tables_by_split
from flipkd_dist.pair_stream import PairStream
from flipkd_dist.preflight import Inputs, check_inputs, pairs_content
from flipkd_dist.promotion import measured_tags
from flipkd_dist.ray_launch import check_room, join_or_start_ray, run_workers
from flipkd_dist.ray_storage import check_reached
from flipkd_dist.registry import register
from flipkd_dist.run_folder import RunFolder, digest, read_json
from flipkd_dist.run_logger import RunLogger, elsewhere, known_run, send_waiting, training_run
from flipkd_dist.score import survey
from flipkd_dist.score_stage import score_streams, score_tables
from flipkd_dist.stop import StopRequest
from flipkd_dist.taught_folder import announce, taught_path
from flipkd_dist.teacher_stage import is_scored
from flipkd_dist.tracking import check_run
from flipkd_dist.tracking_server import server_errors, shown_uri

logger = logging.getLogger("flipkd_dist")
NUM_EXAMPLES = 5  # pairs kept with the registered model


def absolute_paths(config: RunConfig) -> RunConfig:
    """Every path that exists, made absolute: workers run in other folders."""

    def whole(value):
        if isinstance(value, list):
            return [whole(one) for one in value]
        if value and Path(value).expanduser().exists():
            return str(Path(value).expanduser().resolve())
        folder, colon, split = (value or "").rpartition(":")  # FOLDER:SPLIT of data.format beir
        folder = Path(folder).expanduser()
        return f"{folder.resolve()}:{split}" if colon and is_beir_folder(folder) else value

    values = config.model_dump()
    values["output_dir"] = str(Path(config.output_dir).expanduser().resolve())
    if config.tracking.mlflow_tracking_uri is None:  # workers may not have the variable
        values["tracking"]["mlflow_tracking_uri"] = without_credentials(os.environ.get("MLFLOW_TRACKING_URI"))
    if config.teacher.store_path:
        values["teacher"]["store_path"] = str(Path(config.teacher.store_path).expanduser().resolve())
    for section, keys in (
        ("data", ("train", "validation", "test")),
        ("teacher", ("cross_encoder", "scores", *(["model_name_or_path"] if config.teacher.api_base is None else []))),
        ("student", ("model_name_or_path",)),
        ("distributed", ("deepspeed", "storage_path")),
    ):
        for key in keys:
            values[section][key] = whole(values[section][key])
    return RunConfig.model_validate(values)


class Pipeline:
    def __init__(self, config: RunConfig, on_ray: bool = True, trains: bool = True):
        """Checks every input before anything is started or written.

        Args:
            trains: whether there will be training workers; False: the pool of teachers is all that runs.
        Raises:
            UserError
        """
        self.config = absolute_paths(config)
        self.inputs: Inputs = check_inputs(self.config)
        self.folder = self.inputs.folder
        _announce_taught(self.inputs)
        self.trained = self.inputs.digest("train", "validation")
        self.evaluated = digest(self.inputs.digest("train", "validation", "test"), self.config.train.test_checkpoints)
        self.scored_splits = [split for split in ("validation", "test") if split in self.inputs.splits]
        self.folder.check_trained(self.trained)
        if on_ray:
            if self._needs_workers():
                join_or_start_ray(self.config)
                if trains:
                    check_room(self.config)
            self.folder.open()

    def _needs_workers(self) -> bool:
        stages = self.folder.done("train", self.trained) and self.folder.done("evaluate", self.evaluated)
        return not (stages and is_scored(self.inputs))

    def score(self) -> None:
        start = time.monotonic()
        score_tables(self.inputs)
        _say("score", start)

    def train(self, then_evaluate: bool = False) -> None:
        """Train unless the adapter is complete; evaluation in the same workers saves their start."""
        start = time.monotonic()
        stages = [] if self.complete("train", self.trained) else ["train"]
        if then_evaluate and not self.scored_splits:
            logger.info("evaluate: skipped, there are neither validation nor test pairs")
        elif then_evaluate and (stages or not self.complete("evaluate", self.evaluated)):
            stages.append("evaluate")
        if not stages:
            send_waiting(self.config)
            return
        check_reached(self.folder.teacher)
        run_id = self.mlflow_run() if "train" in stages else None
        tracker = RunLogger(self.config, run_id)
        tracker.reopen()
        with told(tracker), self._stopping() as stop:
            run_workers(self.config, stages, run_id, self.trained)
        if "train" in stages:
            self.conclude(tracker)
        if "evaluate" in stages:
            self._report_evaluation()
        _say(" and ".join(stages), start)
        if stop.signalled:  # too late for a step of training
            raise StoppedOnRequest("stopped on request: run the same command again to go on")

    def conclude(self, tracker: RunLogger) -> None:
        """The training is complete; MLflow learns it."""
        tracker.put(status="FINISHED")  # first: a stage that is done is not gone through again
        self.folder.mark_done("train", self.trained)
        tracker.settle()

    def _stopping(self) -> AbstractContextManager[StopRequest]:
        """Signals to this process stop the workers."""
        stop = StopRequest(self.folder.stop)
        stop.forget()
        return stop.listening()

    def evaluate(self) -> None:
        if not self.scored_splits:
            raise UserError("data.validation and data.test are both missing: name pairs to evaluate on")
        self.folder.require_adapter()
        start = time.monotonic()
        if not self.complete("evaluate", self.evaluated):
            check_reached(self.folder.teacher)
            run_workers(self.config, ["evaluate"], None)
            self._report_evaluation()
            _say("evaluate", start)
        else:
            send_waiting(self.config)
        print(self.table())

    def untrained(self) -> None:
        """Evaluate the base as it is, in a run of its own.

        Raises:
            UserError: the run has trained something, or there is nothing to evaluate on.
        """
        if not self.scored_splits:
            raise UserError("data.validation and data.test are both missing: name pairs to evaluate on")
        if self.folder.adapter.exists() or self.folder.checkpoints.exists():
            raise UserError(f"name: {self.folder.path} holds a training: choose another name for the untrained base")
        if self.complete("untrained", self.evaluated):
            return
        check_reached(self.folder.teacher)
        start = time.monotonic()
        run_workers(self.config, ["untrained"], None)
        self._report_evaluation("untrained")
        _say("untrained", start)

    def register(self) -> None:
        self.folder.require_adapter()
        if (other := elsewhere(self.config)) is not None:
            raise UserError(
                f"{self.folder.path}: its MLflow run is on {other}, not on {shown_uri(self.config)}: name that server "
                "by MLFLOW_TRACKING_URI or tracking.mlflow_tracking_uri"
            )
        send_waiting(self.config)
        tracking, tags = self.config.tracking, self._measured()
        version = digest(self.trained, shown_uri(self.config), tracking.registered_model)
        inputs = digest(version, tracking.alias, tags)
        if self.complete("register", inputs):
            return
        start = time.monotonic()
        pairs = self.inputs.splits.get("validation") or self.inputs.splits["train"]
        run_id = known_run(self.config)
        if run_id is None:
            raise UserError(
                f"{self.folder.path}: mlflow.json is missing: run `flipkd train` with this configuration first"
            )
        with server_errors(self.config, is_kept=True):
            check_run(self.config, run_id)
            example = pair_texts(pairs)[:NUM_EXAMPLES]
            register(self.config, run_id, self.folder.adapter, example, tags, version)
        self.folder.mark_done("register", inputs)
        _say("register", start)

    def _measured(self) -> dict[str, str]:
        """Tags that say how the adapter did on which test pairs; none where it was not evaluated on them."""
        if "test" not in self.inputs.splits or not self.folder.done("evaluate", self.evaluated):
            return {}
        return measured_tags(read_json(self.folder.metrics), digest(pairs_content(self.inputs.splits["test"])))

    def run(self) -> None:
        self.score()
        self.train(then_evaluate=True)
        self.register()
        print(self.table())
        print(f"\nrun folder: {self.folder.path}\nMLflow:     {shown_uri(self.config)}")

    def mlflow_run(self) -> str:
        """The MLflow run of this training; a training that was interrupted goes on in its own."""
        return training_run(self.config, self.trained)

    def _report_evaluation(self, stage: str = "evaluate") -> None:
        run_id = known_run(self.config)
        tracker = RunLogger(self.config, run_id)
        metrics = read_json(self.folder.metrics)
        means = {key: value for key, value in metrics.get("test_checkpoints", {}).items() if key != "steps"}
        tables = tables_by_split(metrics) | {f"mean_{split}": table for split, table in means.items()}
        tracker.metrics(
            {
                f"{split}.{row}.{key}": value
                for split, table in tables.items()
                for row, figures in table.items()
                for key, value in figures.items()
                if value is not None
            },
            metrics["step"],
        )
        tracker.artifact(self.folder.metrics)
        self.folder.mark_done(stage, self.evaluated)
        tracker.settle()

    def table(self) -> str:
        """The metrics as text: test where there are test pairs, else validation."""
        tables = tables_by_split(read_json(self.folder.metrics))
        text = format_table({name: table for name, table in tables.items() if name.startswith("test")} or tables)
        if "validation" not in tables:
            text += "\nthresholds are 0.5: there are no validation pairs to choose them on"
        return text

    def complete(self, stage: str, inputs: str) -> bool:
        if self.folder.done(stage, inputs):
            logger.info("%s: complete for the same inputs, skipped", stage)
            return True
        return False


def score_files(config: RunConfig) -> None:
    """Fill the teacher's store as `Pipeline.score` does, without ever holding the pairs: for any number of them.

    Raises:
        UserError: before anything is started or written, the first mistake in the configuration or in any record.
    """
    config = absolute_paths(config)
    folder = RunFolder(config)
    tables = config.teacher.cross_encoder or config.teacher.scores or config.teacher.calibrate
    if tables or folder.checkpoints.exists() or folder.adapter.exists():  # whose data must be the same, so they fit
        Pipeline(config, trains=False).score()
        return
    start, inputs, pairs = time.monotonic(), check_inputs(config, splits=()), PairStream(config.data)
    _announce_taught(inputs)
    num_texts, is_complete = survey(pairs.texts(check_ids=True), inputs.store)
    if not is_complete:
        inputs.teacher.load()  # completely, or it says why not
        join_or_start_ray(config)
    folder.open()
    score_streams(inputs, pairs, num_texts)
    _say("score", start)


def _announce_taught(inputs: Inputs) -> None:
    source = inputs.teacher
    if source is not None and taught_path(inputs.config) in source.folders and int(os.environ.get("RANK", 0)) == 0:
        announce(inputs.config)


def _say(stage: str, start: float) -> None:
    logger.info("%s: done in %.0f s", stage, time.monotonic() - start)


@contextmanager
def told(tracker: RunLogger) -> Iterator[None]:
    """MLflow learns how a training ended that did not finish."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, StoppedOnRequest | StoppedAtOnce | KeyboardInterrupt)
        tracker.finish("KILLED" if stopped else "FAILED")
        raise
