"""Checkpoints: trained weights, Adam moments and RNG as slices of every rank, complete (manifest, by rename) or absent.

A slice is a range of a tensor's flattened elements. Which rank wrote it does not matter to a reader: another number of
ranks, or another ZeRO stage, reads other ranges of the same tensors.
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.run_folder import CHECKPOINT_FORMAT, read_json, write_json
from flipkd_dist.slices import KINDS, Slice
from flipkd_dist.together import StorageFailed, together
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{6,}")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    @property
    def merit(self) -> tuple[float, int]:
        """The greater the better: the validation score, then the step; the step alone where nothing was validated."""
        return (self.manifest["score"] or 0.0, self.step)

    def read(self, wanted: dict[str, tuple[int, int]], kinds: tuple[str, ...] = KINDS) -> dict[str, dict[str, Tensor]]:
        """Elements [start, stop) of each wanted tensor, by parameter name and kind, fp32 and flat.

        Opens only files that hold some of them.

        Raises:
            RuntimeError: the tensors are not those of this student.
        """
        if missing := wanted.keys() - self.manifest["shapes"].keys():
            raise RuntimeError(f"{self.path}: {min(missing)} is missing: the checkpoint belongs to another student")
        values = {name: {kind: torch.empty(stop - start) for kind in kinds} for name, (start, stop) in wanted.items()}
        filled = dict.fromkeys(wanted, 0)
        for file, entry in self.manifest["files"].items():
            common = {
                name: (max(wanted[name][0], start), min(wanted[name][1], stop))
                for name, (start, stop) in entry["slices"].items()
                if name in wanted
            }
            common = {name: (first, last) for name, (first, last) in common.items() if first < last}
            if not common:
                continue
            with safe_open(self.path / file, framework="pt") as tensors:
                for name, (first, last) in common.items():
                    stored, start = entry["slices"][name][0], wanted[name][0]
                    filled[name] += last - first
                    for kind in kinds:
                        part = tensors.get_slice(f"{kind}/{name}")[first - stored : last - stored]
                        values[name][kind][first - start : last - start] = part
        for name, (start, stop) in wanted.items():
            if filled[name] != stop - start:
                raise RuntimeError(f"{self.path}: {name} is not whole: remove this checkpoint")
        return values

    def weights(self) -> dict[str, Tensor]:
        """Every trained tensor whole, by parameter name."""
        shapes = {name: torch.Size(shape) for name, shape in self.manifest["shapes"].items()}
        found = self.read({name: (0, shape.numel()) for name, shape in shapes.items()}, ("weight",))
        return {name: found[name]["weight"].view(shape) for name, shape in shapes.items()}

    def random_state(self, rank: int, kind: str) -> Tensor | None:
        """The state of the generator `kind` (`cpu`, `cuda`) of a rank, uint8."""
        with safe_open(self.path / file_of_rank(rank), framework="pt") as tensors:
            name = f"random/{kind}"
            return tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118, no dictionary

    def flaw(self) -> str | None:
        """Why the checkpoint cannot be used, or None."""
        if not isinstance(self.manifest, dict) or self.manifest.get("format_version") != CHECKPOINT_FORMAT:
            return f"{MANIFEST} is damaged or of another version"
        for file, entry in self.manifest["files"].items():
            size = (self.path / file).stat().st_size if (self.path / file).is_file() else 0
            if size != entry["bytes"]:
                return f"{file} has {size} of {entry['bytes']} bytes"
            try:
                with safe_open(self.path / file, framework="pt"):
                    pass
            except (OSError, SafetensorError):
                return f"{file} is damaged"
        return None


def file_of_rank(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def save_checkpoint(
    folder: Path, step: int, slices: dict[str, Slice], random: dict[str, Tensor], manifest: dict[str, Any], world: World
) -> Checkpoint:
    """Write `folder/step-000100/`, each rank its own file; a kill leaves it whole or not there. Every rank calls it.

    Args:
        slices: this rank's, by parameter name.
        random: states of this rank's generators, by kind.
        manifest: what rank 0 adds to the manifest; `shapes` of every tensor by name among it.
    Raises:
        StoppedOnRequest: a rank's disk is full or broken, and an older checkpoint is complete.
        UserError: the same, and there is none.
        RuntimeError: rank 0 does not see another rank's file.
    """
    target, draft = folder / f"step-{step:06d}", folder / f".step-{step:06d}.tmp"
    file = draft / file_of_rank(world.rank)
    tensors = {
        f"{kind}/{name}": value.detach().float().cpu().contiguous()
        for name, part in slices.items()
        for kind, value in part.values.items()
    }
    ranges = {name: [part.start, part.stop] for name, part in slices.items()}
    manifest = {"format_version": CHECKPOINT_FORMAT, "step": step, **manifest}

    def begin() -> None:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)

    def write() -> dict[str, Any]:
        save_file(tensors | {f"random/{kind}": state for kind, state in random.items()}, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())
        return {"bytes": file.stat().st_size, "slices": ranges}

    def finish() -> None:
        if world.is_main:
            _finish(draft, target, manifest)

    try:
        together(world, draft, begin)
        entries = together(world, draft, write)
        manifest["files"] = {file_of_rank(rank): entry for rank, entry in enumerate(entries)}
        together(world, draft, finish)  # no rank may end the job before the checkpoint is there
    except StorageFailed as failed:
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        nbytes = sum(value.nbytes for value in tensors.values())
        raise stop_without(failed, world, folder, f"step {step}'s checkpoint", nbytes) from failed
    return Checkpoint(target, manifest)


def _finish(draft: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Every rank's file is there: give the checkpoint its manifest and its name."""
    if unseen := [name for name in manifest["files"] if not (draft / name).is_file()]:
        raise RuntimeError(
            f"{draft}: {unseen[0]} of another worker is not seen here: output_dir must lie on storage that every "
            "worker reaches"
        )
    write_json(draft / MANIFEST, manifest)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)


