"""What a training says while it runs: lines of metrics.jsonl, of the console and of MLflow."""

import errno
import json
import logging
import math
import os
import time
from pathlib import Path

import torch

from flipkd_dist.config import RunConfig
from flipkd_dist.durable import sync_file
from flipkd_dist.meter import Meter
from flipkd_dist.order import Order
from flipkd_dist.run_folder import write_whole
from flipkd_dist.run_logger import RunLogger
from flipkd_dist.step import LOSSES, SUMS, summarise
from flipkd_dist.verify import unmoved_layers
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")


class MetricLog:
    """Gathers steps into lines of metrics.jsonl, of the console and of MLflow."""

    def __init__(
        self, config: RunConfig, world: World, path: Path, num_steps: int, mlflow_run_id: str | None, meter: Meter
    ):
        """`path` is that of metrics.jsonl; rank 0 alone writes."""
        self.config, self.world, self.path, self.num_steps = config, world, path, num_steps
        self.meter = meter
        self.tracker = RunLogger(config, mlflow_run_id if world.is_main else None)
        self.start = time.monotonic()
        self.unwritten: list[str] = []  # lines that a full disk has refused
        self.first = 0  # optimizer steps done before this process
        self.num_truncated = self.num_pairs = 0.0
        self.counts = torch.zeros(len(LOSSES), dtype=torch.float64)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)

    def begin(self) -> None:
        """A training from its first step; points that an earlier attempt logged to MLflow are not logged again."""
        self._keep_lines(0)
        self.tracker.begin_sending()

    def resume(self, step: int, state: dict[str, list[float]], unvalidated: bool) -> None:
        """Go on after `step`: lines beyond it are dropped, so that each step stands once.

        Args:
            unvalidated: the validation of `step` is done again.
        """
        self._keep_lines(step, unvalidated)
        self.tracker.begin_sending()
        self.first = step
        self.counts = torch.tensor(state["counts"], dtype=torch.float64)
        if self.world.is_main:  # they are summed over ranks already
            self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.num_truncated, self.num_pairs = state["cut"]

    def start_clock(self) -> None:
        """The loop over steps begins: loading and what a resume had to do first count for nothing."""
        self.start = time.monotonic()
        self.meter.start()

    def state(self) -> dict[str, list[float]]:
        """What has been added since the last line, over all ranks; every rank must call it."""
        sums = self.world.sum(self.sums.to(self.world.device)).tolist()
        return {"counts": self.counts.tolist(), "sums": sums, "cut": [self.num_truncated, self.num_pairs]}

    def _keep_lines(self, step: int, unvalidated: bool = False) -> None:
        if self.world.is_main:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            write_whole(self.path, "".join(f"{line}\n" for line in lines if position(line) <= (step, not unvalidated)))

    def add(
        self, step: int, counts: torch.Tensor, sums: torch.Tensor, grad_norm: float, rate: float, order: Order
    ) -> None:
        """One optimizer step's counts (global) and sums (this rank's); logged every `logging_steps`."""
        self.counts += counts
        self.sums += sums.cpu()
        self.meter.add(counts[0].item(), sums[SUMS.index("tokens")].item())
        config, world = self.config, self.world
        if step % config.train.logging_steps and step != self.num_steps and step != 1:
            return
        own = torch.cat([self.sums, self.meter.take()])
        with self.meter.clock("communication"):
            both = world.sum(own.to(world.device)).cpu()
        sums, measured = both[: len(SUMS)], both[len(SUMS) :]
        values = summarise(self.counts, sums, config.loss)
        values |= {
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "epoch": step / order.steps_per_epoch,
            **self.meter.values(measured),
        }
        self.write(step, values)
        eta = (time.monotonic() - self.start) / (step - self.first) * (self.num_steps - step)
        logger.info(
            "train %d/%d: loss %.4f (sup %.4f, dist %.4f, mcl %.4f), %.0f pairs/s, ETA %d:%02d",
            step,
            self.num_steps,
            values["loss"],
            values["loss_sup"],
            values["loss_dist"],
            values["loss_mcl"],
            values["pairs_per_second"],
            *divmod(round(eta), 60),
        )
        if step == 1 and config.loss.threshold is not None:
            self._say_kept(dict(zip(SUMS, sums.tolist(), strict=True)))
        self.num_truncated += sums[SUMS.index("truncated")].item()
        self.num_pairs += self.counts[0].item()
        self.counts.zero_()
        self.sums.zero_()

    def _say_kept(self, sums: dict[str, float]) -> None:
        kinds = {"positives": "match", "negatives": "mismatch", "off_diagonal": "off_diagonal"}
        for kind, whole in kinds.items():
            kept, there = sums[f"kept_{kind}"], sums[f"num_{whole}"]
            if there:
                logger.info("step 1: the noise filter keeps %.0f %% of %s", 100 * kept / there, kind.replace("_", "-"))
            if there and kept < 0.05 * there:
                logger.warning("warning: under 5 %% of %s: `flipkd score` suggests another loss.threshold", kind)

    def say_truncated(self) -> None:
        if self.num_truncated:
            logger.warning(
                "%d of %d pairs that were trained on had been cut to data.max_length = %d tokens",
                self.num_truncated, self.num_pairs, self.config.data.max_length,
            )  # fmt: skip

    def write(self, step: int, values: dict[str, float | None]) -> None:
        if self.world.is_main:
            values = {key: value for key, value in values.items() if value is not None}
            self.unwritten.append(json.dumps({"step": step, **values}) + "\n")
            try:
                self.flush()
            except OSError as error:  # the next checkpoint decides whether the training can go on
                if len(self.unwritten) == 1:
                    logger.warning("warning: %s: %s: its lines wait for room", self.path, error.strerror)
            self.tracker.metrics(values, step)

    def flush(self) -> None:
        """Write the lines that wait.

        Raises:
            OSError: the disk is full or broken; whole lines stay in the file, and none is written twice.
        """
        if not self.unwritten:
            return
        with self.path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                for line in self.unwritten:
                    data = line.encode()
                    if file.write(data) < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(whole)
                raise
        self.unwritten.clear()

    def save(self) -> None:
        """Write what waits, for MLflow too; after this a power loss takes none of it.

        Raises:
            OSError: as `flush`.
        """
        self.flush()
        if self.world.is_main:
            sync_file(self.path)
        self.tracker.save()

    def check_first_update(self, moves: dict[str, float]) -> None:
        """After the first update something of every layer must have moved, or gradients do not reach it.

        Args:
            moves: as from `first_moves`, of tensors that a loss reaches; none where the only layer is idle.
        """
        if not moves:
            return
        share, norm = sum(square > 0 for square in moves.values()) / len(moves), math.sqrt(sum(moves.values()))
        if self.config.student.tuning == "full":
            self.write(1, {"moved_share": share})
        else:
            self.write(1, {"lora_b_norm": norm, "lora_b_moved_share": share})
        if layers := unmoved_layers(moves):
            kind = "tensor" if self.config.student.tuning == "full" else "LoRA-B tensor"
            raise RuntimeError(
                f"no {kind} of {len(layers)} layers (such as layer {layers[0]}) moved in the first update: "
                "gradients do not reach them"
            )


def position(line: str) -> tuple[float, bool]:
    """Step of a line of metrics.jsonl, and whether it tells of a validation, which comes after the step's other lines.

    The step is infinite where a kill left half a line.
    """
    try:
        values = json.loads(line)
        return values["step"], any(key.startswith("validation_") for key in values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return math.inf, True


def last_step(path: Path) -> int:
    """The last step that metrics.jsonl tells of; 0 where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return int(max((step for line in lines if (step := position(line)[0]) < math.inf), default=0))
