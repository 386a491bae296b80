"""What MLflow is to learn, on disk before it is sent: a dead server delays it, and neither it nor a kill loses it.

Each line of `mlflow-spool.jsonl` is one message: `time` (milliseconds), `to` (the server, without credentials), `run`,
and one of `metrics` with `step`, `params`, `status`, `artifact` (a path). Its place in the file is its number: messages
are sent in that order, and `mlflow-spool.sent.json` says up to which byte. The file only grows.
"""

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flipkd_dist.durable import locked
from flipkd_dist.run_folder import read_json, write_json

SPOOL = "mlflow-spool.jsonl"
KINDS = ("metrics", "params", "status", "artifact")
POINTS_AT_ONCE = 1000  # of one request: what MLflow takes


@dataclass
class Batch:
    """Consecutive messages that go together."""

    kind: str
    run: str
    to: str
    items: list[Any] = field(default_factory=list)
    end: int = 0  # byte after the last of them


class Spool:
    def __init__(self, folder: Path):
        """Of one run folder; several processes may write and send."""
        self.folder, self.path, self.note = folder, folder / SPOOL, folder / "mlflow-spool.sent.json"
        self._is_known = False  # whether the note was compared with the file

    def put(self, **message: Any) -> None:
        """Append a message; a kill after this loses nothing.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps({"time": int(time.time() * 1000), **message}).encode() + b"\n"
        if not self._is_known:  # before the file grows beyond what the note says
            self._is_known = self.sent >= 0
        with self.path.open("ab+", buffering=0) as file:
            if file.seek(0, 2) and file.seek(-1, 2) >= 0 and file.read(1) != b"\n":
                line = b"\n" + line  # a kill or a full disk left half a line
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "no space left", str(self.path))

    def messages(self, start: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Each whole line from byte `start` on, with the byte after it; None for what is no message."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                yield _message(line), start

    def steps(self, run: str) -> dict[str, set[int]]:
        """Steps of which the run has been told, by metric."""
        found: dict[str, set[int]] = {}
        for message, _ in self.messages():
            if message is not None and message["run"] == run and "step" in message:
                for key in message["metrics"]:
                    found.setdefault(key, set()).add(message["step"])
        return found

    @property
    def sent(self) -> int:
        """The byte up to which all is sent; a note of bytes that were lost with the machine is put right."""
        noted, size = (read_json(self.note) or {}).get("bytes", 0), self._size
        if noted > size:  # else the next lines would count as sent
            write_json(self.note, {"bytes": size})
        return min(noted, size)

    @property
    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def note_sent(self, end: int) -> None:
        """All up to byte `end` is sent; what the note speaks of is on the disk before it."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        write_json(self.note, {"bytes": end})

    def waits(self) -> bool:
        """Whether anything is there to be sent; the beginning of a line is nothing yet."""
        sent = self.sent
        return sent < self._size and next(self.messages(sent), None) is not None

    def num_waiting(self) -> int:
        """Points and other messages that are not sent yet."""
        found = [message for message, _ in self.messages(self.sent) if message is not None]
        return sum(len(message.get("metrics", [None])) for message in found)

    def refuse(self, batch: Batch, items: list[Any], reason: str) -> None:
        """Keep what the server will not take, beside the spool."""
        with (self.folder / "mlflow-refused.jsonl").open("a", encoding="utf-8") as file:
            line = {"run": batch.run, "to": batch.to, "kind": batch.kind, "items": items, "reason": reason}
            file.write(json.dumps(line) + "\n")

    def next_batch(self, start: int) -> Batch | None:
        """Messages from byte `start` on that go in one request."""
        batch = None
        for message, end in self.messages(start):
            if message is None:
                if batch is None:
                    batch = Batch("nothing", "", "", [], end)
                return batch
            kind = next(kind for kind in KINDS if kind in message)
            items = _points(message) if kind == "metrics" else [message]
            if batch is None:
                batch = Batch(kind, message["run"], message["to"])
            elif not (
                kind == "metrics" == batch.kind
                and (batch.run, batch.to) == (message["run"], message["to"])
                and len(batch.items) + len(items) <= POINTS_AT_ONCE
            ):
                return batch
            batch.items += items
            batch.end = end
        return batch

    @contextmanager
    def sending(self) -> Iterator[None]:
        """One process at a time sends; where the file system has no locks, a message may go twice, to no harm."""
        with self.path.open("ab") as file:
            locked(file, wait=True)
            yield


def _message(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
        return message if {"time", "to", "run"} <= message.keys() and message.keys() & {*KINDS} else None
    except (ValueError, AttributeError):
        return None


def _points(message: dict[str, Any]) -> list[tuple[str, float, int, int]]:
    return [(key, value, message["time"], message["step"]) for key, value in message["metrics"].items()]