def stored(world: World, folder: Path, where: Path, what: str, work: Callable[[], Any]) -> None:
    """Let every rank do its part of writing `what`; a disk that refuses one ends the training on all of them alike.

    Args:
        folder: that of the checkpoints.
        where: what is being written.
    Raises:
        StoppedOnRequest, UserError: as `stop_without`.
    """
    try:
        together(world, where, work)
    except StorageFailed as failed:
        raise stop_without(failed, world, folder, what) from failed


def stop_without(failed: StorageFailed, world: World, folder: Path, what: str, nbytes: int = 0) -> Exception:
    """The end of a training whose storage has failed: a checkpoint is complete, or else the user has to act first.

    Args:
        folder: that of the checkpoints.
        what: was not written, `step 20's checkpoint`.
        nbytes: how much room this rank needs for it.
    """
    complete = [found.step for found in checkpoints(folder)] if world.is_main and folder.is_dir() else []
    told = world.gather_object((nbytes, complete[-1] if complete else None))
    step, remedy = told[0][1], "look at the storage"
    if failed.is_full:
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        more = math.ceil((1.05 * sum(size for size, _ in told) - free) / 2**20 + 1)  # file systems have needs too
        remedy = f"free {more:,} MB" if nbytes and more > 0 else "make room"
    kept = "no checkpoint is complete yet" if step is None else f"step {step}'s checkpoint is complete"
    line = f"{failed}: {what} was not written, {kept}: {remedy} and run the same command again"
    return UserError(line) if step is None else StoppedOnRequest(line)


def amend_manifest(found: Checkpoint, values: dict[str, Any]) -> None:
    """Add what is known only after the checkpoint was written; rank 0 calls it."""
    write_json(found.path / MANIFEST, {**found.manifest, **values})


def _all(folder: Path) -> list[Checkpoint]:
    """Whole or not, oldest first."""
    paths = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return [Checkpoint(path, read_json(path / MANIFEST)) for path in sorted(paths, key=lambda path: int(path.name[5:]))]


def checkpoints(folder: Path) -> list[Checkpoint]:
    """All that are whole, oldest first."""
    return [found for found in _all(folder) if found.flaw() is None]


def remove_drafts(folder: Path) -> None:
    """What kills have left of checkpoints that were never finished."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The one to resume from; a newer one that is damaged is passed over with a warning."""
    for found in reversed(_all(folder)):
        if (flaw := found.flaw()) is None:
            return found
        logger.warning("warning: %s is not resumed from: %s", found.path, flaw)
    return None


def best_checkpoints(folder: Path, count: int) -> list[Checkpoint]:
    """The `count` best on validation, or all there are: the best one first, the later one of equals."""
    candidates = [found for found in checkpoints(folder) if found.manifest["probes"]]
    return sorted(candidates, key=lambda found: found.merit, reverse=True)[:count]


def best_checkpoint(folder: Path) -> Checkpoint:
    """The best validation score, the later one of equals; the last one where nothing was validated."""
    [best] = best_checkpoints(folder, 1)
    return best


def keep_checkpoints(folder: Path, count: int) -> None:
    """Remove all but the newest `count` and the `count` best of those that were validated."""
    whole = checkpoints(folder)
    scored = sorted((c for c in whole if c.manifest["score"] is not None), key=lambda c: c.merit)
    kept = {found.path for found in (*whole[-count:], *scored[-count:])}
    for found in whole:
        if found.path not in kept:
            shutil.rmtree(found.path)
