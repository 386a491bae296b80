"""A BEIR folder written from pairs: whole or not at all."""

import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from flipkd_dist.beir_folder import DEFAULT_SPLIT, QRELS, folder_and_split
from flipkd_dist.errors import UserError
from flipkd_dist.pair_export import text_name
from flipkd_dist.pair_fields import Record
from flipkd_dist.temporary_database import digest, temporary_database

FILES = {"a": "queries.jsonl", "b": "corpus.jsonl"}  # of first and second texts


def check_beir_output(output: str | Path) -> None:
    """Find out before the work whether the folder can be written at the end of it."""
    folder = folder_and_split(output)[0]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: this exists: name a new folder, for a BEIR folder is written whole")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"{folder}: there is no folder {folder.absolute().parent}: create it first")
    if not os.access(folder.absolute().parent, os.W_OK):
        raise UserError(f"{folder}: the folder {folder.absolute().parent} is not writable: name another")


def write_beir(output: str | Path, records: Iterable[Record], lost: Counter) -> None:
    """Write `FOLDER` or `FOLDER:SPLIT`: every text once, a line of judgement (score = label) for every pair.

    Args:
        lost: gains the number of pairs that stand twice, which a judgement cannot.
    Raises:
        UserError: the folder cannot be written; then there is none.
    """
    folder, split = folder_and_split(output)
    temporary = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        (temporary / "qrels").mkdir(parents=True)
        _write(temporary, split or DEFAULT_SPLIT, records, lost)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}): check folder and free space"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, split: str, records: Iterable[Record], lost: Counter) -> None:
    tables = [f"{table} (key BLOB PRIMARY KEY, name TEXT UNIQUE) WITHOUT ROWID" for table in ("a", "b")]
    with ExitStack() as stack:
        database = stack.enter_context(
            temporary_database(*tables, "judged (a TEXT, b TEXT, PRIMARY KEY (a, b)) WITHOUT ROWID")
        )
        paths = {**{side: folder / name for side, name in FILES.items()}, "qrels": folder / "qrels" / f"{split}.tsv"}
        files = {key: stack.enter_context(open(path, "w", encoding="utf-8", newline="")) for key, path in paths.items()}
        files["qrels"].write("\t".join(QRELS) + "\n")
        for record in records:
            query, document = (_named(database, files[side], record, side) for side in "ab")
            if database.execute("INSERT OR IGNORE INTO judged VALUES (?, ?)", (query, document)).rowcount:
                files["qrels"].write(f"{query}\t{document}\t{record['label']}\n")
            else:
                lost["pairs left out: the same two texts stand earlier"] += 1


def _named(database: sqlite3.Connection, file: IO[str], record: Record, side: str) -> str:
    """The id under which a text stands in `file`; it is written when it is new."""
    text, key = record[f"text_{side}"], digest(record[f"text_{side}"])
    known = database.execute(f"SELECT name FROM {side} WHERE key = ?", (key,)).fetchone()
    if known:
        return known[0]
    name = text_name(record, side)
    taken = database.execute(f"SELECT 1 FROM {side} WHERE name = ?", (name,)).fetchone()
    if taken or any(character in name for character in '\t\r\n"'):  # what a line of judgement could not hold
        name = key.hex()
    database.execute(f"INSERT INTO {side} VALUES (?, ?)", (key, name))
    line = {"_id": name, "title": "", "text": text} if side == "b" else {"_id": name, "text": text}
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return name
