"""The four-bit layer in one process, against a dense layer on the values that it stands for."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from flipkd_dist.fourbit import FourBit, Linear4bit, dequantised, quantise, round_trip

pytestmark = pytest.mark.parity
KINDS = [(quant_type, double_quant) for quant_type in ("nf4", "fp4") for double_quant in (True, False)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(form: FourBit, bias: bool = True) -> tuple[Linear4bit, nn.Linear]:
    """A four-bit layer, and the dense one on its values."""
    weight = random(40, 96) / 10
    dense, packed = nn.Linear(96, 40, bias), Linear4bit(96, 40, None, form)
    dense.weight.data = round_trip(weight, form.quant_type, form.double_quant)
    packed.bias = dense.bias
    packed.pack(weight)
    return packed, dense.requires_grad_(False)


@pytest.mark.parametrize("shape", [(48, 64), (48, 80), (7, 9)])
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_numbers_come_back_within_the_step_of_the_code(quant_type, double_quant, shape):
    """Rows that are no multiple of a block of 64 included."""
    weight = random(*shape)
    found = round_trip(weight, quant_type, double_quant)
    limit = 0.11 if quant_type == "nf4" else 0.15
    assert found.shape == weight.shape and 0.02 < (found - weight).norm() / weight.norm() < limit
    assert len(found.flatten()[:63].unique()) <= 16


def test_kinds_differ_and_double_quantisation_shrinks_the_scales():
    weight = random(256, 256)
    found = [round_trip(weight, *kind) for kind in KINDS]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(found) for b in found[:i])
    scales = [quantise(weight, "nf4", double_quant)[1].absmax for double_quant in (True, False)]
    assert [scale.element_size() for scale in scales] == [1, 4]


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_storage_changes_no_value(storage):
    weight = random(48, 80)
    packed, state = quantise(weight, storage=storage)
    assert packed.dtype == storage and packed.numel() * packed.element_size() == weight.numel() // 2
    assert torch.equal(dequantised(packed, state, torch.float32), round_trip(weight).flatten())


def test_values_are_those_of_the_files_precision_rounded_to_the_runs():
    weight = random(48, 80)
    assert torch.equal(round_trip(weight, dtype=torch.bfloat16), round_trip(weight).bfloat16())


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_input_gradients_are_those_of_the_dense_layer(quant_type, double_quant, bias):
    packed, dense = layers(FourBit(quant_type, double_quant), bias)
    results = []
    for layer in (packed, dense):
        inputs = random(2, 5, 96, seed=1).requires_grad_()
        outputs = layer(inputs)
        (outputs * random(2, 5, 40, seed=2)).sum().backward()
        results.append((outputs.detach(), inputs.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert packed.weight.grad is None and not packed.weight.requires_grad


def test_bf16_inputs_are_multiplied_in_bf16():
    packed, dense = layers(FourBit(), bias=False)
    inputs = random(5, 96).bfloat16().requires_grad_()
    outputs = packed(inputs)
    outputs.sum().backward()
    assert outputs.dtype == inputs.grad.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, dense.bfloat16()(inputs), rtol=1e-2, atol=1e-2)


def test_no_values_are_kept_for_the_backward():
    """Only the layer is: its bytes may be freed in between, and be there again before the backward."""
    packed, dense = layers(FourBit(), bias=False)
    inputs, kept = random(5, 96).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        outputs = packed(inputs)
    assert not kept
    data = packed.weight.data
    packed.weight.data = torch.empty(0, dtype=torch.uint8)
    packed.weight.data = data.clone()
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, dense.weight.sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    def __init__(self, projection):
        super().__init__()
        self.projection = projection

    def forward(self, inputs, recompute=False):
        return checkpoint(self.projection, inputs, use_reentrant=False) if recompute else self.projection(inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_lora_on_it_trains_as_on_the_dense_layer(training, recompute):
    """With dropout, which follows the seed, and with non-reentrant checkpointing."""
    results = []
    for layer in layers(FourBit()):
        torch.manual_seed(3)
        model = get_peft_model(
            Block(layer), LoraConfig(r=4, lora_dropout=0.3, target_modules=["projection"], init_lora_weights=False)
        ).train(training)
        inputs = random(2, 5, 96, seed=1).requires_grad_()
        outputs = model(inputs, recompute)
        outputs.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(gradients) == 2 and all(value.norm() > 0 for value in gradients.values())
        results.append([outputs.detach(), inputs.grad, *gradients.values()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
