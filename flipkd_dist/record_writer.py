"""Records written to one file as JSONL, CSV, TSV or Parquet, one after the other: a stream is never held whole."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from flipkd_dist.errors import UserError

if TYPE_CHECKING:
    import pyarrow

DELIMITERS = {"csv": ",", "tsv": "\t"}
Columns = Union[list[str], "pyarrow.Schema"]  # names; for Parquet also a schema
ROWS_PER_GROUP = 10_000  # of a Parquet file that is written from a stream
CHARACTERS_PER_GROUP = 2**24
NUMBERS = {"label": "int64", "labels": "int64", "score": "float64"}  # Parquet types; other columns are texts or lists


def write_file(path: Path, records: Iterable[dict[str, Any]], format: str, columns: Columns | None = None) -> None:
    """Write records to `path`.

    Args:
        columns: of a CSV, TSV or Parquet file; None: those of the records, which must be a list then. Names alone
            make texts of a Parquet file's columns, but for those that pairs have.
    Raises:
        OSError: the disk's own.
    """
    if format == "parquet":
        _write_parquet(path, records, columns)
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        if format == "jsonl":
            file.writelines(map(_json_line, records))
            return
        if columns is None:
            columns = list(dict.fromkeys(key for record in records for key in record))
        rows = csv.DictWriter(file, columns, delimiter=DELIMITERS[format])
        rows.writeheader()
        rows.writerows(records)


def _json_line(record: dict[str, Any]) -> str:
    line = json.dumps(record, ensure_ascii=False)
    if not line.isascii() and re.search("[\ud800-\udfff]", line):  # half of a surrogate pair, which is no UTF-8
        line = json.dumps(record)
    return line + "\n"


def stream_columns(read: Callable[[], Iterable[dict[str, Any]]], format: str) -> tuple[int, Columns]:
    """How many records a stream has, and their columns as `write_file` takes them: a pass before that of writing.

    Args:
        read: begins the stream; called again where groups of a Parquet file differ in their types.
    Raises:
        UserError: what a Parquet file cannot hold, such as a column with values of several types.
    """
    if format == "parquet":
        return _stream_schema(read)
    count, columns = 0, {}
    for record in read():
        count += 1
        columns |= dict.fromkeys(record)
    return count, list(columns)


def _stream_schema(read: Callable[[], Iterable[dict[str, Any]]]) -> tuple[int, "pyarrow.Schema"]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, schema, schemas = 0, pa.schema([]), set()
    with _told_by_arrow():
        for rows in _row_groups(read()):
            count += len(rows)
            found = pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in _names(rows)])
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
            schemas.add(found)
        with pq.ParquetWriter(pa.BufferOutputStream(), schema):  # some types of Arrow are none of Parquet
            pass
        if len(schemas) > 1:  # the type of all groups need not hold the values of each: float64 not every int64
            for rows in _row_groups(read()):
                pa.Table.from_pylist(rows, schema)
    return count, schema


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _row_groups(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A stream in lists that memory holds, whatever the length of a record."""
    rows, characters = [], 0
    for record in records:
        rows.append(record)
        characters += num_characters(record)
        if len(rows) == ROWS_PER_GROUP or characters > CHARACTERS_PER_GROUP:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def num_characters(value: Any) -> int:
    """Roughly what a record takes: the characters of all its texts, at least one for a text, one for another value."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return max(len(value), 1) if isinstance(value, str | bytes) else 1
    return sum(map(num_characters, value))


@contextmanager
def _told_by_arrow() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except UnicodeEncodeError:
        raise UserError("a text holds half of a surrogate pair: correct its \\u escapes or write JSONL") from None
    except (pa.ArrowException, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Parquet cannot hold a column of these records ({reason}): give its values one type or write JSONL"
        ) from None


def _write_parquet(path: Path, records: Iterable[dict[str, Any]], columns: Columns | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if columns is None:
        with _told_by_arrow():
            pq.write_table(pa.Table.from_pylist(records), path)
        return
    schema = columns if isinstance(columns, pa.Schema) else _schema_of_pairs(columns)
    with pq.ParquetWriter(path, schema) as writer:
        for rows in _row_groups(records):
            with _told_by_arrow():
                writer.write_table(pa.Table.from_pylist(rows, schema))


def _schema_of_pairs(columns: list[str]) -> "pyarrow.Schema":
    import pyarrow as pa

    passage = pa.struct([(name, pa.string()) for name in ("docid", "title", "text")])
    lists = {"pos": pa.string(), "neg": pa.string(), "pos_scores": pa.float64(), "neg_scores": pa.float64()}
    types = {name: pa.list_(type) for name, type in lists.items()}
    types |= {name: pa.list_(passage) for name in ("positive_passages", "negative_passages")}
    types |= {name: pa.type_for_alias(alias) for name, alias in NUMBERS.items()}
    return pa.schema([(name, types.get(name, pa.string())) for name in columns])
