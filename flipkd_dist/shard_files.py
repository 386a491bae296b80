"""A model's safetensors files in, shards of any size out: planned from headers and written front to back.

So a shard may be larger than the memory. Names, shapes and types stay those of the files that are read.
Source of the format: https://huggingface.co/docs/safetensors, section Format.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import check_files
from flipkd_dist.run_folder import read_json, write_json

KEY = "student.model_name_or_path"
CHUNK = 2**24  # bytes copied at once
INDEX = "model.safetensors.index.json"


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


def write_shards(
    folder: Path, stored: list[StoredTensor], new_value: Callable[[StoredTensor], Tensor | None], max_shard_size: int
) -> None:
    """Shards of at most `max_shard_size` bytes of tensors (a larger tensor fills one alone), and their index.

    Args:
        new_value: what stands in place of a tensor, in its shape and type; None: its bytes are copied.
    """
    shards, nbytes, weight_map = plan_shards(stored, max_shard_size), sum(one.nbytes for one in stored), {}
    with tqdm(total=nbytes, desc="merge", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write_shard(folder / name, shard, new_value, bar.update)
            weight_map |= {one.name: name for one in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})


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


def _write_shard(
    path: Path,
    shard: list[StoredTensor],
    new_value: Callable[[StoredTensor], Tensor | None],
    written: Callable[[int], object],
) -> None:
    # Wide types first: readers view the bytes as they lie, and they should be aligned.
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
            value = new_value(one)
            if value is None:
                _copy(one, file)
            else:
                file.write(value.contiguous().view(torch.uint8).numpy())
            written(one.nbytes)
        file.flush()
        os.fsync(file.fileno())


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
