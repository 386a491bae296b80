"""Where a run's teacher signals come from: checked before anything starts, cheap to send to a worker, loaded there."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from flipkd_dist.config import RunConfig, TeacherConfig
from flipkd_dist.endpoint_teacher import Endpoint, EndpointTeacher, probe_fingerprint, recorded_probe
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import check_files, fingerprint, resolve_config, resolve_model
from flipkd_dist.run_folder import RunFolder
from flipkd_dist.sentence_folder import CONFIGS, SentenceFolder, read_sentence_folder
from flipkd_dist.sentence_teacher import SentenceTeacher
from flipkd_dist.store import StoreSpec
from flipkd_dist.taught_folder import check_taught, taught_folder
from flipkd_dist.teacher import Teacher, teacher_hidden_size

logger = logging.getLogger("flipkd_dist")

KEY = "teacher.model_name_or_path"
POOLED_THERE = "endpoint"  # the pooling of a specification whose server pools


class Encoder(Protocol):
    """n texts to n rows of numbers: unit vectors [n, d], or scores of pairs [n, 1] (texts of `store.pair_text`)."""

    num_truncated: int  # texts that were cut so far

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray: ...


class Part(Protocol):
    """One encoder of a source; cheap to send to a worker."""

    spec: StoreSpec

    def load(self, device: torch.device | str) -> Encoder: ...


@dataclass(frozen=True)
class FolderPart:
    """The encoder of a model folder: by our own loop where it is a model and a pooling, else by the library."""

    folder: Path
    form: SentenceFolder | None
    spec: StoreSpec

    def load(self, device: torch.device | str) -> Encoder:
        pooling, prompt, length = self.spec.pooling, self.spec.prompt, self.spec.max_length
        if self.form is None or not self.form.needs_library:
            include_prompt = self.form is None or self.form.include_prompt
            return Teacher(self.folder, pooling, length, device, prompt, include_prompt)
        return SentenceTeacher(self.folder, self.form, pooling, self.spec.hidden_size, length, device, prompt)


@dataclass(frozen=True)
class EndpointPart:
    """The encoder behind an endpoint, known by the vector of a probe; `record` keeps that for later runs of it."""

    endpoint: Endpoint
    probe: tuple[float, ...]
    record: Path
    spec: StoreSpec

    def load(self, device: torch.device | str) -> Encoder:
        return EndpointTeacher(self.endpoint, np.array(self.probe, np.float32), self.record, self.spec.prompt)


@dataclass
class WeightedTeacher:
    """Several encoders as one: the dot product of its vectors is the weighted mean of their cosines."""

    encoders: list[Encoder]
    weights: tuple[float, ...]  # of sum 1

    @property
    def num_truncated(self) -> int:
        """Texts cut so far, by the encoder that cut most of them."""
        return max(encoder.num_truncated for encoder in self.encoders)

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Unit vectors, float32 [n, sum of the d]: the encoders' own, each times the root of its weight."""
        parts = [encoder.encode(texts, batch_size) for encoder in self.encoders]
        scales = np.sqrt(self.weights).astype(np.float32)
        return np.concatenate([scale * part for scale, part in zip(scales, parts, strict=True)], axis=1)


@dataclass(frozen=True)
class TeacherSource:
    settings: TeacherConfig
    parts: tuple[Part, ...]
    weights: tuple[float, ...]  # of the parts, sum 1
    spec: StoreSpec  # everything that a vector depends on besides its text

    @property
    def largest_hidden_size(self) -> int:
        """d of the widest encoder: what `student.lora_r: null` means, however many are put together."""
        return max(part.spec.hidden_size for part in self.parts)

    @property
    def folders(self) -> list[Path]:
        return [part.folder for part in self.parts if isinstance(part, FolderPart)]

    def load(self, device: torch.device | str = "cpu") -> Encoder:
        """The encoder, complete.

        Raises:
            UserError: its files cannot be loaded completely, or its endpoint does not answer.
        """
        if len(self.parts) == 1:
            return self.parts[0].load(device)
        return WeightedTeacher([part.load(device) for part in self.parts], self.weights)


def _check_settings(settings: TeacherConfig) -> list[str | None]:
    """The names of the encoders; refuses settings that contradict each other or would do nothing.

    Raises:
        UserError
    """
    several = isinstance(settings.model_name_or_path, list)
    names = settings.model_name_or_path if several else [settings.model_name_or_path]
    if not names:
        raise UserError(f"{KEY} is an empty list: name a model")
    if settings.weights is not None and not several:
        raise UserError(f"teacher.weights: there is one teacher alone: make {KEY} a list or leave the weights out")
    if settings.weights is not None and len(settings.weights) != len(names):
        raise UserError(
            f"teacher.weights: {len(settings.weights)} weights for {len(names)} teachers: give one for each"
        )
    if settings.api_base is None:
        for key, default in (("requests_per_minute", None), ("api_key_env", "OPENAI_API_KEY")):
            if getattr(settings, key) != default:
                raise UserError(f"teacher.{key}: there is no endpoint: set teacher.api_base or leave it out")
        return names
    if several:
        raise UserError(f"{KEY}: an endpoint has one model: name it, or leave teacher.api_base out")
    if not settings.model_name_or_path:
        raise UserError(f"{KEY} is missing: give the model's name at teacher.api_base")
    if settings.pooling != "auto":
        raise UserError(f"teacher.pooling: {settings.pooling}: the endpoint pools by itself: set it to auto")
    return names


