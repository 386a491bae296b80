"""What Ray Train's controller sees: which worker was lost first, what a restart would not mend, workers without room.

Its hooks are Ray's own (`DeveloperAPI`); the class that they call knows nothing of Ray. Imports ray inside functions.
"""

import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from flipkd_dist.checkpoint import newest_checkpoint
from flipkd_dist.config import RunConfig
from flipkd_dist.console import set_up_logging
from flipkd_dist.errors import StoppedOnRequest, UserError, WorkerFailed
from flipkd_dist.failures import Failure, failure_of, failures, first_cause, forget, one_line, record
from flipkd_dist.metric_log import last_step
from flipkd_dist.run_folder import RunFolder

logger = logging.getLogger("flipkd_dist")
TOLD_EVERY_S = 60.0  # that workers wait for room
PING_S = 5.0  # for a worker to say that it lives
SAVED_EVERY_S = 0.1  # between two looks whether a checkpoint is written
NODE_LOST = re.compile("its node has died|node was terminated|node failed", re.IGNORECASE)
WAITING = ("Initializing", "Scheduling", "Rescheduling", "Restarting")  # states of the controller without workers


class Watch:
    """Lives in the controller's process, on the driver's node."""

    def __init__(
        self, config: RunConfig, stages: list[str], trained: str | None, need: dict[str, float], log: str | None
    ):
        """
        Args:
            need: resources of a worker.
            log: the file that messages go to, if any.
        """
        self.config, self.stages, self.trained, self.need, self.log = config, stages, trained, need, log
        self.hosts: dict[int, str] = {}  # of the workers that run, by rank
        self.cause: Failure | None = None
        self.num_restarts = 0  # that count
        self.num_failed_starts = 0  # in a row
        self.state, self.since, self.told = "Initializing", time.monotonic(), time.monotonic()
        self.has_run = False

    def starting(self) -> None:
        """The processes of the attempt before are gone, and with them what they noted."""
        forget(self.config.run_dir)

    def started(self, hosts: dict[int, str]) -> None:
        if self.hosts and len(hosts) != len(self.hosts):
            most = self.config.distributed.max_workers
            logger.warning("%s: goes on with %d of at most %d workers", self.stages[0], len(hosts), most)
        self.hosts, self.has_run, self.num_failed_starts = hosts, True, 0

    def failed(self, errors: dict[int, Exception], dead: dict[int, str]) -> None:
        """Workers have ended, or do not answer.

        Args:
            errors: by rank; those of the dead are Ray's words.
            dead: what became of workers that can note nothing any more, by rank.
        Raises:
            UserError, WorkerFailed: a restart would end the same way.
            StoppedOnRequest: as raised in a worker that could not leave word of it in the run folder.
        """
        if stopped := next((error for error in errors.values() if isinstance(error, StoppedOnRequest)), None):
            raise stopped
        folder, noted = self.config.run_dir, failures(self.config.run_dir)
        known = {failure.rank for failure in noted}
        for rank in (errors.keys() | dead.keys()) - known:
            host = self.hosts.get(rank, "?")
            if rank in dead:  # before its end made others fail
                first = min((failure.time for failure in noted), default=time.time())
                record(folder, Failure(rank, host, first - 1e-3, dead[rank], final=False, lost_peer=False))
            else:
                record(folder, replace(failure_of(rank, errors[rank]), host=host))
        self.cause = first_cause(folder)
        if self.cause is not None and self.cause.final:
            raise ended(self.cause, self.config)

    def updated(
        self, state: str, counts: bool, have: Callable[[], list[dict[str, float]]], failed_start: str | None = None
    ) -> None:
        """The controller goes on in the same or in another state.

        Args:
            counts: towards distributed.max_failures, if it restarts.
            have: asks for the free resources of each node.
            failed_start: why workers that had room could not be started.
        Raises:
            UserError, StoppedOnRequest: workers have waited for room too long.
            WorkerFailed: they could not be started too often.
        """
        before, self.state, now = self.state, state, time.monotonic()
        if failed_start and state != before:
            self._start_failed(failed_start)
        if state == "Restarting" != before:
            self._announce(counts)
        if state == "Preempting" != before:
            RunFolder(self.config).save.touch()
            logger.warning("%s: a node is to be taken away: a checkpoint is written before it goes", self.stages[0])
        if state == "Resizing" != before:
            self._save_first()
        if state not in WAITING:
            self.since = self.told = now
        elif now - self.told >= min(TOLD_EVERY_S, self.config.distributed.timeout_s):
            self.told, free = now, have()
            if self._places(free) >= self.config.distributed.min_workers:
                self.since = now  # there is room: it is their start that takes long
            elif now - self.since >= self.config.distributed.timeout_s:
                raise self._no_room(now, free)
            else:
                logger.warning("%s: %s", self.stages[0], self._lack(now, free))
        if state == before and state in WAITING:
            time.sleep(1.0)  # Ray asks again at once, and would keep a core busy

    def _start_failed(self, reason: str) -> None:
        """Ray itself would try for ever: its limit counts starts that only take long as well."""
        self.num_failed_starts += 1
        most, times = self.config.distributed.max_failures, self.num_failed_starts
        if times > most:
            often = "once" if times == 1 else f"{times} times in a row"
            raise WorkerFailed(
                f"the workers could not be started, {often} ({reason}): no attempt is left of distributed.max_failures "
                f"= {most}: look at the nodes, and run the same command again to go on"
            )
        line = "%s: the workers could not be started (%s): tried again (%d of %d)"
        logger.warning(line, self.stages[0], reason, times, most)

    def _save_first(self) -> None:
        """Ray ends the workers in the middle of a step, to start another number of them: let them save before."""
        folder, end = RunFolder(self.config), time.monotonic() + self.config.distributed.timeout_s
        logger.info("%s: the Ray cluster has room for another number of workers: they start again", self.stages[0])
        if self.stages[0] != "train":
            return
        folder.save.touch()
        while (
            folder.save.exists()
            and time.monotonic() < end
            and not is_exported(folder, self.trained)
            and not failures(folder.path)  # which end the workers: nobody will write any more
        ):
            time.sleep(SAVED_EVERY_S)
        folder.save.unlink(missing_ok=True)

    def _announce(self, counts: bool) -> None:
        self.num_restarts += counts
        done = RunFolder(self.config)
        first, *others = self.stages
        stage = others[0] if first == "train" and others and is_exported(done, self.trained) else first
        was = f"{self.cause}" if self.cause else "a worker was lost"
        count = f" (restart {self.num_restarts} of {self.config.distributed.max_failures})" if counts else ""
        if stage != "train":
            logger.warning("%s: %s: started again%s", stage, was, count)
            return
        newest = newest_checkpoint(done.checkpoints)
        logger.warning(
            "train: %s, after step %d: started again from step %d%s",
            was,
            last_step(done.metric_log),
            newest.step if newest else 0,
            count,
        )

    def _places(self, free: list[dict[str, float]]) -> int:
        """How many workers the nodes have room for."""
        need = {name: amount for name, amount in self.need.items() if amount}
        most = self.config.distributed.min_workers  # all that is asked of a node, also where a worker needs nothing
        return sum(
            min((int(node.get(name, 0.0) / amount + 1e-6) for name, amount in need.items()), default=most)
            for node in free
        )

    def _lack(self, now: float, free: list[dict[str, float]]) -> str:
        wanted, each = (
            self.config.distributed.min_workers,
            " and ".join(f"{n:g} {name}" for name, n in self.need.items()),
        )
        there = ", ".join(f"{sum(node.get(name, 0.0) for node in free):g} {name}" for name in self.need)
        return (
            f"no room for {wanted} workers of {each} since {now - self.since:.0f} s; {there} are free on "
            f"{len(free)} nodes of the Ray cluster"
        )

    def _no_room(self, now: float, free: list[dict[str, float]]) -> Exception:
        lack = self._lack(now, free)
        if self.has_run:
            return StoppedOnRequest(f"{lack}: bring nodes back, and run the same command again to go on")
        return UserError(
            f"distributed.num_workers: {lack}: lower num_workers, add nodes or raise distributed.timeout_s"
        )


