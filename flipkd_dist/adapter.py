"""The adapter folder: a PEFT folder, or with full tuning a whole model, with `flipkd.json`; verified when written."""

import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flipkd_dist.base import check_base
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.run_folder import read_json, write_json
from flipkd_dist.student import Student
from flipkd_dist.tuned_folder import verify_tuned, write_tuned
from flipkd_dist.weight_files import WeightFiles

WEIGHTS = "adapter_model.safetensors"
CARD_FORMAT = 1


@dataclass(frozen=True)
class Probe:
    """A pair that the adapter answers differently from its base: tells an adapter that is not applied."""

    text_a: str
    text_b: str
    p_match: float
    p_match_base: float


@dataclass(frozen=True)
class AdapterCard:
    """`flipkd.json`: what prediction needs besides the weights."""

    base_model: str  # as configured: a folder, a hub id or a packaged name
    base_fingerprint: str
    prompt: str | None
    answers: list[str]
    encoder_module: str | None  # None with full tuning
    max_length: int  # tokens
    threshold: float  # of p(match)
    step: int
    probe: Probe
    attn_implementation: str = "auto"
    dtype: str = "float32"  # of training: float32 or bfloat16
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True
    tuning: str = "lora"
    mode: str = "pair"
    readout: str = "lora_a"
    bidirectional: bool = False
    format_version: int = CARD_FORMAT

    @property
    def four_bits(self) -> str:
        """How the base's weights were packed, in words."""
        scales = ", double quantisation" if self.bnb_4bit_use_double_quant else ""
        return f"a base in 4 bits ({self.bnb_4bit_quant_type}{scales})"

    @classmethod
    def read(cls, folder: Path) -> "AdapterCard":
        value = read_json(folder / "flipkd.json")
        if isinstance(value, dict) and (version := value.get("format_version", CARD_FORMAT)) != CARD_FORMAT:
            raise UserError(
                f"{folder}: written by another version of flipkd_dist (format {version}, here {CARD_FORMAT}): "
                "use that version"
            )
        try:
            return cls(**{**value, "probe": Probe(**value["probe"])})
        except (TypeError, KeyError):
            raise UserError(
                f"{folder}: no readable flipkd.json: name a run folder or the adapter folder of one"
            ) from None


def peft_name(parameter_name: str) -> str:
    """The name under which PEFT stores a parameter of the wrapped model."""
    return parameter_name.replace(".default", "")


def save_adapter(
    folder: Path, student: Student, state: dict[str, Tensor], tokenizer, card: AdapterCard, idle: Set[str] = frozenset()
) -> None:
    """Write the folder whole or not at all, then reopen and verify it.

    Args:
        state: whole LoRA tensors by parameter name.
        idle: names of those that no loss reaches, which may be zero.
    Raises:
        RuntimeError: the folder does not hold what was trained.
    """
    with _whole(folder) as draft:
        weights = {peft_name(name): value.contiguous() for name, value in state.items()}
        save_file(weights, draft / WEIGHTS)
        student.model.peft_config["default"].save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_json(draft / "flipkd.json", asdict(card))
        names = [peft_name(name) for name in student.trained_parameters()]
        expected = {name: tuple(weights[name].shape) if name in weights else () for name in names}
        verify_adapter(draft, expected, {peft_name(name) for name in idle})


def save_tuned(folder: Path, base: Path, state: dict[str, Tensor], encoder: PairEncoder, card: AdapterCard) -> None:
    """The same with full tuning: the whole model as a Hugging Face folder.

    Args:
        base: the folder of the base.
        state: whole trained tensors by parameter name.
    Raises:
        RuntimeError: the folder does not hold what was trained.
    """
    weights, config = WeightFiles(base, card.base_model), check_base(base, StudentConfig(model_name_or_path=str(base)))
    with _whole(folder) as draft:
        dtype = getattr(torch, card.dtype)
        state = {name: value.to(dtype) for name, value in state.items()}
        write_tuned(draft, config, state, encoder.answer_ids, weights, card.bidirectional)
        encoder.tokenizer.save_pretrained(draft)
        write_json(draft / "flipkd.json", asdict(card))
        verify_tuned(draft, config, weights)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A draft that takes the folder's place when all of it is written and verified."""
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # left by an error: with full tuning as large as a model


def verify_adapter(folder: Path, expected: dict[str, tuple[int, ...]], idle: Set[str] = frozenset()) -> None:
    """Reopen the weights: every name with its shape, finite, and no LoRA-B left at zero but the `idle` ones.

    Raises:
        RuntimeError: one line that says what is wrong.
    """
    found = load_file(folder / WEIGHTS)
    if name := first_misfit(found, expected):
        raise RuntimeError(
            f"{folder / WEIGHTS}: {name} is missing, unexpected or of another shape: nothing was exported"
        )
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise RuntimeError(f"{folder / WEIGHTS}: {name} is not finite: lower train.learning_rate")
        if ".lora_B." in name and name not in idle and not value.any():
            raise RuntimeError(f"{folder / WEIGHTS}: {name} is all zero, nothing was learnt there: train longer")


def first_misfit(found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> str | None:
    """The first name that is in one of them alone, or in both with different shapes."""
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    return min((name for name, _ in shapes.items() ^ expected.items()), default=None)


def load_weights(student: Student, path: Path) -> None:
    """Put stored LoRA tensors into the student, before the engine shards it; the file must hold these and no others.

    Raises:
        UserError: an unreadable file, or one that lacks a tensor, has another one, or one of another shape.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}): train again or restore the file") from None
    parameters = {peft_name(name): parameter for name, parameter in student.trained_parameters().items()}
    if name := first_misfit(stored, {name: tuple(parameter.shape) for name, parameter in parameters.items()}):
        raise UserError(
            f"{path}: {name} is missing, unexpected or of another shape: the file belongs to another student"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(stored[name])


def check_probe(p_match: float, card: AdapterCard, dtype: torch.dtype) -> None:
    """The adapter must answer its probe as it did when it was saved, up to the rounding of `dtype` and of training's.

    Raises:
        RuntimeError
    """
    probe, exact = card.probe, dtype == torch.float32 and card.dtype == "float32"
    if not abs(p_match - probe.p_match) <= (1e-4 if exact else 3e-2):
        raise RuntimeError(
            f"the adapter answers its probe pair with {p_match:.6f}, not {probe.p_match:.6f} "
            f"(its base: {probe.p_match_base:.6f}): adapter or base are not the ones that were trained"
        )
