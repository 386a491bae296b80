"""The pool of teacher actors on Ray: fed as it works, growing where there is room, whole again after every loss.

An actor that dies is replaced and its shards are given out again, so that any number of kills costs only what was in
work; a shard that its actors never survive ends the pool. Imports ray inside its functions.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from flipkd_dist.config import TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.ray_storage import check_reached
from flipkd_dist.score import score_shard
from flipkd_dist.store import Store
from flipkd_dist.teacher_source import TeacherSource

logger = logging.getLogger("flipkd_dist")
IN_FLIGHT = 2  # shards of an actor, in work and waiting: it never waits for the driver, and the driver reads no further
RETRIES = 3  # of a shard whose actor died, and of starts in a row that failed
POLL_S = 1.0  # how often the pool looks whether the cluster has got room


class Scorer:
    """What lives in an actor: one loaded teacher."""

    def load(self, source: TeacherSource, store: Store, device: str) -> None:
        """Apart from the constructor, so that a UserError reaches the driver as such."""
        import torch

        torch.set_num_threads(source.settings.num_cpus_per_worker)
        os.environ["RAYON_NUM_THREADS"] = str(source.settings.num_cpus_per_worker)  # of the tokenizer
        self.teacher, self.store, self.batch_size = source.load(device), store, source.settings.batch_size

    def score(self, shard: list[str]) -> int:
        return score_shard(self.teacher, self.store, self.batch_size, shard)


@dataclass
class Shard:
    texts: list[str]
    num_deaths: int = 0  # of actors that had it in work


@dataclass
class Member:
    """An actor of the pool; what it was given ends in the order given."""

    handle: Any
    loading: Any  # the reference of `load`; None once it is done
    work: deque[tuple[Any, Shard]] = field(default_factory=deque)  # (reference, shard)

    @property
    def reference(self) -> Any:
        """What it will report next; None where it has nothing to do."""
        return self.loading or (self.work[0][0] if self.work else None)


def actor_resources(settings: TeacherConfig) -> dict[str, float]:
    """What one teacher actor takes of the cluster; with `auto` a GPU if there is any."""
    import ray

    gpus = settings.num_gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if settings.api_base is None and ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    return {"CPU": float(settings.num_cpus_per_worker), **({"GPU": float(gpus)} if gpus else {})}


def autoscales() -> bool:
    """Whether the joined cluster was started with a cluster configuration that can add nodes."""
    from ray.experimental.internal_kv import _internal_kv_get

    return bool(_internal_kv_get("__autoscaling_config")) or "RAY_CLOUD_INSTANCE_ID" in os.environ


def map_on_actors(source: TeacherSource, store: Store, timeout_s: float, shards: Iterator[list[str]]) -> Iterator[int]:
    """Score shards on a pool of `teacher.num_workers` actors, in any order; its actors end with it.

    Args:
        timeout_s: how long to wait while no actor runs.
    Yields:
        the number of texts of each shard that is complete.
    Raises:
        UserError: no actor could start, or as raised in an actor.
        RuntimeError: a shard or the start of an actor failed for good.
    """
    pool = Pool(source, store, timeout_s, shards)
    try:
        yield from pool.run()
    finally:
        pool.close()


class Pool:
    def __init__(self, source: TeacherSource, store: Store, timeout_s: float, shards: Iterator[list[str]]):
        self.source, self.store, self.timeout_s = source, store, timeout_s
        count = source.settings.num_workers
        self.least, self.most = count if isinstance(count, list) else (count, count)
        self.shards, self.returned = shards, deque()  # still to come, and given back by actors that died
        self.following: Shard | None = None  # the next of the stream: there is work as long as there is one
        self.members: list[Member] = []
        self.num_failed_starts, self.alive = 0, time.monotonic()  # in a row; when an actor last ran

    def run(self) -> Iterator[int]:
        import ray

        first = list(islice(self.shards, self.least))  # no more actors than there are shards
        if not first:
            return
        check_reached(self.store.folder)
        self.shards = chain(first, self.shards)
        self._pull()
        self.need = actor_resources(self.source.settings)
        for _ in range(max(1, min(len(first), self._room()))):
            self._start()
        while self._feed():
            self._grow()
            references = [member.reference for member in self.members if member.reference is not None]
            if references:
                ray.wait(references, timeout=POLL_S, fetch_local=False)
            else:
                time.sleep(POLL_S)
            for member in list(self.members):
                yield from self._reports(member)
            self._check_alive()

    def close(self) -> None:
        import ray

        for member in self.members:
            ray.kill(member.handle)
        self.members.clear()

    def _pull(self) -> None:
        texts = next(self.shards, None)
        self.following = None if texts is None else Shard(texts)

    def _feed(self) -> bool:
        """Give every actor that runs its next shards; False when there is nothing left and nothing in work."""
        for depth in range(1, IN_FLIGHT + 1):  # one for each before the second for any
            for member in self.members:
                if member.loading is None and len(member.work) < depth and (shard := self._take()):
                    member.work.append((member.handle.score.remote(shard.texts), shard))
        return self._waits() or any(member.work for member in self.members)

    def _take(self) -> Shard | None:
        if self.returned:
            return self.returned.popleft()
        shard = self.following
        if shard is not None:
            self._pull()
        return shard

    def _waits(self) -> bool:
        return bool(self.returned) or self.following is not None

    def _room(self) -> float:
        """How many more actors the cluster takes now, or may take when its autoscaler has brought nodes."""
        import ray

        if autoscales():
            return math.inf
        free = ray.available_resources()
        return min(int(free.get(name, 0.0) / amount + 1e-6) for name, amount in self.need.items())

    def _grow(self) -> None:
        """One more actor while shards wait for one; never two that wait for room."""
        loading = any(member.loading is not None for member in self.members)
        if self._waits() and not loading and len(self.members) < self.most and (not self.members or self._room()):
            self._start()

    def _start(self) -> None:
        import ray

        options = dict(num_cpus=self.need["CPU"], num_gpus=self.need.get("GPU", 0))
        # The pool replaces actors itself: Ray would blame a death on every shard that the actor had been given.
        handle = ray.remote(Scorer).options(max_restarts=0, max_task_retries=0, **options).remote()
        device = "cuda" if "GPU" in self.need else "cpu"
        self.members.append(Member(handle, handle.load.remote(self.source, self.store, device)))

    def _reports(self, member: Member) -> Iterator[int]:
        """What an actor has finished since it was last asked."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        while (reference := member.reference) is not None and ray.wait([reference], timeout=0, fetch_local=False)[0]:
            try:
                num_texts = ray.get(reference)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from None
                raise RuntimeError(f"teacher actor: {type(cause).__name__}: {_one_line(cause)}") from error
            except RayError as error:  # the actor, its process or its node is gone
                yield from self._lost(member, error)
                return
            self.alive = time.monotonic()
            if member.loading is not None:
                member.loading, self.num_failed_starts = None, 0
                logger.debug("teacher pool: %d actors", len(self.members))
            else:
                member.work.popleft()
                yield num_texts

    def _lost(self, member: Member, error: Exception) -> Iterator[int]:
        """Another actor does what this one was given, but for what it had written before it died."""
        import ray

        self.members.remove(member)
        ray.kill(member.handle)  # it may only be out of reach, and would keep its place
        if member.loading is not None:
            self.num_failed_starts += 1
            if self.num_failed_starts > RETRIES:
                raise RuntimeError(
                    f"teacher actors: {self.num_failed_starts} died in a row while they loaded the model "
                    f"({_one_line(error)})"
                ) from None
            return
        logger.warning("teacher pool: an actor is gone, its shards are given out again")
        for place, (_, shard) in enumerate(member.work):
            if place == 0 and self.store.holds(shard.texts).all():
                yield len(shard.texts)
                continue
            shard.num_deaths += place == 0
            if shard.num_deaths > RETRIES:
                raise RuntimeError(
                    f"teacher pool: a shard of {len(shard.texts)} texts, the first of them {_short(shard.texts[0])}, "
                    f"ended {shard.num_deaths} actors ({_one_line(error)})"
                ) from None
            self.returned.append(shard)

    def _check_alive(self) -> None:
        """Refuse to wait for ever for a cluster without room."""
        if any(member.loading is None for member in self.members):
            self.alive = time.monotonic()
        elif time.monotonic() - self.alive > self.timeout_s:
            import ray

            need = ", ".join(f"{amount:g} {name}" for name, amount in self.need.items())
            free = ", ".join(f"{ray.available_resources().get(name, 0):g} {name}" for name in self.need)
            raise UserError(
                f"teacher.num_workers: no scoring actor started within distributed.timeout_s = {self.timeout_s:g} s: "
                f"one needs {need}, the Ray cluster has {free} free: lower teacher.num_cpus_per_worker and "
                "teacher.num_gpus_per_worker, or add nodes"
            )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
