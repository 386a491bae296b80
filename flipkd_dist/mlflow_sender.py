"""Sends what stands in a run folder's spool, in order, in a thread of its own: a training never waits for a server."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from flipkd_dist.config import without_credentials
from flipkd_dist.model_files import one_line
from flipkd_dist.spool import SPOOL, Batch, Spool

logger = logging.getLogger("flipkd_dist")
TRIES = 3  # of a batch that an answering server does not take, and does not clearly refuse either; then we look
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


class NotNoted(Exception):
    """The run folder's disk does not take what the sender has to note there."""


@contextmanager
def _noting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotNoted(error) from error


class Sender:
    def __init__(self, spool: Spool, post: Post, to: str):
        """`to`: the server, without credentials; messages to another one are put aside."""
        self.spool, self.post, self.to = spool, post, to
        self.trouble = ""  # why the server does not take what waits
        self._thread: threading.Thread | None = None
        self._work, self._hurry = threading.Event(), threading.Event()
        self._tries, self._is_quiet, self._has_refused = 0, False, False
        self._is_held = False  # an artifact waits behind what is taken

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
        except NotNoted as error:
            reason = f"{self.spool.folder} cannot be written: {error}"
            if not self.trouble and not self._is_quiet:
                logger.warning("warning: mlflow: nothing is sent: %s; training goes on", reason)
            self.trouble = reason
            return False
        except Exception as error:  # whatever the server does, training goes on
            reason = without_credentials(one_line(error))
            if not (self.trouble or self._is_quiet or self._is_held):
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
            with _noting():
                self.spool.note_sent(batch.end)
            if self.trouble and not (self._is_quiet or self._is_held):
                logger.info("mlflow: %s takes it again: what waited goes out now", self.to)
            self.trouble = ""
        return True

    def _offer(self, batch: Batch, items: list[Any]) -> None:
        """Send; what the server clearly refuses is put aside, found by halves, so that it does not hold up the rest.

        Raises:
            Exception: of a server that is down, or that may be to blame.
        """
        try:
            self.post.send(batch.run, batch.kind, items)
            self._is_held = self._is_held and batch.kind != "artifact"
        except Exception as error:
            fault = self.post.fault(error)
            if fault == "server":
                raise
            if fault == "unknown":
                self._look_into(batch, items, error)
                return
            if len(items) == 1 or fault == "run":
                self._refuse(batch, items, without_credentials(one_line(error)))
                return
            half = len(items) // 2
            self._offer(batch, items[:half])
            self._offer(batch, items[half:])

    def _look_into(self, batch: Batch, items: list[Any], error: Exception) -> None:
        """An error that may be the server's, as of a full disk, or a message's: in doubt all of it waits.

        One point is put aside where the server takes others and does not take this one after them either. An artifact
        lets what is behind it pass.

        Raises:
            Exception: they wait.
        """
        self._tries += self.post.answers(batch.run)
        if self._tries < TRIES:
            raise error
        if batch.kind == "artifact" and self._has_others_behind(batch):
            with _noting():
                self.spool.put(**items[0])
            if not self._is_held and not self._is_quiet:
                logger.warning(
                    "warning: mlflow: %s waits in %s: what is behind it goes on", items[0]["artifact"], SPOOL
                )
            self._is_held = True
            return
        if batch.kind != "metrics":
            raise error
        if (found := self._failing(batch, items)) is None:
            return
        if len(items) == 1 and not self._takes_another(batch):
            raise error
        try:
            self.post.send(batch.run, batch.kind, [found])
        except Exception as again:
            if self.post.fault(again) == "server":
                raise
            self._refuse(batch, [found], without_credentials(one_line(again)))

    def _failing(self, batch: Batch, items: list[Any]) -> Any | None:
        """The one of `items` that is not taken, by halves; the others are sent, and None where all are.

        Raises:
            Exception: a second one is not taken either, or the server is away.
        """
        parts, found = [items], None
        while parts:
            part = parts.pop()
            try:
                self.post.send(batch.run, batch.kind, part)
            except Exception as error:
                if len(part) > 1:
                    half = len(part) // 2
                    parts += [part[half:], part[:half]]
                elif found is not None or self.post.fault(error) == "server":
                    raise
                else:
                    [found] = part
        return found

    def _takes_another(self, batch: Batch) -> bool:
        """Whether a later batch of this kind, if there is one, is taken; it goes again when its turn comes."""
        start = batch.end
        while other := self.spool.next_batch(start):
            if (other.kind, other.run, other.to) == (batch.kind, batch.run, batch.to):
                self.post.send(other.run, other.kind, other.items)
                return True
            start = other.end
        return False

    def _has_others_behind(self, batch: Batch) -> bool:
        return any(message is not None and "artifact" not in message for message, _ in self.spool.messages(batch.end))

    def _refuse(self, batch: Batch, items: list[Any], reason: str) -> None:
        with _noting():
            self.spool.refuse(batch, items, reason)
        if not self._has_refused:
            self._has_refused = True
            logger.warning("warning: mlflow: %s not taken (%s): kept in mlflow-refused.jsonl", batch.kind, reason)
