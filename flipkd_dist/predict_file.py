"""The verb `predict`: a file of pairs in, the same records with p(match) out, window by window."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record, text_of
from flipkd_dist.pair_files import check_output, known_extension, stream_places, write_records
from flipkd_dist.predict import Matcher, adapter_folder, progress, saved_encoder
from flipkd_dist.prompt import PairEncoder, TextEncoder
from flipkd_dist.record_writer import num_characters, stream_columns
from flipkd_dist.registry import download_adapter
from flipkd_dist.token_batches import BatchLimits, windows

ANSWER = {"p_match": 0.0, "similarity": 0.0, "match": 0}  # what is added to a record, by type
LIMITS = BatchLimits()
T = TypeVar("T", bound="HasTexts")


@dataclass(frozen=True)
class InputPair:
    """A record of the input and what is scored of it."""

    record: Record
    texts: tuple[str, str]
    where: str  # its file and line

    @property
    def num_characters(self) -> int:
        return num_characters(self.record)  # the texts are among them


def read_texts(source: Path, text_a: str, text_b: str) -> Iterator[InputPair]:
    """Each record of a file with its two texts, one after the other."""

    def texts(record: Record) -> tuple[Record, tuple[str, str]]:
        return record, (text_of(record, text_a, "--text-a"), text_of(record, text_b, "--text-b"))

    return (InputPair(*found, where) for where, found in stream_places(source, texts))


class HasTexts(Protocol):
    """A record with texts that will be scored."""

    where: str
    num_characters: int

    @property
    def texts(self) -> Sequence[str]: ...


def check_tokens(records: Iterable[T], encoder: PairEncoder | TextEncoder) -> Iterator[T]:
    """The same records, once all of their texts are known to have tokens; window by window, which is fast.

    Raises:
        UserError: a text that has none, with the place of its record.
    """
    for window in windows(records, lambda one: one.num_characters, lambda one: len(one.texts)):
        if encoder.first_without_tokens(text for one in window for text in one.texts) is not None:
            for one in window:
                text = encoder.first_without_tokens(one.texts)
                if text is not None:
                    raise UserError(
                        f"{one.where}: the student's tokenizer turns {text[:40]!r} into no tokens: correct or remove it"
                    )
        yield from window


def check_not_input(output: Path, *inputs: Path | None) -> None:
    """An input is read while the output is written, and stays the user's."""
    if output.resolve() in [Path(path).resolve() for path in inputs if path]:
        raise UserError(f"--output {output}: this is the input: name another file")


def predict_file(
    model: str,
    source: Path,
    output: Path,
    text_a: str,
    text_b: str,
    limits: BatchLimits = LIMITS,
    base_model: str | None = None,
    tracking_uri: str | None = None,
) -> int:
    """Write every record of `source` with `p_match`, `similarity` and `match`; the number of pairs.

    The file is read twice: first every record is checked, its tokens too, so that a mistake in the last one is told
    before the base is loaded. What is held of it is one window.

    Raises:
        UserError: an unreadable input, an output that cannot be written, or no such model.
    """
    check_output(output)
    check_not_input(output, source)
    if next(read_texts(source, text_a, text_b), None) is None:  # before a registered adapter is fetched
        raise UserError(f"--input {source}: no pairs in it: name a file that has some")
    with local_adapter(model, tracking_uri) as adapter:
        encoder = saved_encoder(adapter, base_model)

        def checked() -> Iterator[Record]:
            return ({**one.record, **ANSWER} for one in check_tokens(read_texts(source, text_a, text_b), encoder))

        num_pairs, columns = stream_columns(checked, known_extension(output))
        matcher = Matcher(adapter, base_model)
    with progress(num_pairs, "predict") as done:
        answers = answered(matcher, read_texts(source, text_a, text_b), limits, done)
        write_records({output: answers}, columns)
    return num_pairs


def answered(
    matcher: Matcher, pairs: Iterable[InputPair], limits: BatchLimits, done: Callable[[int, int], None]
) -> Iterator[Record]:
    """The records with what the matcher says of their texts, in their order."""
    for window in windows(pairs, lambda one: one.num_characters, lambda _: 1):
        scores = matcher.scores([one.texts for one in window], limits, done)
        for one, (p_match, similarity) in zip(window, scores.tolist(), strict=True):
            match = int(p_match >= matcher.threshold)
            yield {**one.record, "p_match": p_match, "similarity": similarity, "match": match}


@contextmanager
def local_adapter(model: str, tracking_uri: str | None) -> Iterator[Path]:
    """The adapter folder of a run folder, an adapter folder or a registered `models:/` name (downloaded meanwhile)."""
    if not model.startswith("models:/"):
        yield adapter_folder(model)
        return
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local_tracking_uri(model)
    with tempfile.TemporaryDirectory(prefix="flipkd-") as folder:
        yield download_adapter(uri, model, folder)


def local_tracking_uri(model: str) -> str:
    """The `mlflow.db` of the run that the registered model is named after, else the only one under `runs/`."""
    name = re.split("[/@]", model.removeprefix("models:/"))[0]
    found = [path for path in [Path("runs") / name / "mlflow.db"] if path.exists()] or sorted(
        Path("runs").glob("*/mlflow.db")
    )
    if len(found) != 1:
        raise UserError(
            f"--tracking-uri: which MLflow? {len(found)} of runs/*/mlflow.db found here: "
            "give --tracking-uri sqlite:///FILE or set MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{found[0].resolve()}"
