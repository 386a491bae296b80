"""`train.profile`: PyTorch's trace of a few optimizer steps, from every rank."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from flipkd_dist.run_folder import write_whole
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
FIRST, LAST = 4, 6  # steps of this process, counted from 1: the first ones allocate, compile and fill caches
OPERATORS = 25  # lines of the table


class StepProfiler:
    """Does nothing unless it is wanted; a trace that cannot be written is a warning."""

    def __init__(self, folder: Path, world: World, wanted: bool, num_steps: int):
        """
        Args:
            num_steps: optimizer steps that are left for this process; fewer than LAST: the last three are traced.
        """
        self.folder, self.world, self.wanted = folder, world, wanted
        self.first, self.last = max(1, min(FIRST, num_steps - (LAST - FIRST))), min(LAST, num_steps)
        self.done = 0
        self.running: profile | None = None

    @contextmanager
    def listening(self) -> Iterator["StepProfiler"]:
        """Whatever ends a training early, the steps that were traced by then are written."""
        try:
            yield self
        finally:
            self.finish()
            if self.wanted:
                logger.warning("train.profile: no trace: this process ended before its optimizer step %d", self.first)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each optimizer step."""
        self.done += 1
        if self.wanted and self.done == self.first:
            gpu = [ProfilerActivity.CUDA] if self.world.device.type == "cuda" else []
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself on stderr
            self.running = profile(activities=[ProfilerActivity.CPU, *gpu])
            self.running.start()
        with record_function(f"step {self.done} of this process"):
            yield

    def finish_if_due(self) -> None:
        """After each step, outside of its time: writing takes seconds."""
        if self.done == self.last:
            self.finish()

    def finish(self) -> None:
        if self.running is None:
            return
        trace, self.running, self.wanted = self.running, None, False
        path = self.folder / f"rank-{self.world.rank}.json.gz"
        try:
            trace.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.stem}.tmp.gz")  # the ending says how it is written
            trace.export_chrome_trace(str(draft))
            os.replace(draft, path)
            by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
            write_whole(path.with_name(f"rank-{self.world.rank}.txt"), operators(trace, by))
        except (OSError, RuntimeError) as error:
            logger.warning("train.profile: %s was not written (%s)", path, " ".join(str(error).split())[:200])
        else:
            logger.info("train.profile: optimizer steps %d to %d of this process in %s", self.first, self.done, path)


def operators(trace: profile, by: str) -> str:
    """The operators that took the most time themselves."""
    return trace.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=60) + "\n"
