"""A BEIR folder for retrieval: its documents as numbered rows, and the queries that somebody judged.

Row 0 is the document with the greatest id. Of two documents with one score the lower row comes first then, which is how
trec_eval breaks ties. Of texts only places are held, ids and judgements stand in a temporary database.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flipkd_dist.beir_folder import QRELS, Lines, beir_name, find_text, qrels_file, queries_and_corpus
from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record, score_of, shown
from flipkd_dist.pair_files import read_records
from flipkd_dist.text_records import NamedText

TABLES = (
    "judged (query TEXT, document TEXT, grade INTEGER, line INTEGER, PRIMARY KEY (query, document)) WITHOUT ROWID",
    "rows (row INTEGER PRIMARY KEY, id TEXT)",
)
RELEVANT = "SELECT DISTINCT query FROM judged WHERE grade > 0"


class JudgedFolder:
    """What `judged_folder` opens.

    Attributes:
        num_documents: rows, of documents that have a text.
        num_without_text: documents that have none, and are left out.
        queries: ids of the queries with a relevant document, in their order.
        num_left_out: the folder's other queries.
        num_missing: relevant documents of these queries that are not among the rows; nobody can find them.
    """

    def __init__(self, path: str | Path, qrels: Path, queries: Lines, corpus: Lines):
        self._queries, self._corpus, self._qrels = queries, corpus, qrels
        self._database: sqlite3.Connection = corpus.database
        for table in TABLES:
            self._database.execute(f"CREATE TABLE {table}")
        self._read_judgements()
        self.queries = [row[0] for row in self._database.execute(f"{RELEVANT} ORDER BY query")]
        if not self.queries:
            raise UserError(
                f"{path}: no query has a relevant document (a score above 0) in {qrels}: name another split"
            )
        self._check_names(self.queries, "query")
        self.num_left_out = len(queries) - len(self.queries)
        self.num_documents = self._number_documents()
        if not self.num_documents:
            raise UserError(f"{path}: no document in corpus.jsonl has a text: name another folder")
        self.num_without_text = len(corpus) - self.num_documents
        [(self.num_missing,)] = self._database.execute(
            "SELECT count(*) FROM judged WHERE grade > 0 AND document NOT IN (SELECT id FROM rows)"
        )
        for _ in self.query_texts():  # a judged query without a text is told now
            pass

    def _read_judgements(self) -> None:
        for number, row in read_records(self._qrels, "tsv"):
            where = f"{self._qrels}:{number}"
            try:
                query, document, _ = (beir_name(row, column) for column in QRELS)
                grade = _grade(row)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            try:
                self._database.execute("INSERT INTO judged VALUES (?, ?, ?, ?)", (query, document, grade, number))
            except sqlite3.IntegrityError:
                raise UserError(
                    f"{where}: document {shown(document)} is judged twice for query {shown(query)}: remove one line"
                ) from None

    def _number_documents(self) -> int:
        """Give every document with a text its row; the number of rows."""
        count = 0
        for name in self._corpus.names():
            try:
                self._corpus.text(name)
            except UserError:
                continue
            self._check_names([name], "document")
            self._database.execute("INSERT INTO rows VALUES (?, ?)", (count, name))
            count += 1
        return count

    def _check_names(self, names: list[str], what: str) -> None:
        for name in names:
            if len(name.split()) > 1:
                raise UserError(f"{what} {shown(name)}: an id with a space, which a TREC run cannot hold: rename it")

    def query_texts(self) -> Iterator[NamedText]:
        """The texts of `queries`, in their order."""
        for name in self.queries:
            [(line,)] = self._database.execute("SELECT min(line) FROM judged WHERE query = ?", (name,))
            text = find_text(self._queries, name, "query", f"{self._qrels}:{line}")
            yield NamedText(name, text, f"{self._queries.path}: query {shown(name)}")

    def document_texts(self) -> Iterator[NamedText]:
        """The texts of the rows, in their order."""
        for row in range(self.num_documents):
            name = self.document_id(row)
            yield NamedText(name, self._corpus.text(name), f"{self._corpus.path}: document {shown(name)}")

    def document_text(self, row: int) -> str:
        return self._corpus.text(self.document_id(row))

    def document_id(self, row: int) -> str:
        return self._database.execute("SELECT id FROM rows WHERE row = ?", (int(row),)).fetchone()[0]

    def judgements(self, query: str) -> dict[str, int]:
        """The grades of a query's judged documents."""
        return dict(self._database.execute("SELECT document, grade FROM judged WHERE query = ?", (query,)))


def _grade(row: Record) -> int:
    grade = score_of(row, "score")
    if grade is None or grade != int(grade):
        raise UserError(f"score is {shown(row['score'])}: write a whole number, relevant above 0")
    return int(grade)


@contextmanager
def judged_folder(path: str | Path) -> Iterator[JudgedFolder]:
    """A BEIR folder `FOLDER` or `FOLDER:SPLIT`, read and checked once from end to end.

    Raises:
        UserError: no such folder or split, or a mistake in a file of it.
    """
    folder, qrels = qrels_file(path)
    with queries_and_corpus(folder / "queries.jsonl", folder / "corpus.jsonl") as (queries, corpus):
        yield JudgedFolder(path, qrels, queries, corpus)
