"""The verb `teach`: fine-tunes the run's teacher on its own pairs; afterwards every verb of the run uses the result."""

import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import format_table, metrics_by_kind, teacher_scores, thresholds_from
from flipkd_dist.model_files import resolve_model
from flipkd_dist.pairs import PairTable, read_pairs
from flipkd_dist.pipeline import absolute_paths
from flipkd_dist.preflight import SPLITS, pairs_content
from flipkd_dist.run_folder import RunFolder, digest, read_json, write_json
from flipkd_dist.stop import StopRequest
from flipkd_dist.store import normalised
from flipkd_dist.taught_folder import MANIFEST, checkpoints_path, read_manifest, reading, taught_path
from flipkd_dist.teach_trainer import Budget, fine_tune
from flipkd_dist.teacher_source import TeacherSource, text_teacher

logger = logging.getLogger("flipkd_dist")
KEY = "teacher.model_name_or_path"


@dataclass(frozen=True)
class Teaching:
    """The checked inputs of a teaching."""

    config: RunConfig
    folder: RunFolder
    base: Path
    source: TeacherSource  # the untaught teacher
    splits: dict[str, PairTable]
    use_gpu: bool

    @property
    def inputs(self) -> str:
        """A hash of everything that the taught teacher depends on."""
        fingerprint, config = self.source.spec.teacher_fingerprint, self.config
        settings = {**config.teach.model_dump(mode="json"), "save_steps": None}
        return digest(fingerprint, reading(config), settings, config.seed, pairs_content(self.splits["train"]))

    @property
    def evaluated(self) -> str:
        """A hash of what the metrics depend on besides."""
        return digest([pairs_content(self.splits[split]) for split in SPLITS[1:] if split in self.splits])


def check_teachable(config: RunConfig) -> None:
    """Refuse what is not one encoder that can be trained here.

    Raises:
        UserError
    """
    teacher = config.teacher
    if isinstance(teacher.model_name_or_path, list):
        raise UserError(
            f"{KEY}: `flipkd teach` fine-tunes one encoder, this names several: give one of them as {KEY}=..."
        )
    if teacher.api_base is not None:
        raise UserError("teacher.api_base: an endpoint's model cannot be fine-tuned from here: name a model folder")
    for key in ("cross_encoder", "scores"):
        if getattr(teacher, key) is not None:
            raise UserError(
                f"teacher.{key}: it would go on to score the pairs in place of the encoder that `flipkd teach` "
                f"fine-tunes: set teacher.{key}=null"
            )


def check_inputs(config: RunConfig) -> Teaching:
    """Read and check what `flipkd teach` needs; starts and writes nothing.

    Raises:
        UserError: one line for the first mistake.
    """
    check_teachable(config)
    use_gpu = torch.cuda.is_available() if config.distributed.use_gpu == "auto" else config.distributed.use_gpu
    if use_gpu and not torch.cuda.is_available():
        raise UserError("distributed.use_gpu: true, and this machine has no GPU: set it to auto or false")
    folder = RunFolder(config)
    folder.check()
    named = {split: getattr(config.data, split) for split in SPLITS}
    splits = {
        split: read_pairs(paths, config.data, f"data.{split}")
        for split, paths in named.items()
        if split == "train" or paths is not None
    }
    if len(set(splits["train"].label.tolist())) < 2:
        raise UserError("data.train: all labels are alike, which teaches nothing: add matching and non-matching pairs")
    base = resolve_model(config.teacher.model_name_or_path, KEY)
    kinds = (read_json(base / "config.json") or {}).get("architectures") or []
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(f"{KEY} = {base}: this is a cross-encoder, which gives no vectors: name an encoder of texts")
    return Teaching(config, folder, base, text_teacher(config, taught=False), splits, use_gpu)


def similarities(source: TeacherSource, teaching: Teaching) -> dict[str, np.ndarray]:
    """The cosine of every pair of validation and test, float64 [N] each.

    Raises:
        UserError: the teacher cannot be loaded.
    """
    encoder = source.load("cuda" if teaching.use_gpu else "cpu")
    found = {}
    for split in SPLITS[1:]:
        if split in teaching.splits:
            pairs = teaching.splits[split]
            vectors = encoder.encode([normalised(text) for text in pairs.texts], teaching.config.teacher.batch_size)
            found[split] = teacher_scores(pairs, vectors)
    return found


def metrics_of(cosines: dict[str, np.ndarray], teaching: Teaching) -> dict[str, dict[str, dict]]:
    """`{split: {"teacher": metrics}}` of what `similarities` found, the threshold from validation."""
    rows = {split: {"teacher": scores} for split, scores in cosines.items()}
    thresholds = thresholds_from(rows.get("validation"), teaching.splits.get("validation"))
    found = {}
    for split, scores in rows.items():
        found |= metrics_by_kind(scores, teaching.splits[split], thresholds, split)
    return found


def table(before: dict[str, dict], after: dict[str, dict]) -> str:
    """Both teachers' metrics as text."""
    splits = sorted(before, key=lambda split: not split.startswith("test"))
    return format_table(
        {split: {"before": before[split]["teacher"], "after": after[split]["teacher"]} for split in splits}
    )


