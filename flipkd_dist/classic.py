"""Classic distillation, large to small: what a trained student says of the training pairs teaches the small encoder.

Row `classic` of a comparison. The target cosine of a pair is p(match) as it is: both are 1 for a sure match and 0 for a
sure non-match, and nothing is calibrated. Shapes: N pairs of a split.
"""

import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd_dist.comparison import Cost
from flipkd_dist.config import RunConfig
from flipkd_dist.durable import whole_file
from flipkd_dist.errors import StoppedOnRequest
from flipkd_dist.evaluate import format_table
from flipkd_dist.meter import peak_memory_gib
from flipkd_dist.order import training_order
from flipkd_dist.pairs import PairTable
from flipkd_dist.pipeline import absolute_paths, told
from flipkd_dist.planner_devices import GIB
from flipkd_dist.preflight import pairs_content
from flipkd_dist.run_folder import RunFolder, digest, write_json
from flipkd_dist.run_logger import RunLogger, training_run
from flipkd_dist.soft_labels import soft_labels, student_fingerprint
from flipkd_dist.stop import StopRequest
from flipkd_dist.taught_folder import MANIFEST
from flipkd_dist.teach import Teaching, check_inputs, metrics_of, similarities, source_of
from flipkd_dist.teach_trainer import fine_tune, num_tokens
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
SCORES = pa.schema(
    [
        ("split", pa.string()),
        ("step", pa.int64()),
        ("pair", pa.int64()),
        ("p_match", pa.float64()),
        ("similarity", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Lesson:
    """The checked inputs of a row, and the places of what comes of them."""

    teaching: Teaching  # of the encoder as it was named, for as many steps and pairs as the student
    adapter: Path  # of the student

    @property
    def folder(self) -> RunFolder:
        return self.teaching.folder

    @property
    def encoder(self) -> Path:
        return self.folder.path / "encoder"

    @property
    def pairs(self) -> PairTable:
        return self.teaching.splits["train"]

    @cached_property
    def questions(self) -> str:
        """A hash of what the soft labels depend on."""
        return digest(student_fingerprint(self.adapter), pairs_content(self.pairs))

    @cached_property
    def trained(self) -> str:
        """A hash of what the encoder depends on."""
        return digest(self.questions, self.teaching.inputs)

    @cached_property
    def evaluated(self) -> str:
        return digest(self.trained, self.teaching.evaluated)

    def tracker(self) -> RunLogger:
        config = self.teaching.config
        return RunLogger(config, training_run(config, self.trained))


def check(config: RunConfig, sft: Path) -> Lesson:
    """Read and check what the row needs; starts and writes nothing.

    Args:
        config: of the row's own run folder; `train` says how long the student's training was, `teach.learning_rate`,
            `teach.warmup_ratio` and `teach.weight_decay` how the encoder learns.
        sft: the run folder of the student.
    Raises:
        UserError
    """
    teaching, adapter = check_inputs(absolute_paths(config)), Path(sft).expanduser().resolve() / "adapter"
    student_fingerprint(adapter)
    config, train = teaching.config, teaching.config.train
    order, num_steps = training_order(config, teaching.splits["train"].text_a)
    budget = {
        "loss": "cosine",
        "max_steps": num_steps,
        "per_device_train_batch_size": order.contrast_batch_size * order.accumulation,
        "save_steps": config.teach.save_steps or train.save_steps or train.eval_steps,
    }
    longer = config.model_copy(update={"teach": config.teach.model_copy(update=budget)})
    return Lesson(replace(teaching, config=longer), adapter)


def run(config: RunConfig, sft: Path) -> None:
    """Score the training pairs by the student, train the encoder on that, measure it; what is complete is skipped.

    The run folder of `config` gets soft_labels.parquet, encoder/ (a Sentence-Transformers folder), scores.parquet,
    metrics.json with the row `encoder`, and cost.json.

    Args: those of `check`.
    Raises:
        UserError: before anything is written.
        StoppedOnRequest: run again to go on from the last checkpoint.
    """
    lesson = check(config, sft)
    folder = lesson.folder
    stop = StopRequest(folder.stop)
    stop.forget()
    with stop.listening():
        if folder.done("train", lesson.trained) and (lesson.encoder / MANIFEST).is_file():
            logger.info("train: complete for the same inputs, skipped")
        else:
            _train(lesson, stop)
        if stop.made(World()):
            raise StoppedOnRequest("stopped on request: run the same command again to go on")
        if folder.done("evaluate", lesson.evaluated):
            logger.info("evaluate: complete for the same inputs, skipped")
        else:
            _evaluate(lesson)


def _train(lesson: Lesson, stop: StopRequest) -> None:
    folder, device = lesson.folder, "cuda" if lesson.teaching.use_gpu else "cpu"
    folder.open()
    tracker = lesson.tracker()
    tracker.reopen()
    with told(tracker):
        file = folder.path / "soft_labels.parquet"
        _fit(lesson, soft_labels(file, lesson.questions, lesson.adapter, lesson.pairs, device, stop), stop)
    folder.mark_done("train", lesson.trained)
    tracker.finish()


def _fit(lesson: Lesson, targets: np.ndarray, stop: StopRequest) -> None:
    """Train on target cosines [N], and put the encoder in its place."""
    start, teaching, path = time.monotonic(), lesson.teaching, lesson.folder.path
    config, teach, checkpoints = teaching.config, teaching.config.teach, path / "encoder.checkpoints"
    logger.info("encoder: %d steps of %d pairs", teach.max_steps, teach.per_device_train_batch_size)
    model = fine_tune(config, teaching.base, lesson.pairs, checkpoints, lesson.trained, stop, teaching.use_gpu, targets)
    draft = path / ".encoder.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(str(draft), create_model_card=False, safe_serialization=True)
    manifest = {"inputs": lesson.trained, "student": str(lesson.adapter), "teach": teach.model_dump(mode="json")}
    write_json(draft / MANIFEST, manifest)
    cost = Cost(
        seconds=time.monotonic() - start,  # of this process: a training that was killed spent more
        tokens=num_tokens(model, lesson.pairs, config),
        peak_memory=int(peak_memory_gib(model.device) * GIB),
        trainable_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    write_json(path / "cost.json", asdict(cost))
    shutil.rmtree(lesson.encoder, ignore_errors=True)
    os.replace(draft, lesson.encoder)
    shutil.rmtree(checkpoints)


def _evaluate(lesson: Lesson) -> None:
    """Write scores.parquet and metrics.json of the encoder, which has cosines and no p(match)."""
    teaching, folder, step = lesson.teaching, lesson.folder, lesson.teaching.config.teach.max_steps
    cosines = similarities(source_of(teaching, lesson.encoder), teaching)
    if not cosines:
        logger.info("evaluate: skipped, there are neither validation nor test pairs")
        return
    parts = [
        pa.table([[split] * len(found), [step] * len(found), range(len(found)), [None] * len(found), found], SCORES)
        for split, found in cosines.items()
    ]
    with whole_file(folder.path / "scores.parquet") as file:
        pq.write_table(pa.concat_tables(parts), file)
    measured = {split: {"encoder": rows["teacher"]} for split, rows in metrics_of(cosines, teaching).items()}
    where = "validation" if "validation" in cosines else "0.5, no validation pairs"
    write_json(folder.metrics, {"step": step, "threshold_from": where, **measured})
    folder.mark_done("evaluate", lesson.evaluated)
    tracker, values = lesson.tracker(), {}
    for split, rows in measured.items():
        values |= {f"{split}.encoder.{key}": value for key, value in rows["encoder"].items() if value is not None}
    tracker.metrics(values, step)
    tracker.artifact(folder.metrics)
    tracker.settle()
    print(format_table(measured))
