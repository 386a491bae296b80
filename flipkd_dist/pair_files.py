"""Records of JSONL, CSV, TSV and Parquet files and of hub datasets: each with its line, every mistake one line.

A line number is that of a record's first line, counted from 1; Parquet and the hub count rows instead.
"""

import csv
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from flipkd_dist.errors import UserError
from flipkd_dist.record_writer import DELIMITERS, Columns, write_file

T = TypeVar("T")
EXTENSIONS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
PARQUET_ROWS = 64  # that are Python objects at a time; pyarrow would take 65,536, however long their lists and texts
MAX_FIELD = 2**26  # characters of a field, so that a quote which is never closed does not fill the memory
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+):([\w\[\]:%+]+)")  # org/name:split


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def known_extension(path: str | Path) -> str:
    """The format that a file's name stands for."""
    suffix = Path(path).suffix
    if suffix not in EXTENSIONS:
        raise UserError(
            f"{path}: unknown extension {suffix!r}: use {', '.join(EXTENSIONS)} or, for a run's pairs, set data.format"
        )
    return EXTENSIONS[suffix]


def file_format(path: str | Path, format: str = "auto") -> str:
    """`jsonl`, `csv`, `tsv`, `parquet` or `hub`: the given format, else the one of the extension or of a hub id.

    Raises:
        UserError: no such file, a folder, an unknown extension, not a hub id.
    """
    is_hub_id = HUB_ID.fullmatch(str(path)) is not None
    if format == "hub" and not is_hub_id:
        raise UserError(f"{path}: not a hub id: write it as org/name:split")
    if format == "hub" or (format == "auto" and is_hub_id and not Path(path).exists()):
        return "hub"
    if Path(path).is_dir():
        raise UserError(f"{path}: this is a folder: name the files in it")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file: check the path (a hub id is written org/name:split)")
    return known_extension(path) if format == "auto" else format


def place(path: str | Path, number: int, format: str) -> str:
    """Where a record stands, for an error: `pairs.csv:12`, `pairs.parquet row 12`."""
    return f"{path}:{number}" if format in ("jsonl", "csv", "tsv") else f"{path} row {number}"


def read_records(path: str | Path, format: str = "auto") -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record of a file or a hub split with its line (Parquet, hub: row) number; blank lines are skipped.

    Raises:
        UserError: whatever keeps a record from being read, with file and line.
    """
    format = file_format(path, format)
    if format == "hub":
        return _hub_records(str(path))
    if format == "parquet":
        return _parquet_records(path)
    return _json_records(path) if format == "jsonl" else _delimited_records(path, DELIMITERS[format])


def stream_places(path: str | Path, fields: Callable[..., T], *columns: str) -> Iterator[tuple[str, T]]:
    """The place of each record of a file, and what `fields` makes of it; an error gets the place."""
    format = file_format(path)
    for number, record in read_records(path, format):
        where = place(path, number, format)
        try:
            yield where, fields(record, *columns)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def read_fields(path: str | Path, fields: Callable[..., T], *columns: str) -> list[T]:
    """What `fields` makes of each record of a file; an error gets its place."""
    return [value for _, value in stream_places(path, fields, *columns)]


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: not readable ({_one_line(error.strerror or error)}): check the file") from None
    except UnicodeDecodeError:
        # The decoder reads ahead of the lines that it hands out, so its own position says little.
        with open(path, "rb") as file:
            bad = next(number for number, raw in enumerate(file, 1) if raw.decode(errors="ignore").encode() != raw)
        raise UserError(f"{path}:{bad}: not UTF-8: save the file as UTF-8") from None


def json_object(line: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line; `where` is its place, for errors."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        detail = _one_line(error).replace("line 1 column", "column")
        raise UserError(f"{where}: broken JSON ({detail}): write one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: {reprlib.repr(record)} is no JSON object: write one object a line")
    return record


def _json_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with readable(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield number, json_object(line, f"{path}:{number}")


def _delimited_records(path: str | Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    start, header = 1, None
    csv.field_size_limit(MAX_FIELD)  # of the process; the module's own 131,072 is less than long documents have
    with readable(path), open(path, encoding="utf-8-sig", newline="") as file:
        # Strict, so that a quote which is never closed does not swallow the rest of the file.
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for row in rows:
                if row and header is None:
                    header = _distinct_names([_one_line(name) for name in row], path)
                elif row and len(row) != len(header):
                    raise UserError(
                        f"{path}:{start}: fields found: {len(row)}, columns in the header: {len(header)}: "
                        "quote texts that hold a delimiter, or complete the line"
                    )
                elif row:
                    yield start, dict(zip(header, row, strict=True))
                start = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}:{start}: broken quoting ({_one_line(error)}): quote whole fields, double the quotes in them"
            ) from None


def _parquet_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = 0
    with readable(path):
        try:
            with pq.ParquetFile(path) as file:
                _distinct_names(file.schema_arrow.names, path)
                for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                    yield from enumerate(batch.to_pylist(), done + 1)
                    done += len(batch)
        except UnicodeDecodeError:
            raise UserError(f"{path} row {done + 1} or later: a text is not UTF-8: write the file again") from None
        except pa.ArrowException as error:
            raise UserError(f"{path}: not readable as Parquet ({_one_line(error)}): write the file again") from None


def _hub_records(hub_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
    name, split = HUB_ID.fullmatch(hub_id).groups()
    try:
        from datasets import load_dataset

        dataset = load_dataset(name, split=split)
    except Exception as error:  # the hub client raises errors of four libraries; each is about the id or the network
        raise UserError(
            f"{hub_id}: not loaded from the hub ({_one_line(error)}): check id, split and network, or name a file"
        ) from None
    yield from enumerate(dataset, 1)


def _distinct_names(names: list[str], path: str | Path) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two columns are named {name!r}: rename one")
    return names


def check_output(path: Path, more_extensions: tuple[str, ...] = ()) -> None:
    """Find out before the work whether `path` can be written at the end of it."""
    if path.suffix not in more_extensions:
        known_extension(path)
    if path.is_dir():
        raise UserError(f"{path}: this is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable: name another")


def write_records(files: dict[Path, Iterable[dict[str, Any]]], columns: Columns | None = None) -> None:
    """Write each file in the format of its extension: all of them complete under temporary names, then renamed.

    Args:
        files: the records of each; a list, or with `columns` a stream too, which is never held whole.
        columns: of CSV, TSV and Parquet (names, or what `stream_columns` found); None: those of the records.
    Raises:
        UserError: a file cannot be written; then none is left half-written.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, records in files.items():
            write_file(temporary[path], records, known_extension(path), columns)
        for path in files:
            os.replace(temporary[path], path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({_one_line(error.strerror or error)}): check folder and free space"
        ) from None
    finally:
        for leftover in temporary.values():
            with suppress(OSError):
                leftover.unlink()
