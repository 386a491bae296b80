"""Teachers of a pool that die, make mistakes or cannot be loaded; apart from the tests, for actors import this."""

import errno
import os
import signal

from flipkd_dist.errors import UserError
from flipkd_dist.teacher_source import TeacherSource


class Deadly:
    """An encoder to which some words happen."""

    def __init__(self, inner):
        self.inner, self.num_truncated = inner, 0

    def encode(self, texts, batch_size):
        if any("bomb" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("mistake" in text for text in texts):
            raise UserError("teacher.prompt: it holds a mistake: remove it")
        if any("bug" in text for text in texts):
            raise ValueError("a bug of ours")
        if any("stale" in text for text in texts):
            raise OSError(errno.ESTALE, "Stale file handle")
        return self.inner.encode(texts, batch_size)


class DeadlySource(TeacherSource):
    def load(self, device="cpu"):
        return Deadly(super().load(device))


class BrokenSource(TeacherSource):
    def load(self, device="cpu"):
        raise UserError("teacher folder: 3 weights are missing: get it again")
