"""A LoRA adapter merged into its base, from safetensors files to safetensors files, one tensor in memory at a time.

The output is planned from the headers of the base's files and written front to back, so that its shards may be larger
than the memory. Names, shapes and types are those of the base's files. Shapes: W [out, in], A [r, in], B [out, r].
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from flipkd_dist.adapter import WEIGHTS
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import check_files, one_line
from flipkd_dist.run_folder import read_json, write_json

KEY = "student.model_name_or_path"
CHUNK = 2**24  # bytes copied at once
INDEX = "model.safetensors.index.json"
LORA_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Variants of LoRA whose update is not (alpha / r) B A; `flipkd train` makes none of them.
VARIANTS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str
    path: Path
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    start: int  # byte of the file
    nbytes: int

    @property
    def itemsize(self) -> int:
        return self.nbytes // max(1, prod(self.shape))


@dataclass(frozen=True)
class LoraUpdate:
    """(alpha / r) B A of one weight; `transposed` where the weight is stored [in, out]."""

    down: str  # A's name in the adapter's file
    up: str  # B's
    scaling: float
    transposed: bool


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """What a model's safetensors files hold, read from their headers.

    Raises:
        UserError: a file is missing or damaged.
    """
    check_files(folder, KEY)
    single, index = folder / "model.safetensors", read_json(folder / INDEX)
    if single.is_file():  # transformers prefers it to an index
        paths = [single]
    elif index:
        paths = sorted({folder / name for name in index["weight_map"].values()})
    else:
        raise UserError(f"{KEY}: {folder} has neither model.safetensors nor {INDEX}: save it with save_pretrained")
    found = []
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            start = 8 + length + first
            found.append(StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), start, last - first))
    return found


def plan_merge(config, base: Path, adapter: Path) -> "Merge":
    """Read headers and names, and find out what becomes of each tensor.

    Args:
        config: the base's; its modules are built without weights, to tell what is stored transposed.
    Raises:
        UserError: a damaged base, or an adapter that is no plain LoRA of its linear layers.
    """
    stored = {one.name: one for one in stored_tensors(base)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return Merge(list(stored.values()), lora_updates(model, stored, adapter), adapter)


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
    """The module `name` and its weight in the files, which may leave out the body's prefix (GPT-2)."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"{adapter}: its base has no module {name}: name the base that it was trained on") from None
    if not isinstance(module, nn.Linear | Conv1D) or module is model.get_output_embeddings():
        raise UserError(f"{adapter}: LoRA on {name} ({type(module).__name__}) cannot be merged: leave it as an adapter")
    for prefix in ("", f"{model.base_model_prefix}."):
        stored = weights.get(f"{name}.weight".removeprefix(prefix))
        if stored:
            return module, stored
    raise UserError(f"{adapter}: its base's files hold no {name}.weight: save the base again with save_pretrained")


class Merge:
    """What is written where, and the values of the tensors that change; everything else is copied byte by byte."""

    def __init__(self, stored: list[StoredTensor], updates: dict[str, LoraUpdate], adapter: Path):
        self.stored, self.updates, self.adapter = stored, updates, adapter
        self.nbytes = sum(one.nbytes for one in stored)

    def value(self, stored: StoredTensor) -> Tensor:
        """The merged weight in the type of the base's file; computed in fp32."""
        with safe_open(stored.path, framework="pt") as file:
            weight = file.get_tensor(stored.name)
        return self._updated(weight, stored.name).to(weight.dtype)

    def _updated(self, weight: Tensor, name: str) -> Tensor:
        if name not in self.updates:
            return weight
        update = self.updates[name]
        with safe_open(self.adapter / WEIGHTS, framework="pt") as file:
            down, up = file.get_tensor(update.down).float(), file.get_tensor(update.up).float()
        if update.transposed:
            down, up = up.T, down.T  # (B A)' = A' B'
        return weight.float().addmm_(up, down, alpha=update.scaling)

    def changes(self, name: str) -> bool:
        return name in self.updates

    def write(self, folder: Path, max_shard_size: int) -> None:
        """Shards of at most `max_shard_size` bytes of tensors (one larger tensor fills a shard alone), and the index.

        Source of the format: https://huggingface.co/docs/safetensors, section Format.
        """
        shards = plan_shards(self.stored, max_shard_size)
        total, weight_map = len(shards), {}
        with tqdm(total=self.nbytes, desc="merge", unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for number, shard in enumerate(shards, 1):
                name = "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"
                self._write_shard(folder / name, shard, bar.update)
                weight_map |= {stored.name: name for stored in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map})

    def _write_shard(self, path: Path, shard: list[StoredTensor], written: Callable[[int], object]) -> None:
        # Wide types first: a reader views the bytes as they lie, and they must be aligned.
        shard = sorted(shard, key=lambda one: -one.itemsize)
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for one in shard:
            header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [at, at + one.nbytes]}
            at += one.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for one in shard:
                if self.changes(one.name):
                    file.write(self.value(one).contiguous().view(torch.uint8).numpy())
                else:
                    _copy(one, file)
                written(one.nbytes)
            file.flush()
            os.fsync(file.fileno())


def plan_shards(stored: list[StoredTensor], max_shard_size: int) -> list[list[StoredTensor]]:
    """The tensors in their order, divided where the next one would exceed `max_shard_size` bytes."""
    shards, size = [[]], 0
    for one in stored:
        if shards[-1] and size + one.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.nbytes
    return shards


def _copy(stored: StoredTensor, target) -> None:
    left = stored.nbytes
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        while left:
            part = file.read(min(CHUNK, left))
            if not part:
                raise UserError(f"{stored.path}: ends inside {stored.name}: get the base again")
            target.write(part)
            left -= len(part)
