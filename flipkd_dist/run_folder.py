"""The run folder: who owns it, which stages are complete for which inputs, files that appear whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError

# What decides the trained adapter; where the data lie and who tracks the run does not.
DECISIVE = ("seed", "teacher", "student", "loss", "train")
CONTRAST_BATCH = "train.per_device_train_batch_size x distributed.num_workers"
NOT_DECISIVE = {
    "teacher": (
        "batch_size",
        "num_workers",
        "num_cpus_per_worker",
        "num_gpus_per_worker",
        "resources_per_worker",
        "api_base",  # a server may move; its model is known by the vector of a probe
        "api_key_env",
        "requests_per_minute",
        "store_path",
    ),
    "student": ("bnb_4bit_quant_storage",),  # the values are the same
    "train": (
        "verify",
        "per_device_train_batch_size",
        "mini_batch_size",
        "per_device_eval_batch_size",
        "logging_steps",
        "keep_checkpoints",
        "test_checkpoints",
        "profile",
    ),
}


CHECKPOINT_FORMAT = 1
JOB_COPY = {"runtime_resources", "working_dir_files"}  # folders in which Ray keeps the working directory of a job


def write_whole(path: Path, text: str) -> None:
    """Write by rename, so that a reader never sees half a file."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The file's value, or None where it is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """Flat settings that the trained adapter depends on."""
    found = {}
    for section in DECISIVE:
        value = config.model_dump(mode="json")[section]
        for key, setting in value.items() if isinstance(value, dict) else [("", value)]:
            if key not in NOT_DECISIVE.get(section, ()):
                found[f"{section}.{key}".rstrip(".")] = setting
    found["data.max_length"] = config.data.max_length
    # The contrast batch is what counts, however it is divided.
    found[CONTRAST_BATCH] = config.contrast_batch_size
    return found


class RunFolder:
    """`OUTPUT_DIR/NAME` and its parts; docs/reference.md shows the layout."""

    def __init__(self, config: RunConfig):
        self.config, self.path = config, config.run_dir
        self.notes = self.path / "teacher"  # what this run makes of its teacher: the report, fitted curves
        shared = config.teacher.store_path
        self.teacher = Path(shared).expanduser() if shared else self.notes  # the store
        self.adapter, self.checkpoints = self.path / "adapter", self.path / "checkpoints"
        self.metrics, self.metric_log = self.path / "metrics.json", self.path / "metrics.jsonl"
        self.report = self.notes / "report.html"
        self.profile = self.path / "profile"
        self.stop = self.path / "stop"  # asks a training to stop after its current step
        self.save = self.path / "save"  # asks it for a checkpoint after its current step

    def check(self) -> None:
        """Refuse a folder that is not ours, holds another run, or cannot be written; writes nothing.

        Raises:
            UserError
        """
        if set(self.path.resolve().parts) >= JOB_COPY:
            raise UserError(
                f"output_dir: {self.config.output_dir} lies in the Ray job's copy of its working directory, which is "
                "removed afterwards: give an absolute path on storage that every node shares"
            )
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(f"output_dir: {existing} is a file: choose another output_dir or name")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {existing} cannot be written: choose another output_dir or change its rights")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        try:
            previous = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
            previous = RunConfig.model_validate(previous)
        except Exception:
            raise UserError(
                f"output_dir: {self.path} exists and is not a run folder of this version: choose another name"
            ) from None
        before, now = decisive_settings(previous), decisive_settings(self.config)
        changed = [key for key in now if before[key] != now[key]]
        if changed and (self.checkpoints.exists() or self.adapter.exists()):
            key = changed[0]
            kept = (
                "keep their product (of [min, max] max counts; train.mini_batch_size bounds memory), "
                if key == CONTRAST_BATCH
                else ""
            )
            raise UserError(
                f"name: {self.path} holds a run with {key} = {before[key]!r}, now {now[key]!r}: "
                f"{kept}choose another name, or remove the folder"
            )

    def check_trained(self, inputs: str) -> None:
        """Refuse to replace or to go on with what was trained on others; the settings are the same (`check`).

        Raises:
            UserError
        """
        done = (read_json(self.path / "stages.json") or {}).get("train")
        manifests = [read_json(path) or {} for path in self.checkpoints.glob("step-*/manifest.json")]
        if other := {manifest.get("format_version", CHECKPOINT_FORMAT) for manifest in manifests} - {CHECKPOINT_FORMAT}:
            raise UserError(
                f"{self.checkpoints}: written by another version of flipkd_dist (format {min(other)}, here "
                f"{CHECKPOINT_FORMAT}): go on with that version, or choose another name"
            )
        begun = {manifest.get("inputs") for manifest in manifests}
        if {done, *begun} - {None, inputs}:
            raise UserError(
                f"name: {self.path} holds a training on other data or models: choose another name, or remove the folder"
            )

    def require_adapter(self) -> None:
        """
        Raises:
            UserError: nothing has been trained here.
        """
        if not (self.adapter / "flipkd.json").is_file():
            raise UserError(f"{self.path}: no adapter yet: run `flipkd train` with this configuration first")

    def open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "config.yaml", self.config.to_yaml())
        if self.notes != self.teacher:  # else the store makes it
            self.notes.mkdir(exist_ok=True)

    def done(self, stage: str, inputs: str) -> bool:
        return (read_json(self.path / "stages.json") or {}).get(stage) == inputs

    def mark_done(self, stage: str, inputs: str) -> None:
        stages = read_json(self.path / "stages.json") or {}
        write_json(self.path / "stages.json", {**stages, stage: inputs})


def digest(*parts: Any) -> str:
    """A short hash of JSON-serialisable parts."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
