"""The verb `predict`: a file of pairs in, the same records with p(match) out."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record, text_of
from flipkd_dist.pair_files import check_output, read_fields, write_records
from flipkd_dist.predict import Matcher, adapter_folder
from flipkd_dist.registry import download_adapter


def read_texts(source: Path, text_a: str, text_b: str) -> list[tuple[Record, tuple[str, str]]]:
    """Each record of a file with its two texts."""

    def texts(record: Record) -> tuple[Record, tuple[str, str]]:
        return record, (text_of(record, text_a, "--text-a"), text_of(record, text_b, "--text-b"))

    return read_fields(source, texts)


def predict_file(
    model: str,
    source: Path,
    output: Path,
    text_a: str,
    text_b: str,
    batch_size: int = 64,
    base_model: str | None = None,
    tracking_uri: str | None = None,
) -> int:
    """Write every record of `source` with `p_match`, `similarity` and `match`; the number of pairs.

    Raises:
        UserError: an unreadable input, an output that cannot be written, or no such model.
    """
    check_output(output)
    if output.resolve() == Path(source).resolve():
        raise UserError(f"--output {output}: this is the input: name another file")
    pairs = read_texts(source, text_a, text_b)
    if not pairs:
        raise UserError(f"--input {source}: no pairs in it: name a file that has some")
    with local_adapter(model, tracking_uri) as adapter:
        matcher = Matcher(adapter, base_model)
    p_match, similarity = matcher.predict([texts for _, texts in pairs], batch_size)
    write_records(
        {
            output: [
                {**record, "p_match": float(p), "similarity": float(s), "match": int(p >= matcher.threshold)}
                for (record, _), p, s in zip(pairs, p_match, similarity, strict=True)
            ]
        }
    )
    return len(pairs)


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
