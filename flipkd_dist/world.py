"""The processes of a run, and the few collectives the rest of the package uses; rank 0 of 1 needs no process group."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Equal blocks of every rank, concatenated; the backward sums every rank's gradient of a block at its owner."""

    @staticmethod
    def forward(ctx, block: Tensor, sending: Callable[[], AbstractContextManager]) -> Tensor:
        ctx.sending = sending
        blocks = block.new_empty(dist.get_world_size() * len(block), *block.shape[1:])
        dist.all_gather(list(blocks.chunk(dist.get_world_size())), block.contiguous())  # views: no copy follows
        return blocks

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        with ctx.sending():
            own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
            dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own, None


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> "World":
        """The world of the process group that is initialised, if one is."""
        device = torch.device(device)
        return cls(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else cls(device=device)

    def random_state(self) -> dict[str, Tensor]:
        """States of the generators that dropout draws from, uint8 by kind."""
        states = {"cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def restore_random(self, states: dict[str, Tensor]) -> None:
        """Draw again what was drawn after `random_state`."""
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, in float64 and without gradient; every rank must call it."""
        total = values.detach().double().clone()  # all_reduce writes into its argument
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; every rank must call it."""
        return self.each_any([flag])[0]

    def each_any(self, flags: list[bool]) -> list[bool]:
        """Whether each flag holds on any rank; every rank must call it, with as many."""
        return [
            held > 0 for held in self.sum(torch.tensor([float(flag) for flag in flags], device=self.device)).tolist()
        ]

    def gather_rows(
        self, rows: Tensor, rows_per_rank: list[int], sending: Callable[[], AbstractContextManager] = nullcontext
    ) -> Tensor:
        """Concatenate every rank's rows, with gradient: [m, d] -> [sum(rows_per_rank), d].

        The backward sums over ranks, so a gradient that is averaged over ranks afterwards (as DeepSpeed does) is
        exact once each rank's loss is multiplied by the number of ranks. Ranks may have unequal numbers of rows,
        zero included.

        Args:
            sending: makes the context in which the collectives run, forward and backward (a clock's).
        """
        if self.size == 1:
            return rows
        most = max(rows_per_rank)
        with sending():
            padded = torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])])
            parts = _AllGather.apply(padded, sending).chunk(self.size)
            return torch.cat([part[:count] for part, count in zip(parts, rows_per_rank, strict=True)])

    def gather_object(self, value):
        """Every rank's `value` as a list, on every rank (small host objects only)."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
