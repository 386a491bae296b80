"""What a process hands to collectives, seen where PyTorch dispatches them: our own and DeepSpeed's alike."""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _bytes(value) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class Sent(TorchDispatchMode):
    """Bytes that this rank sends by kind of collective, were every one a ring; and how many there were."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            ranks, name = dist.get_world_size(), function.__name__.split(".")[0]
            self.calls[name] += 1
            self.bytes[name] += self._sent(name, ranks, args)
        return result

    @staticmethod
    def _sent(name: str, ranks: int, args: tuple) -> float:
        if "allreduce" in name:
            return 2 * (ranks - 1) / ranks * _bytes(args[0])
        if "reduce_scatter" in name:
            return (ranks - 1) / ranks * _bytes(args[1])
        if "allgather" in name:
            return (ranks - 1) * _bytes(args[1])
        assert name in ("barrier", "broadcast_"), name
        return _bytes(args[0]) if name == "broadcast_" and torch.is_tensor(args[0]) else 0
