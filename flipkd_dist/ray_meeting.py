"""Ray Train tells its workers where to meet; they meet by themselves, as the processes of a launcher do.

Ray's own backend would make the process group before our code runs: a mistake in the network would be a hang, or a line
without a remedy. Imports ray inside its functions.
"""

import os
from typing import Any

from flipkd_dist.rendezvous import serve


def meeting() -> Any:
    """A TorchConfig whose workers have RANK, WORLD_SIZE, MASTER_ADDR and their like, and no process group yet."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    class Backend(_TorchBackend):  # which ends the group when the workers are done
        def on_start(self, worker_group, backend_config):
            host, port = worker_group.execute_single(0, _place)
            worker_group.execute(_set_master, host, port)
            worker_group.execute(_set_torch_distributed_env_vars)

    class Config(TorchConfig):
        @property
        def backend_cls(self):
            return Backend

    return Config()


def _place() -> tuple[str, int]:
    """Address of this node, which is rank 0's, and a port that this process holds from now on."""
    import ray

    return ray.util.get_node_ip_address(), serve()


def _set_master(host: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
