"""A BEIR folder: corpus.jsonl, queries.jsonl and the judgements qrels/SPLIT.tsv, written `FOLDER` or `FOLDER:SPLIT`.

Of corpus and queries only the places of the lines are kept, in a temporary SQLite table. Names of files and fields are
those that the BEIR project documents for custom datasets.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record, name_of, require_column, score_of, shown, text_of
from flipkd_dist.pair_files import json_object, read_records, readable
from flipkd_dist.temporary_database import temporary_database

QRELS = ("query-id", "corpus-id", "score")
DEFAULT_SPLIT = "test"  # what BEIR's own loader takes, and what is written where no split is named


def is_beir_folder(path: str | Path) -> bool:
    return (Path(path) / "corpus.jsonl").is_file()


def folder_and_split(path: str | Path) -> tuple[Path, str | None]:
    """`FOLDER:SPLIT` as its parts; a folder that exists under the whole name has no split in it."""
    folder, colon, split = str(path).rpartition(":")
    if not colon or Path(path).exists() or "/" in split:
        return Path(path), None
    return Path(folder), split


def qrels_file(path: str | Path) -> tuple[Path, Path]:
    """The folder and the file of judgements that `path` names: the only one there is, where it names no split."""
    folder, split = folder_and_split(path)
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{path}: no {folder / name}: name a BEIR folder as FOLDER or FOLDER:SPLIT")
    splits = sorted(file.stem for file in (folder / "qrels").glob("*.tsv"))
    if split is None and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        found = f"its splits are {', '.join(splits)}" if splits else "it has no qrels/*.tsv"
        what = "which split" if split is None else f"no split {split!r}"
        raise UserError(f"{path}: {what}; {found}: name one as {folder}:{(splits or [DEFAULT_SPLIT])[0]}")
    return folder, folder / "qrels" / f"{split}.tsv"


class Lines:
    """The objects of a JSONL file by their `_id`; none of them stays in memory."""

    def __init__(self, path: Path, file: BinaryIO, database: sqlite3.Connection, table: str):
        self.path, self.file, self.database, self.table = path, file, database, table
        self._index()

    def _index(self) -> None:
        offset, number = 0, 0
        for number, line in enumerate(self.file, 1):
            if line.strip():
                where = f"{self.path}:{number}"
                record = json_object(line, where)
                try:
                    self.database.execute(
                        f"INSERT INTO {self.table} VALUES (?, ?, ?)", (beir_name(record, "_id"), number, offset)
                    )
                except sqlite3.IntegrityError:
                    raise UserError(f"{where}: _id {record['_id']!r} stands twice: make ids unique") from None
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
            offset += len(line)

    def __len__(self) -> int:
        return self.database.execute(f"SELECT count(*) FROM {self.table}").fetchone()[0]

    def names(self) -> Iterator[str]:
        """The ids, the greatest first: by their UTF-8 bytes, as trec_eval breaks ties."""
        return (row[0] for row in self.database.execute(f"SELECT id FROM {self.table} ORDER BY id DESC"))

    def text(self, name: str) -> str:
        """The text of one object, its title before it.

        Raises:
            KeyError: no such object.
            UserError: it has no text.
        """
        found = self.database.execute(f"SELECT number, place FROM {self.table} WHERE id = ?", (name,)).fetchone()
        if found is None:
            raise KeyError(name)
        self.file.seek(found[1])
        try:
            return titled_text(json_object(self.file.readline(), ""))
        except UserError as error:
            raise UserError(f"{self.path}:{found[0]}: {error}") from None


def beir_name(record: Record, column: str) -> str:
    require_column(record, column, "the format")
    name = name_of(record, column)
    if not name:
        raise UserError(f"{column} is empty: give it a name")
    return name


def titled_text(record: Record) -> str:
    """`text` after `title`, if there is one, with a space between: as BEIR's and Tevatron's own models read it."""
    title, text = record.get("title"), record.get("text")
    if isinstance(title, str) and title.strip():
        require_column(record, "text", "the format")
        text = f"{title.strip()} {text}" if isinstance(text, str) else text
    return text_of({**record, "text": text} if "text" in record else record, "text", "the format")


@contextmanager
def queries_and_corpus(*paths: Path) -> Iterator[list[Lines]]:
    """The texts of BEIR's two files by their ids.

    Raises:
        UserError: a file that cannot be read, an object without an id, or an id that stands twice.
    """
    columns = "(id TEXT PRIMARY KEY, number INTEGER, place INTEGER) WITHOUT ROWID"
    tables = ("queries", "corpus")
    with ExitStack() as stack:
        database = stack.enter_context(temporary_database(*(f"{table} {columns}" for table in tables)))
        lines = []
        for path, table in zip(paths, tables, strict=True):
            stack.enter_context(readable(path))
            lines.append(Lines(path, stack.enter_context(open(path, "rb")), database, table))
        yield lines


def beir_pairs(path: str | Path, min_relevance: float | None = None) -> Iterator[tuple[int, Record, Path]]:
    """Each judged pair of a folder with its line in the file of judgements.

    Args:
        min_relevance: the lowest judgement that is a match; None: any above 0.
    Raises:
        UserError: no such folder or split, a mistake in a file, an id that is not in corpus or queries.
    """
    folder, qrels = qrels_file(path)
    with queries_and_corpus(folder / "queries.jsonl", folder / "corpus.jsonl") as (queries, corpus):
        for number, row in read_records(qrels, "tsv"):
            where = f"{qrels}:{number}"
            try:
                query, document, score = (beir_name(row, column) for column in QRELS)
                relevance = score_of({"score": score}, "score")
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            match = relevance > 0 if min_relevance is None else relevance >= min_relevance
            record = {
                "text_a": find_text(queries, query, "query", where),
                "text_b": find_text(corpus, document, "document", where),
            }
            yield number, {**record, "label": int(match), "id_a": query, "id_b": document}, qrels


def find_text(lines: Lines, name: str, what: str, where: str) -> str:
    """The text of an id; `where` names it, for the error."""
    try:
        return lines.text(name)
    except KeyError:
        raise UserError(f"{where}: no {what} {shown(name)} in {lines.path.name}: add it or remove the line") from None


def beir_documents(path: str | Path) -> Iterator[tuple[str, str]]:
    """Id and text of every document of a folder that has a text."""
    for _, record in read_records(qrels_file(path)[0] / "corpus.jsonl", "jsonl"):
        try:
            yield beir_name(record, "_id"), titled_text(record)
        except UserError:
            continue  # a document without a text is nobody's partner
