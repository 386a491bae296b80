"""What follows the last layer's attention is computed at the positions that are read alone."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


def behind_attention(model: nn.Module, encoder_name: str) -> list[nn.Module]:
    """Modules behind the last layer's attention that take each position by itself; a mixture of experts does not.

    Args:
        encoder_name: of the last layer's module whose LoRA-A is the read-out, which needs every token.
    """
    layers, number = re.match(r"(.*)\.(\d+)\.", encoder_name).groups()
    if int(number) < len(model.get_submodule(layers)) - 1:
        return []  # the read-out is of an earlier layer: those behind it read every position
    layer, modules, found = f"{layers}.{number}.", dict(model.named_modules()), []
    for name in (f"{layer}self_attn.o_proj", f"{layer}mlp"):
        holders = [part for part in modules[name].modules() if part._parameters] if name in modules else []
        is_encoder = encoder_name == name or encoder_name.startswith(f"{name}.")
        if holders and not is_encoder and all(isinstance(part, nn.Linear) for part in holders):
            found.append(modules[name])
    return found


@contextmanager
def narrowed(modules: list[nn.Module], positions: Tensor) -> Iterator[None]:
    """Inside, `modules` map [R, L, h] at `positions` [m] of the flattened [R * L] alone; elsewhere they give zeros.

    No position may stand twice: each would have the whole gradient.
    """
    shape = None

    def narrow(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal shape
        shape = inputs[0].shape[:2]
        return (inputs[0].flatten(0, 1)[positions].unsqueeze(0),)

    def widen(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        rows = output.new_zeros(shape.numel(), output.shape[-1])
        return rows.index_copy(0, positions, output[0]).unflatten(0, shape)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(narrow))
            hooks.enter_context(module.register_forward_hook(widen))
        yield
