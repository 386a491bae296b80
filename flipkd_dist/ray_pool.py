"""The pool of teacher actors on Ray: fed as it works, growing where there is room, whole again after every loss.

An actor that dies is replaced and its shards are given out again, so that any number of kills costs only what was in
work; a shard that its actors never survive ends the pool. Imports ray inside its functions.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from flipkd_dist.config import TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line
from flipkd_dist.ray_storage import check_reached, check_written, comes
from flipkd_dist.score import Scored
from flipkd_dist.scorer import Scorer
from flipkd_dist.store import Store
from flipkd_dist.teacher_source import TeacherSource

logger = logging.getLogger("flipkd_dist")
IN_FLIGHT = 2  # shards of an actor, in work and waiting: it never waits for the driver, and the driver reads no further
RETRIES = 3  # of a shard whose actor died, and of starts in a row that failed
NODE_GROUP = "ray.io/node-group"  # the label that Ray makes of RAY_NODE_TYPE_NAME
POLL_S = 1.0  # how often the pool looks whether the cluster has got room


@dataclass
class Shard:
    texts: list[str]
    num_deaths: int = 0  # of actors that had it in work


@dataclass
class Member:
    """An actor of the pool; what it was given ends in the order given."""

    handle: Any
    placed: Any  # a reference, ready once the actor has found its place and runs
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
    own = {name: amount for name, amount in settings.resources_per_worker.items() if amount}
    return {"CPU": float(settings.num_cpus_per_worker), **({"GPU": float(gpus)} if gpus else {}), **own}


def task_options(resources: dict[str, float]) -> dict[str, Any]:
    """What `ray.remote` calls these resources."""
    own = {key: amount for key, amount in resources.items() if key not in ("CPU", "GPU", "memory")}
    return {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "memory": resources.get("memory") or None,  # bytes
        "resources": own,
    }


def autoscales() -> bool:
    """Whether nodes may come to the joined cluster: `ray up` and KubeRay name the group of each that they start."""
    import ray

    return any(node["Alive"] and NODE_GROUP in node["Labels"] for node in ray.nodes())


def map_on_actors(source: TeacherSource, store: Store, timeout_s: float, shards: Iterator[list[str]]) -> Iterator[int]:
    """Score shards on a pool of `teacher.num_workers` actors, in any order; its actors end with it.

    Args:
        timeout_s: how long to wait while no actor finds room; a warning comes when as long no shard ends.
    Yields:
        the number of texts of each shard that is complete.
    Raises:
        UserError: no actor found room, a node's shards do not come here, or as raised in an actor.
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
        self.num_failed_starts = 0  # in a row
        self.heard, self.num_silent = time.monotonic(), 1  # when an actor last came or ended something; for warnings
        self.num_texts = self.num_truncated = 0  # scored, and cut

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
        self._hear()
        while self._feed():
            self._grow()
            references = [member.reference for member in self.members if member.reference is not None]
            if references:
                ray.wait(references, timeout=POLL_S, fetch_local=False)
            else:
                time.sleep(POLL_S)
            for member in list(self.members):
                yield from self._reports(member)
            self._check_silence()
        self._tell_cuts()

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
        """One more actor while shards wait for one; never two that wait for room.

        Where an autoscaler brings nodes, as many at once as there are already: it takes minutes for each.
        """
        num_loading = sum(member.loading is not None for member in self.members)
        at_once = max(1, len(self.members) - num_loading) if autoscales() else 1
        while self._waits() and num_loading < at_once and len(self.members) < self.most:
            if self.members and not self._room():
                return
            self._start()
            num_loading += 1

    def _start(self) -> None:
        import ray

        # The pool replaces actors itself: Ray would blame a death on every shard that the actor had been given.
        handle = ray.remote(Scorer).options(max_restarts=0, max_task_retries=0, **task_options(self.need)).remote()
        device = "cuda" if "GPU" in self.need else "cpu"
        placed = handle.__ray_ready__.remote()
        self.members.append(Member(handle, placed, handle.load.remote(self.source, self.store, device)))

    def _reports(self, member: Member) -> Iterator[int]:
        """What an actor has finished since it was last asked."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        while (reference := member.reference) is not None and ray.wait([reference], timeout=0, fetch_local=False)[0]:
            try:
                result = ray.get(reference)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from None
                if isinstance(cause, OSError):  # of a disk or a file system: another node may fare better
                    yield from self._lost(member, cause)
                    return
                raise RuntimeError(f"teacher actor: {type(cause).__name__}: {one_line(cause)}") from error
            except RayError as error:  # the actor, its process or its node is gone
                yield from self._lost(member, error)
                return
            self._hear()
            if member.loading is not None:
                member.loading, self.num_failed_starts = None, 0
                logger.debug("teacher pool: %d actors", len(self.members))
            else:
                _, shard = member.work.popleft()
                yield self._scored(shard, *result)

    def _scored(self, shard: Shard, scored: Scored, host: str) -> int:
        """The number of texts of a shard, once it is seen here."""
        if not comes(scored.path, 0) and not self.store.holds(shard.texts).all():  # it may have been merged since
            check_written(scored.path, host)
        self.num_texts += scored.num_texts
        self.num_truncated += scored.num_truncated
        return scored.num_texts

    def _tell_cuts(self) -> None:
        if self.num_truncated:
            length = self.source.settings.max_length
            what, to = ("pairs", "twice ") if self.store.spec.hidden_size == 1 else ("texts", "")
            logger.warning(
                "%d of %d %s were cut to %steacher.max_length = %d tokens",
                self.num_truncated, self.num_texts, what, to, length,
            )  # fmt: skip

    def _hear(self) -> None:
        self.heard, self.num_silent = time.monotonic(), 1

    def _lost(self, member: Member, error: Exception) -> Iterator[int]:
        """Another actor does what this one was given, but for what it had written before it died."""
        import ray

        self.members.remove(member)
        self._hear()
        ray.kill(member.handle)  # it may only be out of reach, and would keep its place
        if member.loading is not None:
            self.num_failed_starts += 1
            if self.num_failed_starts > RETRIES:
                raise RuntimeError(
                    f"teacher actors: {self.num_failed_starts} died in a row while they loaded the model "
                    f"({one_line(error)})"
                ) from None
            return
        logger.warning("teacher pool: an actor is gone, its shards are given out again (%s)", one_line(error))
        for place, (_, shard) in enumerate(member.work):
            if place == 0 and self.store.holds(shard.texts).all():
                self.num_texts += len(shard.texts)
                yield len(shard.texts)
                continue
            shard.num_deaths += place == 0
            if shard.num_deaths > RETRIES:
                raise RuntimeError(
                    f"teacher pool: a shard of {len(shard.texts)} texts, the first of them {_short(shard.texts[0])}, "
                    f"ended {shard.num_deaths} actors ({one_line(error)})"
                ) from None
            self.returned.append(shard)

    def _check_silence(self) -> None:
        """Refuse to wait for ever for a cluster without room; say so where work or a start takes long."""
        import ray

        silent_s = time.monotonic() - self.heard
        if silent_s < self.num_silent * self.timeout_s:
            return
        self.num_silent += 1
        working = sum(member.loading is None for member in self.members)
        starting = [member.placed for member in self.members if member.loading is not None]
        loading = len(ray.wait(starting, num_returns=len(starting), timeout=0)[0]) if starting else 0
        if working:
            logger.warning("teacher pool: no shard has ended for %.0f s, %d actors are at work", silent_s, working)
        elif loading:
            logger.warning("teacher pool: %d actors still load the model after %.0f s", loading, silent_s)
        else:
            raise self._no_room()

    def _no_room(self) -> UserError:
        import ray

        need = ", ".join(f"{amount:g} {name}" for name, amount in self.need.items())
        free = ", ".join(f"{ray.available_resources().get(name, 0):g} {name}" for name in self.need)
        return UserError(
            f"teacher.num_workers: no scoring actor started within distributed.timeout_s = {self.timeout_s:g} s: "
            f"one needs {need}, the Ray cluster has {free} free: lower teacher.num_cpus_per_worker, "
            "num_gpus_per_worker or resources_per_worker, or add nodes"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
