"""Vectors of a corpus in a folder: for the next search, and for this one when it was killed meanwhile."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flipkd_dist.durable import one_at_a_time, room_in
from flipkd_dist.errors import UserError
from flipkd_dist.run_folder import read_json, write_json

VECTORS, STATE = "documents.npy", "documents.json"


def kept_vectors(
    folder: Path, facts: dict[str, Any], shape: tuple[int, int], parts: Callable[[int], Iterator[np.ndarray]]
) -> tuple[np.ndarray, int]:
    """The array float32 of `shape` on disk, complete, and how many of its rows were there before.

    Args:
        facts: all that the vectors depend on, as JSON has it.
        parts: the vectors from a row on, some rows at a time; each part stays once it is there.
    Raises:
        UserError: the folder has other vectors, or is no such folder.
    """
    with one_at_a_time(folder), room_in(folder):
        path, size = folder / VECTORS, {"shape": list(shape)}
        done = _rows(folder, facts | size)
        if not done:
            write_json(folder / STATE, {**facts, **size, "rows": 0})  # before the array, which is ours from then on
            vectors = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            with path.open("r+b") as file:  # a mapped file on a full disk ends the process
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        else:
            vectors = _opened(path, shape, "r+")
        row = done
        for part in parts(done):
            vectors[row : row + len(part)] = part
            vectors.flush()
            row += len(part)
            write_json(folder / STATE, {**facts, **size, "rows": row})
    return _opened(path, shape, "r"), done


def _rows(folder: Path, facts: dict[str, Any]) -> int:
    """How many rows are there.

    Raises:
        UserError: other vectors, or files that are not ours.
    """
    state, remedy = read_json(folder / STATE), "name another folder"
    if state is None:
        if (folder / VECTORS).exists() or (folder / STATE).exists():
            raise UserError(f"--vectors {folder}: {VECTORS} without a readable {STATE}: {remedy}")
        return 0
    others = sorted(name for name in facts if state.get(name) != facts[name])
    if others:
        raise UserError(f"--vectors {folder}: has the vectors of another search ({', '.join(others)}): {remedy}")
    return state["rows"]


def _opened(path: Path, shape: tuple[int, int], mode: str) -> np.ndarray:
    try:
        vectors = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError):
        vectors = None
    if vectors is None or vectors.shape != shape or vectors.dtype != np.float32:
        raise UserError(f"--vectors {path.parent}: {path.name} is damaged: remove the folder")
    return vectors