def is_exported(folder: RunFolder, trained: str | None) -> bool:
    """Whether the workers have trained what the driver wants, which knows it only when they have ended."""
    return trained is not None and folder.done("exported", trained) and (folder.adapter / "flipkd.json").is_file()


def ended(cause: Failure, config: RunConfig) -> Exception:
    """The exception that ends a run for good."""
    if cause.user:
        return UserError(cause.error)
    if cause.final:
        return WorkerFailed(f"{cause}: {config.run_dir / 'failures'} has the traceback")
    times = config.distributed.max_failures
    return WorkerFailed(
        f"{cause}: no restart is left of distributed.max_failures = {times}: run the same command again to go on"
    )


def fate(error: Exception | None) -> str | None:
    """What became of a worker that Ray says has died, in a line; None where it lives or has raised an error itself."""
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    error = getattr(error, "health_check_failure", error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "does not answer (hung, or its node cannot be reached?)"
    if isinstance(error, OutOfMemoryError):
        return "was ended by Ray: its node had no memory left"
    if isinstance(error, NodeDiedError | LocalRayletDiedError):
        return "its node was lost"
    if not isinstance(error, RayActorError | WorkerCrashedError):
        return None
    if getattr(error, "preempted", False):
        return "its node was taken away"
    return "its node was lost" if NODE_LOST.search(str(error)) else "died (killed, or out of memory?)"


def failed_start(error: Exception | None) -> str | None:
    """Why the workers of a group could not be started, in a line; None where that only took long."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    error = getattr(error, "controller_failure", None)
    if not isinstance(error, WorkerGroupStartupFailedError):
        return None
    cause = error.__cause__ or error
    return one_line(cause) if getattr(cause, "actor_init_failed", False) else fate(cause) or one_line(cause)


def count_nodes_anew() -> None:
    """Ray Train counts them every 20 s, and would first wait a minute for workers on a node that is gone."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    with suppress(ray.exceptions.RayError):  # it would have been sooner, no more
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=PING_S)