def teach(config: RunConfig) -> None:
    """Fine-tune the teacher of the run into `RUN/taught`, unless it is there for the same inputs.

    Raises:
        UserError
        StoppedOnRequest: a complete checkpoint has been written.
    """
    teaching = check_inputs(absolute_paths(config))
    output = taught_path(teaching.config)
    manifest = read_manifest(output)
    if manifest is None or manifest["inputs"] != teaching.inputs:
        _require_no_student(teaching, manifest)
        manifest = _make(teaching, output)
    elif manifest["evaluated"] != teaching.evaluated:
        logger.info("teach: complete for the same inputs; other validation or test pairs are measured")
        before, after = (_measured(source, teaching) for source in (teaching.source, source_of(teaching, output)))
        manifest |= {"before": before, "after": after, "evaluated": teaching.evaluated}
        write_json(output / MANIFEST, manifest)
    else:
        logger.info("teach: complete for the same inputs, skipped")
    _report(manifest, output)


def _require_no_student(teaching: Teaching, manifest: dict[str, Any] | None) -> None:
    """A student that learned from one teacher is never left beside another one."""
    if teaching.folder.adapter.exists() or teaching.folder.checkpoints.exists():
        other = "the teacher as it was named" if manifest is None else "a teacher that was fine-tuned on other inputs"
        raise UserError(
            f"name: {teaching.folder.path} holds a student trained with {other}: choose another name, or remove "
            "adapter/ and checkpoints/ in it"
        )


def _measured(source: TeacherSource, teaching: Teaching) -> dict[str, dict[str, dict]]:
    return metrics_of(similarities(source, teaching), teaching)


def source_of(teaching: Teaching, folder: Path) -> TeacherSource:
    """The encoder in `folder`, read with the run's settings."""
    named = teaching.config.teacher.model_copy(update={"model_name_or_path": str(folder)})
    return text_teacher(teaching.config.model_copy(update={"teacher": named}), taught=False)


def _make(teaching: Teaching, output: Path) -> dict[str, Any]:
    """Train, measure, and put the folder in its place."""
    start, config, train = time.monotonic(), teaching.config, teaching.splits["train"]
    before = _measured(teaching.source, teaching)  # loads the teacher, or says why it cannot be loaded
    budget = Budget.of(config.teach, len(train))
    where = "GPU" if teaching.use_gpu else "CPU"
    logger.info("teach: %d pairs, %s loss, %d steps on the %s", len(train), config.teach.loss, budget.num_steps, where)
    teaching.folder.open()
    draft, checkpoints = output.with_name(f".{output.name}.tmp"), checkpoints_path(config)
    checkpoints.mkdir(exist_ok=True)  # says from now on that a teaching is unfinished
    _remove(output)
    shutil.rmtree(draft, ignore_errors=True)
    stop = StopRequest(teaching.folder.stop)
    stop.forget()
    with stop.listening():
        model = fine_tune(config, teaching.base, train, checkpoints, teaching.inputs, stop, teaching.use_gpu)
    model.save_pretrained(str(draft), create_model_card=False, safe_serialization=True)
    source = source_of(teaching, draft)
    manifest = {
        "base": teaching.source.spec.teacher_fingerprint,
        "base_name": str(config.teacher.model_name_or_path),
        "fingerprint": source.spec.teacher_fingerprint,
        "reading": reading(config),
        "teach": config.teach.model_dump(mode="json"),
        "seed": config.seed,
        "steps": budget.num_steps,
        "inputs": teaching.inputs,
        "evaluated": teaching.evaluated,
        "before": before,
        "after": _measured(source, teaching),
    }
    write_json(draft / MANIFEST, manifest)
    os.replace(draft, output)
    shutil.rmtree(checkpoints)
    logger.info("teach: done in %.0f s", time.monotonic() - start)
    return manifest


def _remove(output: Path) -> None:
    """Take an earlier result away, in one step as far as readers can see."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        logger.info("teach: %s is of other inputs or damaged, it is made again", output)
        os.replace(output, old)
        shutil.rmtree(old)


def _report(manifest: dict[str, Any], output: Path) -> None:
    before, after = manifest["before"], manifest["after"]
    if before:
        print(table(before, after))
        if "validation" not in before:
            print("thresholds are 0.5: there are no validation pairs to choose them on")
    else:
        logger.info("teach: there are neither validation nor test pairs to measure it on")
    areas = [metrics.get("validation", {}).get("teacher", {}).get("roc_auc") for metrics in (before, after)]
    if None not in areas and areas[1] < areas[0]:
        logger.warning(
            "teach: worse on validation (ROC-AUC %.4f, before %.4f): lower teach.learning_rate or the steps, or try "
            "the other teach.loss, and teach again; or remove %s to keep the teacher as it was",
            areas[1], areas[0], output,
        )  # fmt: skip
    logger.info("teacher: from now on this run uses %s", output)
