"""A model's tensors in its safetensors files, read one at a time by name."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line

INDEX = "model.safetensors.index.json"


class Weights(Protocol):
    """Where a model's tensors come from, under the names that its files have."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""

    def rows(self, name: str, rows: list[int]) -> Tensor:
        """[len(rows), ...] of it, without reading the rest."""


class WeightFiles:
    """The safetensors files of a folder: one, those of the index, or all there are."""

    def __init__(self, folder: Path, name: str | None = None):
        """`name` is what student.model_name_or_path says, for the error."""
        self.name = name or str(folder)
        try:
            if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
                index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
                self.files = {name: folder / file for name, file in index["weight_map"].items()}
            else:
                whole = folder / "model.safetensors"
                paths = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
                self.files = {name: path for path in paths for name in _names(path)}
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise self._damaged(error) from None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> Tensor:
        try:
            # The file is closed again at once: pages of an open map count as memory of the process.
            with safe_open(self.files[name], framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from None

    def rows(self, name: str, rows: list[int]) -> Tensor:
        try:
            with safe_open(self.files[name], framework="pt") as tensors:
                matrix = tensors.get_slice(name)
                return torch.stack([matrix[row : row + 1][0] for row in rows])
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"student.model_name_or_path: {self.name} cannot be loaded ({one_line(error)}): get the model again"
        )


class Replaced:
    """Weights some of which are others now, in memory."""

    def __init__(self, weights: Weights, state: dict[str, Tensor]):
        self.weights, self.state = weights, state

    def __contains__(self, name: str) -> bool:
        return name in self.state or name in self.weights

    def read(self, name: str) -> Tensor:
        return self.state[name] if name in self.state else self.weights.read(name)

    def rows(self, name: str, rows: list[int]) -> Tensor:
        return self.state[name][rows] if name in self.state else self.weights.rows(name, rows)


def _names(path: Path) -> Iterable[str]:
    with safe_open(path, framework="pt") as tensors:
        return list(tensors.keys())


def stored_name(weights: Weights, names: Iterable[str], prefix: str) -> str | None:
    """The first of a tensor's names that `weights` has, as it is or without the body's `prefix` (GPT-2)."""
    names = list(names)
    return next((n for n in [*names, *(n.removeprefix(f"{prefix}.") for n in names)] if n in weights), None)