def _free() -> list[dict[str, float]]:
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def callback(watch: Watch) -> Any:
    """What Ray Train calls in its controller."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError

    class Callback(ControllerCallback, WorkerGroupCallback):
        group = None

        def before_worker_group_start(self, worker_group_context):
            set_up_logging(watch.log)
            watch.starting()

        def after_worker_group_start(self, worker_group):
            self.group = worker_group
            watch.started({w.distributed_context.world_rank: w.metadata.hostname for w in worker_group.get_workers()})

        def after_worker_group_poll_status(self, worker_group_status):
            errors = worker_group_status.errors
            if not errors:
                return
            try:
                watch.failed(errors, self._dead(errors))
            except Exception as error:
                raise ControllerError(error) from None  # Ray does not start workers again after one

        def _dead(self, errors):
            """Also those of whose death the controller has not heard yet."""
            asked = {
                w.actor.get_metadata.remote(): w.distributed_context.world_rank
                for w in self.group.get_workers()
                if w.distributed_context.world_rank not in errors
            }
            found = dict(errors)
            for reference in ray.wait(list(asked), num_returns=len(asked), timeout=PING_S)[0] if asked else []:
                try:
                    ray.get(reference)
                except Exception as error:
                    found[asked[reference]] = error
            return {rank: end for rank, error in found.items() if (end := fate(error))}

        def after_controller_state_update(self, previous_state, current_state):
            error = getattr(current_state, "training_failed_error", None)
            preempted = isinstance(error, PreemptionError) or any(
                fate(e) == "its node was taken away" for e in getattr(error, "worker_failures", {}).values()
            )
            set_up_logging(watch.log)
            state = type(current_state).__name__.removesuffix("State")
            if state in ("Restarting", "Rescheduling"):
                count_nodes_anew()
            watch.updated(state, not preempted, _free, failed_start(error))

    return Callback()
