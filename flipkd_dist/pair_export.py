"""Our pairs in the formats of others. Formats that group pairs by their first text keep the order of first appearance;
what a format cannot hold is counted in `lost`, by what it is, for the one who says it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record
from flipkd_dist.temporary_database import digest, temporary_database

OPTIONAL = ("id", "id_a", "id_b", "group_a", "group_b", "kind", "score")
COLUMNS = ("id", "text_a", "text_b", "label", *OPTIONAL[1:])  # of our own format, in this order
HOLDS = {  # which of the optional columns a format can hold
    "pairs": set(OPTIONAL),
    "flagembedding": {"score"},
    "sentence_transformers": {"score"},
    "triplets": set(),
    "tevatron": {"id_a", "id_b"},
    "beir": {"id_a", "id_b"},
    "mteb": set(),
    "faq": {"group_a", "group_b"},
}
TARGETS = tuple(HOLDS)
NESTED = ("flagembedding", "tevatron")  # lists in a record: no CSV or TSV


@dataclass
class Survey:
    """What a first reading of all pairs says about them."""

    pairs: int = 0
    matches: int = 0
    columns: Counter = field(default_factory=Counter)  # how many pairs have each optional column
    scores_agree: bool = True  # every score lies in 0 to 1 and reaches 0.5 where the label is 1

    def add(self, record: Record) -> None:
        self.pairs += 1
        self.matches += record["label"]
        self.columns.update(record.keys() & OPTIONAL)
        if "score" in record:
            score = record["score"]
            self.scores_agree &= 0 <= score <= 1 and int(score >= 0.5) == record["label"]

    def keeps_scores(self, target: str) -> bool:
        """Whether `target` can hold the scores of these pairs."""
        if target == "pairs":
            return True
        complete = 0 < self.columns["score"] == self.pairs
        return "score" in HOLDS[target] and complete and (target == "flagembedding" or self.scores_agree)

    def left_out(self, target: str) -> list[str]:
        """The columns that `target` cannot hold."""
        held = HOLDS[target] - (set() if self.keeps_scores(target) else {"score"})
        return [name for name in OPTIONAL if self.columns[name] and name not in held]


def text_name(record: Record, side: str) -> str:
    """The id of the text `a` or `b`: its own, else 16 hexadecimal digits that depend on the text alone."""
    return record.get(f"id_{side}") or digest(record[f"text_{side}"]).hex()[:16]


def grouped(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """The pairs of each first text, in order of first appearance; one group is held at a time."""
    tables = ("firsts (number INTEGER PRIMARY KEY, key BLOB UNIQUE)", "pairs (first INTEGER, record TEXT)")
    with temporary_database(*tables) as database:
        for record in records:
            key = digest(record["text_a"])
            database.execute("INSERT OR IGNORE INTO firsts (key) VALUES (?)", (key,))
            database.execute("INSERT INTO pairs SELECT number, ? FROM firsts WHERE key = ?", (json.dumps(record), key))
        rows = database.execute("SELECT first, record FROM pairs ORDER BY first, rowid")
        for _, group in groupby(rows, key=lambda row: row[0]):
            pairs = [json.loads(record) for _, record in group]
            yield pairs[0]["text_a"], pairs


def _pairs(records: Iterable[Record], survey: Survey, lost: Counter) -> Iterator[Record]:
    columns = [name for name in COLUMNS if name not in OPTIONAL or survey.columns[name]]
    for record in records:
        yield {name: record[name] for name in columns if name in record}


def _flagembedding(records: Iterable[Record], survey: Survey, lost: Counter) -> Iterator[Record]:
    for query, pairs in grouped(records):
        sides = {"pos": [pair for pair in pairs if pair["label"]], "neg": [pair for pair in pairs if not pair["label"]]}
        if not sides["pos"]:
            lost["queries written without a match: scoring tools take them, trainers do not"] += 1
        row: Record = {"query": query} | {side: [pair["text_b"] for pair in part] for side, part in sides.items()}
        if survey.keeps_scores("flagembedding"):
            row |= {f"{side}_scores": [pair["score"] for pair in part] for side, part in sides.items()}
        yield row


def _tevatron(records: Iterable[Record], survey: Survey, lost: Counter) -> Iterator[Record]:
    for query, pairs in grouped(records):
        passages: dict[int, list[Record]] = {1: [], 0: []}
        for pair in pairs:
            passages[pair["label"]].append({"docid": text_name(pair, "b"), "title": "", "text": pair["text_b"]})
        if not passages[1]:
            lost["queries written without a match, which Tevatron's trainer needs"] += 1
        yield {
            "query_id": text_name(pairs[0], "a"),
            "query": query,
            "positive_passages": passages[1],
            "negative_passages": passages[0],
        }


def _labelled(records: Iterable[Record], survey: Survey, lost: Counter) -> Iterator[Record]:
    column = "score" if survey.keeps_scores("sentence_transformers") else "label"
    for record in records:
        yield {"sentence1": record["text_a"], "sentence2": record["text_b"], column: record[column]}


def _triplets(records: Iterable[Record], survey: Survey, lost: Counter) -> Iterator[Record]:
    """As few rows as show every match and every non-match of an anchor; the shorter list starts anew."""
    for anchor, pairs in grouped(records):
        positives = [pair["text_b"] for pair in pairs if pair["label"]]
        negatives = [pair["text_b"] for pair in pairs if not pair["label"]]
        if not positives or not negatives:
            lost["pairs left out: their first text has only matches or only non-matches"] += len(pairs)
            continue
        for row in range(max(len(positives), len(negatives))):
            yield {
                "anchor": anchor,
                "positive": positives[row % len(positives)],
                "negative": negatives[row % len(negatives)],
            }


def _mteb(records: Iterable[Record], survey: Survey, lost: Counter) -> Iterator[Record]:
    for record in records:
        yield {"sentence1": record["text_a"], "sentence2": record["text_b"], "labels": record["label"]}


def _faq(records: Iterable[Record], survey: Survey, lost: Counter) -> Iterator[Record]:
    """Every text once in each of its groups."""
    with temporary_database("rows (key BLOB PRIMARY KEY) WITHOUT ROWID") as database:
        for record in records:
            if "group_a" not in record or "group_b" not in record:
                lost["pairs left out: a text of theirs has no group"] += 1
                continue
            if (record["group_a"] == record["group_b"]) != bool(record["label"]):
                lost["labels lost: the groups of the two texts say otherwise"] += 1
            for side in "ab":
                row = {"text": record[f"text_{side}"], "group": record[f"group_{side}"]}
                if database.execute("INSERT OR IGNORE INTO rows VALUES (?)", (digest(*row.values()),)).rowcount:
                    yield row


EXPORTERS: dict[str, Callable[[Iterable[Record], Survey, Counter], Iterator[Record]]] = {
    "pairs": _pairs,
    "flagembedding": _flagembedding,
    "sentence_transformers": _labelled,
    "triplets": _triplets,
    "tevatron": _tevatron,
    "mteb": _mteb,
    "faq": _faq,
}


def export_columns(target: str, survey: Survey) -> list[str]:
    """The columns of a file of `target`, in order: what a format without field names in every record needs."""
    score = survey.keeps_scores(target)
    return {
        "pairs": [name for name in COLUMNS if name not in OPTIONAL or survey.columns[name]],
        "flagembedding": ["query", "pos", "neg", *(["pos_scores", "neg_scores"] if score else [])],
        "sentence_transformers": ["sentence1", "sentence2", "score" if score else "label"],
        "triplets": ["anchor", "positive", "negative"],
        "tevatron": ["query_id", "query", "positive_passages", "negative_passages"],
        "mteb": ["sentence1", "sentence2", "labels"],
        "faq": ["text", "group"],
    }[target]


def check_exportable(target: str, survey: Survey, where: Any) -> None:
    """Refuse pairs of which `target` could hold none.

    Raises:
        UserError
    """
    if target == "triplets" and survey.matches == 0:
        raise UserError(f"{where}: no match in it, and triplets need one for each anchor: choose another --to")
    if target == "triplets" and survey.matches == survey.pairs:
        raise UserError(f"{where}: no non-match in it, and triplets need them: add some with --negatives")
    if target == "faq" and not (survey.columns["group_a"] and survey.columns["group_b"]):
        raise UserError(f"{where}: no group_a and group_b in it, of which faq consists: choose another --to")
