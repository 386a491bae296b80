"""Two engines behind one interface: plain PyTorch in one process, the reference, and DeepSpeed ZeRO-1/2/3.

The only module that imports deepspeed, inside the functions that need it.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flipkd_dist.base_loader import Part
from flipkd_dist.rendezvous import meet
from flipkd_dist.slices import Slice, put, set_step, slice_of
from flipkd_dist.student import Student
from flipkd_dist.world import World

MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Engine(Protocol):
    """One optimizer step is any number of `backward`, the last one told so, then one `step`."""

    student: Student

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def readouts(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """The read-outs alone, without gradient; every rank must call it."""

    def one_reduction(self) -> AbstractContextManager:
        """All backwards of an optimizer step inside: gradients are reduced over ranks once, when the context ends."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of `loss`, averaged over ranks; `last` ends the accumulation."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear the gradients; the global norm of the gradient before clipping."""

    def each_trained(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value in fp32 on the CPU of one trained tensor after the other; every rank must go through."""

    def trained_state(self) -> dict[str, Tensor]:
        """All of them, by parameter name; every rank must call it."""
        return dict(self.each_trained())

    def gradients(self) -> dict[str, Tensor]:
        """Whole unclipped gradients between the last `backward` and `step`; every rank must call it."""

    def shapes(self) -> dict[str, list[int]]:
        """Of the whole trained tensors, by parameter name."""

    def slices(self) -> dict[str, Slice]:
        """This rank's slices by parameter name; the slices of all ranks together are whole tensors."""

    def restore(self, values: dict[str, dict[str, Tensor]], step: int) -> None:
        """Put weights and moments after `step` updates into this rank's slices; every rank must call it."""

    def close(self) -> None: ...


class PlainEngine(Engine):
    """One process, no sharding."""

    def __init__(self, student: Student, make_optimizer: MakeOptimizer, max_grad_norm: float):
        self.student = student
        self.parameters = student.trained_parameters()
        self.optimizer = make_optimizer(list(self.parameters.values()))
        self.max_grad_norm = max_grad_norm

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.student(**batch)

    def readouts(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.student.readouts(**batch)

    def one_reduction(self) -> AbstractContextManager:
        for parameter in self.parameters.values():  # here, or they come to lie between activations that are freed
            parameter.grad = torch.zeros_like(parameter)
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or torch.inf)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def each_trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach().float().cpu().clone()) for name, parameter in self.parameters.items())

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad.detach().float().cpu().clone() for name, parameter in self.parameters.items()}

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.parameters.items()}

    def slices(self) -> dict[str, Slice]:
        return {
            name: slice_of(self.optimizer, parameter, 0, parameter.numel(), 0)
            for name, parameter in self.parameters.items()
        }

    def restore(self, values: dict[str, dict[str, Tensor]], step: int) -> None:
        put(self.slices(), values)
        set_step(self.optimizer, step)

    def close(self) -> None: ...


