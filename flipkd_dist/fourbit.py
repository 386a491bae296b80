"""Four-bit weights: packing, unpacking, and the frozen linear layer that multiplies with them (QLoRA).

The only module that imports bitsandbytes, inside the functions that need it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FourBit:
    """How weights are packed."""

    quant_type: str = "nf4"  # or fp4
    double_quant: bool = True  # block scales in 8 bits: 4.13 bits a weight, not 4.5
    storage: torch.dtype = torch.uint8  # of the tensor that holds the packed bytes


def quantise(
    weight: Tensor, quant_type: str = "nf4", double_quant: bool = True, storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Any]:
    """Pack a floating tensor into blocks of 64 four-bit numbers, on its device.

    The numbers follow from `weight` as it is, so hand it over in the precision of the files.
    It is packed as one vector: on CPUs bitsandbytes 0.50 unpacks a matrix wrongly, by a fifth of its norm, where a row
    is no multiple of a block.

    Returns:
        the packed bytes, ceil(numel / 2) of them as a column of `storage`, and the state that unpacks them.
    Source: Dettmers et al. 2023, QLoRA, section 3.
    """
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(
        weight.flatten(), quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    )


def dequantised(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The values that `packed` stands for as a vector [numel], rounded to `dtype`."""
    from bitsandbytes.functional import dequantize_4bit

    if state.absmax.device != packed.device:
        state.to(packed.device)
    state.dtype = dtype  # nothing else depends on it
    return dequantize_4bit(packed, state).flatten()


def round_trip(
    weight: Tensor, quant_type: str = "nf4", double_quant: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values with which a four-bit layer multiplies instead of `weight`, in its shape."""
    return dequantised(*quantise(weight, quant_type, double_quant), dtype).view(weight.shape)


class _Product(torch.autograd.Function):
    """x W^T with W unpacked anew in the backward.

    The layer is kept and not a view of its bytes: ZeRO-3 frees the gathered bytes after the forward and gathers them
    again before the backward, and a view would keep those of every layer alive in between.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, layer: "Linear4bit") -> Tensor:
        ctx.layer = layer
        return inputs @ layer.values(inputs.dtype).t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.values(gradient.dtype), None


class Linear4bit(nn.Linear):
    """A frozen linear layer on packed bytes; its gradient reaches the inputs and nothing else.

    `weight` holds the packed bytes. The state that unpacks them is a plain attribute, because engines cast buffers and
    its scales must stay as they are.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, form: FourBit):
        """The layer is empty until `pack`."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the whole matrix
        self.in_features, self.out_features, self.form = in_features, out_features, form
        self.register_parameter("bias", bias)
        self.clear()

    def clear(self) -> None:
        """Drop the weight."""
        self.weight, self.state = nn.Parameter(torch.empty(0, dtype=self.form.storage), requires_grad=False), None

    def pack(self, weight: Tensor) -> None:
        """Quantise `weight` [out_features, in_features] on its device and hold that."""
        packed, self.state = quantise(weight, self.form.quant_type, self.form.double_quant, self.form.storage)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out_features, in_features] of this layer's products."""
        return dequantised(self.weight, self.state, dtype).view(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Product.apply(inputs, self)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.form.quant_type}"
