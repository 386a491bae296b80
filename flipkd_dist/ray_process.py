"""What Ray runs first in each of its processes. Imports ray inside its functions, and nothing heavy at all."""

import logging
import os

from flipkd_dist.console import quiet_others

NOISY = (  # below ray.train.v2._internal
    "execution.controller.placement_group_cleaner",  # its watchdog warns every second where no dashboard runs
    "execution.controller.controller",  # the traceback of every start that takes long or fails; `ray_watch` says it
    "execution.callback_manager",  # prints the traceback of what `ray_watch` raises to end a run
    "callbacks.backend_setup",  # of leaving a group of which a worker is dead
    "util",  # of every failed worker; failures/ keeps them, and the first is said
)


def set_up() -> None:
    """Name the cluster of this process, and keep its libraries quiet.

    Ray Train's placement-group cleaner looks for its controller on the cluster that it finds by itself. Where two run
    on a machine it may find the other one, miss the controller there, and take a training's workers away.
    """
    import ray

    quiet_others()
    for name in NOISY if not os.environ.get("FLIPKD_DEBUG") else ():
        logging.getLogger(f"ray.train.v2._internal.{name}").disabled = True  # Ray Train resets levels
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
