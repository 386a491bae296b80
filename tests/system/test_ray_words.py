"""What Ray's own exceptions say of lost workers and failed starts; nothing is started."""

import pytest
from ray import exceptions
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from flipkd_dist.ray_watch import failed_start, fate

pytestmark = pytest.mark.system
NO_MEMORY = exceptions.OutOfMemoryError("Task was killed due to the node running low on memory")


@pytest.mark.parametrize(
    "error, words",
    [
        (WorkerHealthCheckFailedError("failed", NO_MEMORY), "was ended by Ray: its node had no memory left"),
        (NO_MEMORY, "was ended by Ray: its node had no memory left"),
        (WorkerHealthCheckTimeoutError("hanging"), "does not answer (hung, or its node cannot be reached?)"),
        (exceptions.NodeDiedError("node"), "its node was lost"),
        (exceptions.RayActorError(error_msg="its node has died"), "its node was lost"),
        (exceptions.WorkerCrashedError(), "died (killed, or out of memory?)"),
        (exceptions.RayActorError(), "died (killed, or out of memory?)"),
        (exceptions.RayActorError(preempted=True), "its node was taken away"),
        (ValueError("seven"), None),
        (None, None),
    ],
)
def test_every_way_to_lose_a_worker_has_its_words(error, words):
    assert fate(error) == words


def not_started(cause: Exception) -> ControllerError:
    error = WorkerGroupStartupFailedError("One of the worker actors failed to initialize")
    error.__cause__ = cause
    return ControllerError(error)


def test_a_start_that_fails_says_why_and_one_that_takes_long_has_not_failed():
    broken = exceptions.RayActorError(error_msg="No module named\n'flipkd'", actor_init_failed=True)
    assert failed_start(not_started(broken)) == "RayActorError: No module named 'flipkd'"
    assert failed_start(not_started(exceptions.NodeDiedError("node"))) == "its node was lost"
    assert failed_start(ControllerError(WorkerGroupStartupTimeoutError(2))) is failed_start(None) is None