class DeepSpeedEngine(Engine):
    """ZeRO-1/2/3 by DeepSpeed, with the caller's optimizer."""

    def __init__(self, student: Student, make_optimizer: MakeOptimizer, ds_config: dict[str, Any]):
        import deepspeed

        self.student = student
        self.stage = ds_config["zero_optimization"]["stage"]
        self.coalescing = False
        self.parameters = student.trained_parameters()
        self.engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=make_optimizer(list(self.parameters.values())),
            config=ds_config,
            dist_init_required=False,
        )

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.engine(**batch)

    def readouts(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        # ZeRO-3 keeps the modules that are under way here, and those that were left would stay. Its order of fetching
        # starts anew with each forward; one that ends early costs it what it would fetch ahead (docs/method.md).
        depth = len(FWD_MODULE_STACK)
        found = self.student.readouts(**batch)
        del FWD_MODULE_STACK[depth:]
        return found

    @contextmanager
    def one_reduction(self) -> Iterator[None]:
        if not hasattr(self.engine.optimizer, "_coalesce_grad_reduction"):
            yield  # the wrapper that bf16 weights with fp32 accumulation get: every backward reduces for itself
            return
        self.engine.set_gradient_accumulation_boundary(True)  # which the step after the context is to find
        with self.engine.coalesce_grad_reduction():
            self.coalescing, self.sums = True, {}
            try:
                yield
                for name, total in self.sums.items():
                    self.parameters[name].grad.copy_(total)
            except BaseException:
                for parameter in self.parameters.values():  # nothing to reduce: the other ranks are elsewhere
                    parameter.grad = None
                raise
            finally:
                self.coalescing, self.sums = False, {}

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last or self.coalescing)
        # The loss is divided by global counts already, never by the number of micro-steps.
        self.engine.backward(loss, scale_wrt_gas=False)
        if self.coalescing:
            self._add_up()
        elif not last:
            self.engine.step()

    def _add_up(self) -> None:
        """Gradients in bf16 would lose a little with every backward: their sums are kept in fp32."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and parameter.grad.dtype != torch.float32:
                self.sums[name] = self.sums.get(name, 0) + parameter.grad.float()
                parameter.grad.zero_()

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.engine.optimizer, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def each_trained(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for name, parameter in self.parameters.items():  # one at a time: together they may be gigabytes
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                value = parameter.detach().float().cpu().clone()
            yield name, value

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).float().cpu() for name, parameter in self.parameters.items()}

    def shapes(self) -> dict[str, list[int]]:
        return {
            name: list(parameter.ds_shape if self.stage == 3 else parameter.shape)
            for name, parameter in self.parameters.items()
        }

    def slices(self) -> dict[str, Slice]:
        found = {name: self._slice(parameter) for name, parameter in self.parameters.items()}
        return {name: part for name, part in found.items() if part is not None}

    def _slice(self, parameter: torch.nn.Parameter) -> Slice | None:
        """Where the fp32 master weights of a parameter lie in this rank's flat partition, if any of them do."""
        zero = self.engine.optimizer
        if self.stage == 3:  # every tensor is divided evenly, padded at its end
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            share, start = parameter.ds_tensor.ds_numel, dist.get_rank() * parameter.ds_tensor.ds_numel
            length = min(share, parameter.ds_numel - start)
        else:  # the flat group of all tensors is divided evenly
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
            flat, offset = flats[mapping.param_group_index], mapping.hp_fragment_address.start
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        return slice_of(zero.optimizer, flat, offset, length, start) if length > 0 else None

    def restore(self, values: dict[str, dict[str, Tensor]], step: int) -> None:
        zero, slices = self.engine.optimizer, self.slices()
        put(slices, values)
        set_step(zero.optimizer, step)
        if self.stage < 3:
            zero.update_lp_params()  # the model's own copy of the weights
            return
        zero.checkpoint_event_prologue()  # small tensors stay whole between steps: partition them
        for name, part in slices.items():
            weight = part.values["weight"]
            self.parameters[name].ds_tensor.data.narrow(0, 0, len(weight)).copy_(weight)
        zero.checkpoint_event_epilogue()  # and gather them again

    def close(self) -> None:
        from deepspeed.runtime.zero import parameter_offload

        self.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # DeepSpeed 0.19 would keep the student there for good
        del self.engine, self.student, self.parameters
        gc.collect()  # hooks and modules refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def join_world(use_gpu: bool, timeout_s: int) -> World:
    """The world of this process: Ray's or the launcher's (RANK, WORLD_SIZE), or one process; joined at the first call.

    Raises:
        UserError: the processes do not find each other.
    """
    device = torch.device("cpu")
    if use_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, size = "nccl" if use_gpu else "gloo", int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ["RANK"]) if size > 1 else 0
        store = meet(backend, timeout_s) if size > 1 else dist.HashStore()
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World.current(device)


def prepare_deepspeed(use_gpu: bool, timeout_s: float = 600) -> None:
    """Let DeepSpeed adopt the process group; on CPU without its shared-memory op, which needs a C++ compiler.

    The groups that it makes itself get `timeout_s` too: torch would grant them half an hour.
    """
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, timeout=timeout)
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=timeout)


class ZeroPlacement:
    """The base goes straight into ZeRO-3's shards; under stages 1 and 2 it stays whole."""

    by_parts = False

    def __init__(self, ds_config: dict[str, Any], device: torch.device | str = "cpu"):
        self.ds_config, self.device = ds_config, torch.device(device)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Under ZeRO-3, `from_pretrained` inside puts each weight straight into its shards."""
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        # transformers looks for this object through a weak reference, so it has to be held while loading.
        marker = HfDeepSpeedConfig(self.ds_config)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del marker

    def place(self, part: Part) -> None:
        part.fill()
        if self.ds_config["zero_optimization"]["stage"] == 3:
            import deepspeed

            deepspeed.zero.Init(module=torch.nn.ParameterList(part.parameters()), config_dict_or_path=self.ds_config)
