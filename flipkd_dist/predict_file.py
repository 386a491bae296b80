"""The verb `predict`: a file of pairs in, the same records with p(match) out, window by window."""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record, text_of
from flipkd_dist.pair_files import check_output, known_extension, stream_fields, write_records
from flipkd_dist.predict import Matcher, adapter_folder, progress
from flipkd_dist.record_writer import stream_columns
from flipkd_dist.registry import download_adapter
from flipkd_dist.token_batches import BatchLimits, windows

ANSWER = {"p_match": 0.0, "similarity": 0.0, "match": 0}  # what is added to a record, by type
LIMITS = BatchLimits()


def read_texts(source: Path, text_a: str, text_b: str) -> Iterator[tuple[Record, tuple[str, str]]]:
    """Each record of a file with its two texts, one after the other."""

    def texts(record: Record) -> tuple[Record, tuple[str, str]]:
        return record, (text_of(record, text_a, "--text-a"), text_of(record, text_b, "--text-b"))

    return stream_fields(source, texts)


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

    The file is read twice: first every record is checked, so that a mistake in the last one is told before the model is
    loaded. What is held of it is one window.

    Raises:
        UserError: an unreadable input, an output that cannot be written, or no such model.
    """
    check_output(output)
    check_not_input(output, source)
    checked = ({**record, **ANSWER} for record, _ in read_texts(source, text_a, text_b))
    num_pairs, columns = stream_columns(checked, known_extension(output))
    if not num_pairs:
        raise UserError(f"--input {source}: no pairs in it: name a file that has some")
    with local_adapter(model, tracking_uri) as adapter:
        matcher = Matcher(adapter, base_model)
    with progress(num_pairs, "predict") as done:
        answers = answered(matcher, read_texts(source, text_a, text_b), limits, done)
        write_records({output: answers}, columns)
    return num_pairs


def answered(
    matcher: Matcher,
    pairs: Iterable[tuple[Record, tuple[str, str]]],
    limits: BatchLimits,
    done: Callable[[int, int], None],
) -> Iterator[Record]:
    """The records with what the matcher says of their texts, in their order."""
    for window in windows(pairs, lambda pair: pair[1], lambda _: 1):
        scores = matcher.scores([texts for _, texts in window], limits, done)
        for (record, _), (p_match, similarity) in zip(window, scores.tolist(), strict=True):
            match = int(p_match >= matcher.threshold)
            yield {**record, "p_match": p_match, "similarity": similarity, "match": match}


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