def _endpoint_part(config: RunConfig) -> EndpointPart:
    """The endpoint, asked for a first vector unless the run has one already."""
    settings, workers = config.teacher, config.teacher.num_workers
    rate, workers = settings.requests_per_minute, max(workers) if isinstance(workers, list) else workers
    endpoint = Endpoint(
        settings.api_base, settings.model_name_or_path, settings.api_key_env, rate / workers if rate else None
    )
    endpoint.check()
    record = RunFolder(config).teacher.absolute() / f"endpoint-{endpoint.name}.json"
    probe = recorded_probe(record)
    if probe is None:
        probe = EndpointTeacher(endpoint).probe
    prompt = settings.prompt or ""
    spec = StoreSpec(probe_fingerprint(endpoint, probe), POOLED_THERE, 0, len(probe), prompt)  # the server cuts
    return EndpointPart(endpoint, tuple(map(float, probe)), record, spec)


def _pooling(settings: TeacherConfig, folder: Path, form: SentenceFolder | None) -> str:
    if settings.pooling == "auto":
        return "mean" if form is None else form.pooling
    if form is not None and form.pooling != settings.pooling:
        if "+" in form.pooling:
            raise UserError(
                f"teacher.pooling: {folder} pools by {form.pooling}, which is wider than {settings.pooling}: set auto"
            )
        logger.warning(
            "teacher.pooling: %s is taken, though %s was made with %s (auto)", settings.pooling, folder, form.pooling
        )
    return settings.pooling


def _folder_part(settings: TeacherConfig, name: str | None) -> FolderPart:
    folder = resolve_model(name, KEY)
    check_files(folder, KEY)
    form = read_sentence_folder(folder)
    prompt = settings.prompt if form is None or settings.prompt is not None else form.prompt
    if form is not None and form.other_prompts and settings.prompt is None:
        logger.warning(
            "teacher.prompt: %s has prompts (%s) and none is its default: none is used; set teacher.prompt to one",
            folder,
            ", ".join(form.other_prompts),
        )
    spec = StoreSpec(
        fingerprint(folder) if form is None else form.fingerprint(folder),
        _pooling(settings, folder, form),
        settings.max_length,
        _hidden_size(folder, form),
        prompt or "",
    )
    return FolderPart(folder, form, spec)


def _hidden_size(folder: Path, form: SentenceFolder | None) -> int:
    own = teacher_hidden_size(folder)
    return own if form is None or form.width is None else form.width


def _joint_spec(parts: list[Part], weights: tuple[float, ...]) -> StoreSpec:
    """The specification of the parts' vectors put together."""
    specs = [part.spec for part in parts]
    keys = [f"{spec.key} {weight:.6f}" for spec, weight in zip(specs, weights, strict=True)]
    return StoreSpec(
        hashlib.blake2b("\0".join(keys).encode(), digest_size=16).hexdigest(),
        " and ".join(dict.fromkeys(spec.pooling for spec in specs)),
        max(spec.max_length for spec in specs),
        sum(spec.hidden_size for spec in specs),
        " and ".join(dict.fromkeys(spec.prompt for spec in specs if spec.prompt)),
    )


def text_teacher(config: RunConfig, taught: bool = True) -> TeacherSource:
    """The encoder of single texts that the configuration names; no weights are loaded.

    An endpoint is asked for one vector, unless the run's folder holds that already.
    Args:
        taught: take the one that `flipkd teach` made of it, where there is one.
    Raises:
        UserError
    """
    settings, names = config.teacher, _check_settings(config.teacher)
    if settings.api_base is not None:
        parts: list[Part] = [_endpoint_part(config)]
    else:
        parts = [_folder_part(settings, name) for name in names]
    if taught and (fine_tuned := taught_folder(config, *(part.spec.teacher_fingerprint for part in parts))):
        parts = [_folder_part(settings, str(fine_tuned))]
        check_taught(config, parts[0].spec.teacher_fingerprint)
    weights = settings.weights or [1.0] * len(parts)
    weights = tuple(weight / sum(weights) for weight in weights)
    spec = parts[0].spec if len(parts) == 1 else _joint_spec(parts, weights)
    return TeacherSource(settings, tuple(parts), weights, spec)


def largest_hidden_size(config: RunConfig) -> int:
    """What `TeacherSource.largest_hidden_size` will be, from configuration files alone.

    Raises:
        UserError
    """
    names = _check_settings(config.teacher)
    if config.teacher.api_base is not None:
        return _endpoint_part(config).spec.hidden_size
    folders = [resolve_config(name, KEY, CONFIGS) for name in names]
    return max(_hidden_size(folder, read_sentence_folder(folder, weights=False)) for folder in folders)
