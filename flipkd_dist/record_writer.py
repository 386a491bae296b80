"""Records written to one file as JSONL, CSV, TSV or Parquet, one after the other: a stream is never held whole."""

import csv
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

DELIMITERS = {"csv": ",", "tsv": "\t"}
ROWS_PER_GROUP = 10_000  # of a Parquet file that is written from a stream
NUMBERS = {"label": "int64", "labels": "int64", "score": "float64"}  # Parquet types; other columns are texts or lists


def write_file(path: Path, records: Iterable[dict[str, Any]], format: str, columns: list[str] | None = None) -> None:
    """Write records to `path`.

    Args:
        columns: of a CSV, TSV or Parquet file; None: those of the records, which must be a list then.
    Raises:
        OSError: the disk's own.
    """
    if format == "parquet":
        _write_parquet(path, records, columns)
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        if format == "jsonl":
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            return
        if columns is None:
            columns = list(dict.fromkeys(key for record in records for key in record))
        rows = csv.DictWriter(file, columns, delimiter=DELIMITERS[format])
        rows.writeheader()
        rows.writerows(records)


def _write_parquet(path: Path, records: Iterable[dict[str, Any]], columns: list[str] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if columns is None:
        pq.write_table(pa.Table.from_pylist(records), path)
        return
    passage = pa.struct([(name, pa.string()) for name in ("docid", "title", "text")])
    lists = {"pos": pa.string(), "neg": pa.string(), "pos_scores": pa.float64(), "neg_scores": pa.float64()}
    types = {name: pa.list_(type) for name, type in lists.items()}
    types |= {name: pa.list_(passage) for name in ("positive_passages", "negative_passages")}
    types |= {name: pa.type_for_alias(alias) for name, alias in NUMBERS.items()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns])
    stream = iter(records)
    with pq.ParquetWriter(path, schema) as writer:
        while rows := list(islice(stream, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(rows, schema))
