"""`RUN/taught`: the fine-tuned teacher of a run; its manifest says what it was made from. Nothing heavy is imported."""

import logging
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.run_folder import read_json

logger = logging.getLogger("flipkd_dist")
MANIFEST = "flipkd.json"  # written last
READING = ("pooling", "prompt", "max_length")  # how the teacher reads a text, as the configuration says it


def taught_path(config: RunConfig) -> Path:
    return config.run_dir / "taught"


def checkpoints_path(config: RunConfig) -> Path:
    """Where an unfinished teaching goes on from; removed when it is complete."""
    return config.run_dir / "taught.checkpoints"


def reading(config: RunConfig) -> dict[str, Any]:
    return {key: getattr(config.teacher, key) for key in READING}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `flipkd teach` noted last; None where it did not get so far."""
    manifest = read_json(folder / MANIFEST)
    return (
        manifest if isinstance(manifest, dict) and {"base", "reading", "teach", "inputs"} <= manifest.keys() else None
    )


def taught_folder(config: RunConfig, *fingerprints: str) -> Path | None:
    """The folder to use in place of the teacher that the configuration names; None where none was taught.

    Args:
        fingerprints: of the teachers that the configuration names; a taught one has exactly one base.
    Raises:
        UserError: a teaching is unfinished, damaged, or of another base or other settings of `teacher`.
    """
    folder, checkpoints = taught_path(config), checkpoints_path(config)
    if not folder.exists():
        if checkpoints.exists():
            raise UserError(
                f"{checkpoints}: fine-tuning the teacher was begun and is not finished: go on with `flipkd teach`, "
                "or remove this folder to use the teacher as it is"
            )
        return None
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder}: {MANIFEST} is missing or damaged: remove this folder, then run `flipkd teach` again"
        )
    remedy = "run `flipkd teach` again, or remove this folder to use the teacher as it is"
    if [manifest["base"]] != list(fingerprints):
        raise UserError(f"{folder}: made from another teacher than teacher.model_name_or_path names now: {remedy}")
    for key, value in reading(config).items():
        if manifest["reading"].get(key) != value:
            before = manifest["reading"].get(key)
            raise UserError(f"{folder}: made with teacher.{key} = {before!r}, which is {value!r} now: {remedy}")
    return folder


def check_taught(config: RunConfig, fingerprint: str) -> None:
    """
    Raises:
        UserError: the taught teacher's files are not those that `flipkd teach` left.
    """
    folder = taught_path(config)
    if (read_manifest(folder) or {}).get("fingerprint") != fingerprint:
        raise UserError(
            f"{folder}: its files are not as `flipkd teach` left them: remove this folder, then run "
            "`flipkd teach` again"
        )


def announce(config: RunConfig) -> None:
    """Say that the run uses its taught teacher, and what of `teach` it was not made with."""
    folder = taught_path(config)
    logger.info("teacher: the fine-tuned one in %s", folder)
    made_with = (read_manifest(folder) or {}).get("teach", {})
    changed = [
        key
        for key, value in config.teach.model_dump(mode="json").items()
        if key != "save_steps" and made_with.get(key) != value
    ]
    if changed:
        logger.warning(
            "teach.%s: not what %s was made with; to use the new value, run `flipkd teach` again", changed[0], folder
        )
