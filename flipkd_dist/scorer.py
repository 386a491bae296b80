"""What lives in an actor of the teacher's pool."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line
from flipkd_dist.score import Scored, score_shard
from flipkd_dist.store import Store
from flipkd_dist.teacher_source import TeacherSource


class Scorer:
    """One loaded teacher."""

    def load(self, source: TeacherSource, store: Store, device: str) -> None:
        """Apart from the constructor, so that a UserError reaches the driver as such."""
        import torch

        threads = source.settings.num_cpus_per_worker
        torch.set_num_threads(threads)
        if threads > 1:  # the tokenizer's too; the driver has set it to one for everybody
            os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(threads))
        self.store, self.batch_size = store, source.settings.batch_size
        with _memory("teacher.num_gpus_per_worker: the teacher does not fit beside what the GPU holds: raise it"):
            self.teacher = source.load(device)

    def score(self, shard: list[str]) -> tuple[Scored, str]:
        """What was written, and the host that did it."""
        with _memory(f"teacher.batch_size = {self.batch_size}: the GPU has no room for such a batch: lower it"):
            return score_shard(self.teacher, self.store, self.batch_size, shard), socket.gethostname()


@contextmanager
def _memory(said: str) -> Iterator[None]:
    """A GPU whose memory is full as a UserError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{said} ({one_line(error)})") from None
