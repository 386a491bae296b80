"""A LoRA adapter merged into its base, from safetensors files to safetensors files, one tensor in memory at a time.

Shapes: W [out, in], A [r, in], B [out, r]; Conv1D (GPT-2) stores W as [in, out].
"""

import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from flipkd_dist.adapter import WEIGHTS
from flipkd_dist.base_loader import decoder_layers
from flipkd_dist.errors import UserError
from flipkd_dist.fourbit import FourBit, round_trip
from flipkd_dist.model_files import one_line
from flipkd_dist.run_folder import read_json
from flipkd_dist.shard_files import StoredTensor, stored_tensors, write_shards
from flipkd_dist.weight_files import stored_name

LORA_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Variants of LoRA whose update is not (alpha / r) B A; `flipkd train` makes none of them.
VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True)
class LoraUpdate:
    """(alpha / r) B A of one weight; `transposed` where the weight is stored [in, out]."""

    down: str  # A's name in the adapter's file
    up: str  # B's
    scaling: float
    transposed: bool


def plan_merge(config, base: Path, adapter: Path, form: FourBit | None = None) -> "Merge":
    """Read headers and names, and find out what becomes of each tensor.

    Args:
        config: the base's; its modules are built without weights, to tell what is stored transposed or packed.
        form: how the adapter's base was packed, to merge into what its layers multiplied with; None: the original.
    Raises:
        UserError: a damaged base, or an adapter that is no plain LoRA of its linear layers.
    """
    stored = {one.name: one for one in stored_tensors(base)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    updates = lora_updates(model, stored, adapter)
    packed = packed_weights(model, stored, base) if form else set()
    return Merge(list(stored.values()), updates, adapter, packed, form)


def packed_weights(model: nn.Module, weights: dict[str, StoredTensor], base: Path) -> set[str]:
    """The names of the weights that 4-bit training packs: those of linear layers inside decoder layers."""
    inside = {module for layer in decoder_layers(model, str(base)) for module in layer.modules()}
    linear = [path for path, module in model.named_modules() if module in inside and isinstance(module, nn.Linear)]
    found = {path: stored_name(weights, [f"{path}.weight"], model.base_model_prefix) for path in linear}
    if None in found.values():
        missing = min(path for path, name in found.items() if name is None)
        raise UserError(f"{base}: its files hold no {missing}.weight: save the base again with save_pretrained")
    return set(found.values())


def lora_updates(model: nn.Module, weights: dict[str, StoredTensor], adapter: Path) -> dict[str, LoraUpdate]:
    """The update of each weight that has LoRA, by the weight's name in the base's files.

    Raises:
        UserError: an adapter that is no plain LoRA of these linear layers.
    """
    lora = read_json(adapter / "adapter_config.json")
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        scaling = lora["lora_alpha"] / lora["r"]
    except Exception as error:  # safetensors has errors of its own
        raise UserError(f"{adapter}: no readable LoRA adapter ({one_line(error)}): name a complete one") from None
    variant = next((key for key in VARIANTS if lora.get(key)), None)
    if variant or lora.get("bias", "none") != "none":
        raise UserError(f"{adapter}: {variant or 'bias'} is set, only plain LoRA is merged: train without it")
    updates = {}
    for name in shapes:
        match = LORA_NAME.fullmatch(name)
        if not match or name.replace(".lora_A.", ".lora_B.") not in shapes:
            raise UserError(f"{adapter / WEIGHTS}: {name} belongs to no plain LoRA of a linear layer: cannot be merged")
        if match.group(2) == "A":
            up = name.replace(".lora_A.", ".lora_B.")
            module, weight = _target(model, match.group(1), weights, adapter)
            transposed = isinstance(module, Conv1D)
            expected = (shapes[up][0], shapes[name][1])
            if weight.shape != (expected[::-1] if transposed else expected):
                raise UserError(
                    f"{adapter / WEIGHTS}: {name} does not fit {weight.name} {list(weight.shape)}: name its own base"
                )
            updates[weight.name] = LoraUpdate(name, up, scaling, transposed)
    return updates


def _target(model: nn.Module, name: str, weights: dict[str, StoredTensor], adapter: Path):
    """The module `name` and its weight in the files."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"{adapter}: its base has no module {name}: name the base that it was trained on") from None
    if not isinstance(module, nn.Linear | Conv1D) or module is model.get_output_embeddings():
        raise UserError(f"{adapter}: LoRA on {name} ({type(module).__name__}) cannot be merged: leave it as an adapter")
    stored = stored_name(weights, [f"{name}.weight"], model.base_model_prefix)
    if stored:
        return module, weights[stored]
    raise UserError(f"{adapter}: its base's files hold no {name}.weight: save the base again with save_pretrained")


class Merge:
    """Which tensors change, and to what; everything else is copied byte by byte."""

    def __init__(
        self,
        stored: list[StoredTensor],
        updates: dict[str, LoraUpdate],
        adapter: Path,
        packed: Set[str] = frozenset(),
        form: FourBit | None = None,
    ):
        """`packed` names the weights that become the values of their 4-bit `form`, with or without LoRA."""
        self.stored, self.updates, self.adapter, self.packed, self.form = stored, updates, adapter, packed, form
        self.nbytes = sum(one.nbytes for one in stored)

    def write(self, folder: Path, max_shard_size: int) -> None:
        """Shards of at most `max_shard_size` bytes of tensors, and their index."""
        write_shards(folder, self.stored, self.value, max_shard_size)

    def value(self, stored: StoredTensor) -> Tensor | None:
        """The merged weight in the type of the base's file, computed in fp32; None where the file's bytes stay."""
        update, packed = self.updates.get(stored.name), stored.name in self.packed
        if update is None and not packed:
            return None
        with safe_open(stored.path, framework="pt") as file:
            weight = file.get_tensor(stored.name)
        # Packed in the precision of the files, as in training.
        value = round_trip(weight, self.form.quant_type, self.form.double_quant) if packed else weight.float()
        return (self._updated(value, update) if update else value).to(weight.dtype)

    def _updated(self, weight: Tensor, update: LoraUpdate) -> Tensor:
        with safe_open(self.adapter / WEIGHTS, framework="pt") as file:
            down, up = file.get_tensor(update.down).float(), file.get_tensor(update.up).float()
        if update.transposed:
            down, up = up.T, down.T  # (B A)' = A' B'
        return weight.addmm_(up, down, alpha=update.scaling)
