"""Queries with the candidates to rank: lists in a JSONL or Parquet file, or a TREC run with BEIR's files of texts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from flipkd_dist.beir_folder import Lines, find_text, queries_and_corpus
from flipkd_dist.errors import UserError
from flipkd_dist.key_table import KeyTable
from flipkd_dist.pair_fields import Record, name_of, require_column, shown, text_of
from flipkd_dist.pair_files import file_format, readable, stream_places
from flipkd_dist.record_writer import num_characters
from flipkd_dist.temporary_database import digest

RUN_FIELDS = 6  # query, Q0, document, rank, score, tag


@dataclass(frozen=True)
class CandidateList:
    """A query and its candidates."""

    record: Record  # that the ranking is added to
    query: str
    query_id: str  # "" where there is none
    candidates: list[str]
    ids: list[str]  # of the candidates, "" where one has none
    where: str  # file and line that it begins at

    @property
    def texts(self) -> list[str]:
        return [self.query, *self.candidates]

    @property
    def num_characters(self) -> int:
        """Of all that is held: the record has the texts in it, or they come from a corpus."""
        return max(num_characters(self.record), sum(map(len, self.texts)))


def read_lists(source: Path, text_a: str = "text_a", candidates: str = "candidates") -> Iterator[CandidateList]:
    """Each record of a JSONL or Parquet file: a query and a list of candidates, texts or `{"id", "text"}`.

    Raises:
        UserError: a record that is something else, with its place.
    """
    if file_format(source) not in ("jsonl", "parquet"):
        raise UserError(f"--input {source}: CSV and TSV hold no lists of candidates: use JSONL or Parquet")
    for where, fields in stream_places(source, partial(_list_of, text_a=text_a, candidates=candidates)):
        yield CandidateList(*fields, where)


def _list_of(record: Record, text_a: str, candidates: str) -> tuple[Record, str, str, list[str], list[str]]:
    query = text_of(record, text_a, "--text-a")
    require_column(record, candidates, "--candidates")
    given = record[candidates]
    if not isinstance(given, list):
        raise UserError(f"{candidates} is {shown(given)}, not a list: write a list of texts, empty if there are none")
    texts, ids = [], []
    for number, one in enumerate(given):
        name = f"{candidates}[{number}]"
        is_object = isinstance(one, dict)
        if is_object:
            require_column(one, "text", name)
        texts.append(text_of({name: one["text"] if is_object else one}, name, "--candidates"))
        ids.append(name_of(one, "id") if is_object else "")
    return record, query, name_of(record, "id"), texts, ids


@contextmanager
def run_reader(run: Path, queries: Path, corpus: Path) -> Iterator[Callable[[], Iterator[CandidateList]]]:
    """A function that reads a TREC run with the texts of its queries and documents; of these only places are held.

    Args:
        queries, corpus: JSONL with `_id`, `text` and maybe `title`, as BEIR has them.
    Raises:
        UserError: a mistake in a file, or an id of the run without a text.
    """
    with queries_and_corpus(queries, corpus) as (query_lines, corpus_lines):
        yield partial(_read_run, run, query_lines, corpus_lines)


def _read_run(run: Path, queries: Lines, corpus: Lines) -> Iterator[CandidateList]:
    with KeyTable() as seen:
        for query_id, members in groupby(_run_lines(run), key=lambda member: member[0]):
            ids, texts, places = [], [], {}
            for _, document, where in members:
                if document in places:
                    raise UserError(f"{where}: document {shown(document)} stands twice for a query: remove one line")
                places[document] = where
                ids.append(document)
                texts.append(find_text(corpus, document, "document", where))
            first = places[ids[0]]
            if not seen.add(digest(query_id)):
                raise UserError(f"{first}: query {shown(query_id)} stood further up: sort the run by query")
            query = find_text(queries, query_id, "query", first)
            yield CandidateList({"id": query_id, "text_a": query}, query, query_id, texts, ids, first)


def _run_lines(run: Path) -> Iterator[tuple[str, str, str]]:
    """Query, document and place of each line."""
    with readable(run), open(run, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if fields and len(fields) != RUN_FIELDS:
                raise UserError(
                    f"{run}:{number}: fields found: {len(fields)}, a line of a TREC run has {RUN_FIELDS}: "
                    "write QUERY Q0 DOCUMENT RANK SCORE TAG"
                )
            if fields:
                yield fields[0], fields[2], f"{run}:{number}"
