"""How far a training is: what a checkpoint remembers of it, when one is due, and how it goes on from one."""

import logging
import math
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from flipkd_dist.checkpoint import (
    Checkpoint,
    amend_manifest,
    keep_checkpoints,
    newest_checkpoint,
    remove_drafts,
    save_checkpoint,
    stored,
)
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import best_threshold, binary_metrics, hard_negatives, pair_texts
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.order import Order
from flipkd_dist.workbench import Workbench

logger = logging.getLogger("flipkd_dist")
BYTES_KEPT = 12  # of each trained number in a checkpoint: itself and Adam's two moments, fp32
NUM_PROBES = 64  # pairs among which the adapter's probe is chosen
LIBRARIES = ("flipkd_dist", "torch", "transformers", "peft", "deepspeed", "bitsandbytes")


class Progress:
    def __init__(self, bench: Workbench, order: Order, num_steps: int, log: MetricLog):
        self.bench, self.order, self.num_steps, self.log = bench, order, num_steps, log
        train, folder = bench.inputs.config.train, bench.inputs.folder
        self.eval_steps = train.eval_steps or train.save_steps or order.steps_per_epoch
        self.save_steps = train.save_steps or self.eval_steps
        self.folder, self.keep = folder.checkpoints, train.keep_checkpoints
        self.validation = bench.inputs.splits.get("validation")
        self.probes = pair_texts(self.validation or bench.inputs.splits["train"])[:NUM_PROBES]
        self.base_answers: list[float] = []  # p(match) of the probes by the base alone
        self.inputs = bench.inputs.digest("train", "validation")

    def resume(self) -> int:
        """Go on from the newest complete checkpoint, or begin; optimizer steps done. Every rank calls it.

        Raises:
            UserError: the checkpoints belong to other inputs.
        """
        world = self.bench.world
        found = newest_checkpoint(self.folder) if world.is_main else None
        found = world.gather_object(found)[0]  # one answer for all: file systems may show different ones
        if world.is_main:
            remove_drafts(self.folder)
        if found is None:
            answers, _ = self.bench.scores(self.probes, "probe")  # B is zero: these are the base's own answers
            self.base_answers = answers.tolist()
            self._stored(self.log.path, "metrics.jsonl", self.log.begin)
            return 0
        if found.manifest["inputs"] != self.inputs:
            raise UserError(
                f"name: {found.path} belongs to other settings, data or models: choose another name, "
                "or remove the checkpoints"
            )
        engine, unvalidated = self.bench.engine, found.manifest["unvalidated"]
        wanted = {name: (part.start, part.stop) for name, part in engine.slices().items()}
        engine.restore(found.read(wanted), found.step)
        self._restore_random(found)
        self.base_answers = found.manifest["base_probes"]
        state = found.manifest["log"]
        self._stored(self.log.path, "metrics.jsonl", lambda: self.log.resume(found.step, state, unvalidated))
        logger.info("train: resumed at step %d of %d from %s", found.step, self.num_steps, found.path)
        self._say_workers(found.manifest["world_size"])
        for name, was in found.manifest["versions"].items():
            if was != version(name):
                logger.warning("warning: %s is %s now, the checkpoint was made with %s", name, version(name), was)
        if unvalidated:
            self._validate(found)
        return found.step

    def save_if_due(self, step: int, stopping: bool, asked: bool = False) -> None:
        """Write a checkpoint and validate it where the settings say so and at the end; before stopping write one.

        Args:
            asked: somebody wants a checkpoint now: a machine is about to go.
        """
        validating = step % self.eval_steps == 0 or step == self.num_steps
        if validating or stopping or asked or step % self.save_steps == 0:
            found = self._save(step, validating)
            if asked and self.bench.world.is_main:
                self.bench.inputs.folder.save.unlink(missing_ok=True)
                logger.info("train: a checkpoint of step %d is written, as asked", step)
            if validating and not stopping:  # whoever asked to stop will not wait for it: the resumed run does it
                self._validate(found)

    def _say_workers(self, before: int) -> None:
        """What a change of their number leaves as it was."""
        now, size = self.bench.world.size, self.order.contrast_batch_size
        if now == before:
            return
        most = self.bench.inputs.config.train.chunk_size
        chunks = f", in chunks of at most {most} pairs on each worker" if math.ceil(size / now) > most else ""
        workers = "1 worker" if now == 1 else f"{now} workers"
        logger.info(
            "train: resumed by %s in place of %d: contrast batches of %d pairs as before%s",
            workers,
            before,
            size,
            chunks,
        )

    def _validate(self, found: Checkpoint) -> None:
        """Make the checkpoint, which is the present state, a candidate for the adapter."""
        candidate = self._candidate(found.step)

        def amend() -> None:
            self.log.save()  # nobody validates again what says that it is validated
            if self.bench.world.is_main:
                amend_manifest(found, {**candidate, "unvalidated": False})
                keep_checkpoints(self.folder, self.keep)

        self._stored(found.path, f"step {found.step}'s validation", amend)

    def _stored(self, where: Path, what: str, work: Callable[[], None]) -> None:
        stored(self.bench.world, self.folder, where, what, work)

    def check_space(self, first: int) -> None:
        """Before the loop: refuse a disk that cannot hold the next checkpoint and the adapter, warn of a small one.

        Raises:
            UserError: on every rank.
        """
        numbers = sum(math.prod(shape) for shape in self.bench.engine.shapes().values())
        each, adapter = numbers * BYTES_KEPT, numbers * self.bench.dtype.itemsize
        num_saved = -(-(self.num_steps - first) // self.save_steps)
        least = (each if num_saved else 0) + adapter
        most = min(num_saved, 2 * self.keep + 1) * each + adapter  # the newest, the best, and the one being written
        free = self.bench.world.gather_object(shutil.disk_usage(self.log.path.parent).free)[0]
        if free < least:
            raise UserError(
                f"output_dir: {self.log.path.parent}: {free / 2**20:,.0f} MB are free, a checkpoint and the adapter "
                f"need {least / 2**20:,.0f} MB: make room or choose another output_dir"
            )
        if free < most:
            logger.warning(
                "warning: %s: %.0f MB are free, checkpoints may need %.0f MB: make room or lower "
                "train.keep_checkpoints = %d",
                self.log.path.parent, free / 2**20, most / 2**20, self.keep,
            )  # fmt: skip

    def _candidate(self, step: int) -> dict:
        bench, config = self.bench, self.bench.inputs.config
        if self.validation is None:
            answers, _ = bench.scores(self.probes, "probe")
            return {"score": None, "threshold": 0.5, "probes": answers.tolist()}
        answers, cosines = bench.scores(pair_texts(self.validation), "validate")
        easy = ~hard_negatives(self.validation)  # as in the headline of the metrics
        labels = self.validation.label[easy]
        threshold = best_threshold(answers[easy], labels)
        metrics = binary_metrics(answers[easy], labels, threshold)
        readout = binary_metrics(cosines[easy], labels, best_threshold(cosines[easy], labels))
        self.log.write(
            step,
            {
                **{f"validation_{key}": metrics[key] for key in ("roc_auc", "f1", "accuracy", "average_precision")},
                "validation_readout_roc_auc": readout["roc_auc"],
            },
        )
        probes = answers[: len(self.probes)].tolist()
        return {"score": metrics[config.train.metric_for_best_model], "threshold": threshold, "probes": probes}

    def _save(self, step: int, unvalidated: bool) -> Checkpoint:
        bench, engine = self.bench, self.bench.engine
        manifest = {
            "score": None,
            "threshold": None,
            "probes": None,  # p(match), once it is a candidate for the adapter
            "unvalidated": unvalidated,
            "base_probes": self.base_answers,
            "num_steps": self.num_steps,
            "seed": self.order.seed,
            "contrast_batch": {"pairs": self.order.contrast_batch_size, "per_step": self.order.accumulation},
            "world_size": bench.world.size,
            "inputs": self.inputs,
            "base_fingerprint": bench.inputs.base_fingerprint,
            "versions": {name: version(name) for name in LIBRARIES},
            "log": self.log.state(),
            "shapes": engine.shapes(),
        }
        # A checkpoint speaks of lines that are there, after a power loss too: a resumed run goes on after them.
        self._stored(self.log.path.parent, "metrics.jsonl or mlflow-spool.jsonl", self.log.save)
        found = save_checkpoint(self.folder, step, engine.slices(), bench.world.random_state(), manifest, bench.world)

        def keep() -> None:
            if bench.world.is_main:
                keep_checkpoints(self.folder, self.keep)

        self._stored(self.folder, "what is left of old checkpoints", keep)
        return found

    def _restore_random(self, found: Checkpoint) -> None:
        world = self.bench.world
        if found.manifest["world_size"] != world.size:  # no rank of old is this one: begin anew, reproducibly
            torch.manual_seed((self.order.seed * 1000 + world.rank) * 1_000_003 + found.step)
            return
        states = {kind: found.random_state(world.rank, kind) for kind in ("cpu", "cuda")}
        world.restore_random({kind: state for kind, state in states.items() if state is not None})
