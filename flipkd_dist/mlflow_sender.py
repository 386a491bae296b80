"""Sends what stands in a run folder's spool, in order, in a thread of its own: a training never waits for a server."""

import logging
import threading
import time
from typing import Any, Literal, Protocol

from flipkd_dist.config import without_credentials
from flipkd_dist.model_files import one_line
from flipkd_dist.spool import SPOOL, Batch, Spool

logger = logging.getLogger("flipkd_dist")
TRIES = 3  # of a message that an answering server does not take, and does not clearly refuse either
PAUSES_S = (1, 2, 4, 8, 15)  # between tries while the server is down; the last one again and again
POLL_S = 0.05
LONGEST_WAIT_S = 60.0  # for the rest, at the end of a process


class Post(Protocol):
    """The way to the server."""

    def prepare(self) -> None:
        """Import what it needs; called by the thread that goes on to work."""

    def send(self, run: str, kind: str, items: list[Any]) -> None:
        """Points (key, value, time, step), or one message of another kind; raises whatever went wrong."""

    def answers(self, run: str) -> bool:
        """Whether the server is there and can look into its records."""

    def fault(self, error: Exception) -> Literal["server", "item", "run", "unknown"]:
        """Whose fault an error is; `run`: nothing of this run will ever be taken."""


class Sender:
    def __init__(self, spool: Spool, post: Post, to: str):
        """`to`: the server, without credentials; messages to another one are put aside."""
        self.spool, self.post, self.to = spool, post, to
        self.trouble = ""  # why the server does not take what waits
        self._thread: threading.Thread | None = None
        self._work, self._hurry = threading.Event(), threading.Event()
        self._tries, self._is_quiet, self._has_refused = 0, False, False

    def wake(self) -> None:
        """There is something to send."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()
        self._work.set()

    def settle(self, patience_s: float) -> int:
        """Wait until all is sent, at most `patience_s` without progress; what still waits, in points and messages."""
        start = last = time.monotonic()
        place = self.spool.sent
        if self.spool.waits():
            self._is_quiet = self._thread is None  # who called will say what is left
            self.wake()
            self._hurry.set()
        while self.spool.waits():
            now, sent = time.monotonic(), self.spool.sent
            last, place = (now, sent) if sent != place else (last, place)
            if now - last > patience_s or now - start > LONGEST_WAIT_S:
                return self.spool.num_waiting()
            time.sleep(POLL_S)
        return 0

    def _run(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            failures = 0
            while not self._sent_all():
                self._hurry.wait(PAUSES_S[min(failures, len(PAUSES_S) - 1)])
                self._hurry.clear()
                failures += 1

    def _sent_all(self) -> bool:
        try:
            while self.spool.waits() and self._send_some():
                self._tries = 0
            return True
        except Exception as error:  # whatever the server does, training goes on
            reason = without_credentials(one_line(error))
            if not self.trouble and not self._is_quiet:
                logger.warning(
                    "warning: mlflow: %s does not take what is logged, which waits in %s; training goes on (%s)",
                    self.to, SPOOL, reason,
                )  # fmt: skip
            self.trouble = reason
            return False

    def _send_some(self) -> bool:
        """Send the next batch; False where there is none but the beginning of a line."""
        with self.spool.sending():
            batch = self.spool.next_batch(self.spool.sent)  # another process may have sent something meanwhile
            if batch is None:
                return False
            if batch.items and batch.to != self.to:
                self._refuse(batch, batch.items, f"meant for {batch.to}, no longer the tracking server")
            elif batch.items:
                self._offer(batch, batch.items)
                if self.trouble and not self._is_quiet:
                    logger.info("mlflow: %s takes it again: what waited goes out now", self.to)
                self.trouble = ""
            self.spool.note_sent(batch.end)
        return True

    def _offer(self, batch: Batch, items: list[Any]) -> None:
        """Send; what the server refuses is put aside, found by halves, so that it does not hold up the rest.

        Raises:
            Exception: of a server that is down, or of which it is not clear yet.
        """
        try:
            self.post.send(batch.run, batch.kind, items)
        except Exception as error:
            fault = self.post.fault(error)
            if fault == "unknown" and self.post.answers(batch.run):
                self._tries += 1
            if fault == "server" or (fault == "unknown" and self._tries < TRIES):
                raise
            if len(items) == 1 or fault == "run":
                self._refuse(batch, items, without_credentials(one_line(error)))
                return
            half = len(items) // 2
            self._offer(batch, items[:half])
            self._offer(batch, items[half:])

    def _refuse(self, batch: Batch, items: list[Any], reason: str) -> None:
        self.spool.refuse(batch, items, reason)
        if not self._has_refused:
            self._has_refused = True
            logger.warning("warning: mlflow: %s not taken (%s): kept in mlflow-refused.jsonl", batch.kind, reason)
