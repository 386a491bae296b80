"""Candidates for the adapter: LoRA weights of a validated step, complete (manifest, by rename) or absent."""

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flipkd_dist.adapter import WEIGHTS, peft_name
from flipkd_dist.run_folder import read_json, write_json

MANIFEST = "manifest.json"


def save_checkpoint(folder: Path, step: int, state: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Write `folder/step-000100/`; a kill leaves it whole or not there."""
    target = folder / f"step-{step:06d}"
    draft = folder / f".step-{step:06d}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({peft_name(name): value.contiguous() for name, value in state.items()}, draft / WEIGHTS)
    write_json(draft / MANIFEST, {"step": step, **manifest})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    return target


def checkpoints(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Complete checkpoints with their manifests, oldest first."""
    found = [(path, read_json(path / MANIFEST)) for path in folder.glob("step-*")]
    complete = [(path, manifest) for path, manifest in found if manifest and (path / WEIGHTS).exists()]
    return sorted(complete, key=lambda entry: entry[1]["step"])


def best_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The best validation score, the later one of equals; the last checkpoint where nothing was validated."""
    return max(checkpoints(folder), key=lambda found: (found[1]["score"] or 0.0, found[1]["step"]))


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` and the best."""
    best, _ = best_checkpoint(folder)
    for path, _ in checkpoints(folder)[:-count]:
        if path != best:
            shutil.rmtree(path)
