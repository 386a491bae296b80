"""A rank's slices of the trained tensors and their Adam moments, as views into what its optimizer updates."""

from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
KINDS = ("weight", *MOMENTS)


@dataclass(frozen=True)
class Slice:
    """A rank's part of one trained tensor: elements [start, stop) of it, flattened, and their Adam moments."""

    start: int
    values: dict[str, Tensor]  # kind -> [stop - start], views of what the optimizer works on

    @property
    def stop(self) -> int:
        return self.start + len(self.values["weight"])


def adam_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor; before its first step what that step would begin with."""
    state = optimizer.state[tensor]
    if not state:
        state.update(step=torch.tensor(0.0), **{moment: torch.zeros_like(tensor.data) for moment in MOMENTS})
    return state


def slice_of(optimizer: torch.optim.Optimizer, tensor: Tensor, offset: int, length: int, start: int) -> Slice:
    """`length` elements from `offset` of a tensor that `optimizer` updates, as the slice from `start` on."""
    state = adam_state(optimizer, tensor)
    whole = {"weight": tensor.data, **{moment: state[moment] for moment in MOMENTS}}
    return Slice(start, {kind: value.view(-1).narrow(0, offset, length) for kind, value in whole.items()})


def put(slices: dict[str, Slice], values: dict[str, dict[str, Tensor]]) -> None:
    """Copy `values` into the slices; kinds that are not there stay as they are."""
    for name, part in slices.items():
        for kind, value in values[name].items():
            part.values[kind].copy_(value)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(step)
