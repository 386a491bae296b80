"""Bytes of tensor storages: what a started engine holds, and the most that is alive at once during a step."""

import gc
import weakref

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors) -> int:
    """Of all tensors together; a storage that several of them share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None and not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def living() -> list[Tensor]:
    """Every tensor that Python knows of."""
    found = []
    for one in gc.get_objects():
        try:
            if isinstance(one, Tensor) and not one.is_meta and one.untyped_storage().nbytes() and one.data_ptr():
                found.append(one)
        except (ReferenceError, RuntimeError, NotImplementedError):
            continue
    return found


class LiveStorages(TorchDispatchMode):
    """Follows the bytes of living storages operation by operation; `peak` is their largest sum."""

    def __init__(self, present: list[Tensor]):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in present:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta or storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Collects what autograd keeps for the backward, but for parameters.

    It holds what it collects, and gathered parameters would stay gathered.
    """

    def __init__(self):
        self.tensors: list[Tensor] = []
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Parameter) and not isinstance(tensor._base, Parameter):
            self.tensors.append(tensor.detach())
        return tensor

    def drain(self) -> int:
        """The bytes of what was collected, which is dropped."""
        count, self.tensors = storage_bytes(self.tensors), []
        return count
