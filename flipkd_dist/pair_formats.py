"""Pairs in the formats that people already have, one after the other as records of our own.

A record holds text_a, text_b (without surrounding whitespace) and label, and whatever of these the format has: score,
id, id_a and id_b (names of the two texts), group_a, group_b, kind. The names of fields are those that the projects
document: FlagEmbedding (fine-tuning data), Sentence-Transformers (dataset format), Tevatron (training data), BEIR
(custom datasets), MTEB (pair classification).
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flipkd_dist.beir_folder import beir_pairs, is_beir_folder, titled_text
from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import LABELS, Record, label_of, name_of, require_column, score_of, shown, text_of
from flipkd_dist.pair_files import EXTENSIONS, HUB_ID, file_format, place, read_records

FOREIGN = ("flagembedding", "sentence_transformers", "tevatron", "beir", "mteb")
LABEL_COLUMNS = ("label", "labels", "score", "scores")  # what Sentence-Transformers takes for a label, not a text
NAMES = ("id", "id_a", "id_b", "group_a", "group_b", "kind")
SIGNS = {  # fields by which a record is known, the most telling first
    "tevatron": ({"query", "positive_passages"},),
    "flagembedding": ({"query", "pos"},),
    "mteb": ({"sentence1", "sentence2", "labels"}, {"sent1", "sent2", "labels"}),
    "sentence_transformers": ({"sentence1", "sentence2"}, {"anchor", "positive"}),
}


class Place(NamedTuple):
    """Where a pair stands; as text, `pairs.csv:12`."""

    path: str | Path
    number: int
    format: str  # of the file: jsonl, csv, tsv, parquet or hub

    def __str__(self) -> str:
        return place(*self)


def pair_records(
    path: str | Path, data: DataConfig, setting: str = "data.format", needs_label: bool = True
) -> Iterator[tuple[int | str, Record, Place]]:
    """Each pair of a file, a folder or a hub split in the format `data.format`; never more than a line is held.

    Args:
        setting: what the user sets to name the format, for errors.
        needs_label: False reads our own columns without a label too; the record has none then.
    Returns:
        Of each pair its number, unique in the file (the line; `line.k` where a line holds several pairs), its record
        and its place.
    Raises:
        UserError: the first mistake, with file and line.
    """
    renamed = [key for key in ("text_a", "text_b", "label") if getattr(data, key) != key]
    if data.format in FOREIGN and renamed:
        raise UserError(
            f"data.{renamed[0]}: {getattr(data, renamed[0])} has no effect where data.format is {data.format}: remove it"
        )
    if data.format == "beir":
        for number, record, qrels in beir_pairs(path):
            yield number, record, Place(qrels, number, "tsv")
        return
    container = _container(path, data.format, setting)
    unpack = _UNPACK.get(data.format) or _own_columns(data, setting, needs_label)
    if data.format == "sentence_transformers":
        unpack = _Triplets()
    for number, raw in read_records(path, container):
        where = Place(path, number, container)
        try:
            records = list(unpack(raw))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for k, record in enumerate(records, 1):
            yield (number if len(records) == 1 else f"{number}.{k}"), record, where


def pair_id(record: Record, number: int | str, prefix: str) -> str:
    """The id of a pair: its own, else one of the ids of its texts, else of its number; unlike in files of unlike prefix."""
    if record.get("id"):
        return record["id"]
    ids = f"{record['id_a']}/{record['id_b']}" if record.get("id_a") and record.get("id_b") else number
    return f"{prefix}:{ids}"


def look(record: Record) -> str | None:
    """The format that a record looks like."""
    return next((name for name, signs in SIGNS.items() for sign in signs if sign <= record.keys()), None)


def _container(path: str | Path, format: str, setting: str) -> str:
    """The form of the file itself: the extension's; JSONL where a format that is JSONL has another extension."""
    if format not in FOREIGN:
        if format == "auto" and (is_beir_folder(path) or is_beir_folder(str(path).rpartition(":")[0] or path)):
            raise UserError(f"{path}: this is a BEIR folder: set {setting} to beir")
        return file_format(path, format)
    if format in ("flagembedding", "tevatron") and Path(path).is_file() and Path(path).suffix not in EXTENSIONS:
        return "jsonl"
    return "hub" if HUB_ID.fullmatch(str(path)) and not Path(path).exists() else file_format(path)


def _own_columns(data: DataConfig, setting: str, needs_label: bool) -> Callable[[Record], Iterator[Record]]:
    column_of = {"text_a": data.text_a, "text_b": data.text_b, "label": data.label}
    settings = {key: f"data.{key}" if setting == "data.format" else setting for key in column_of}

    def unpack(raw: Record) -> Iterator[Record]:
        if data.text_a not in raw and (format := look(raw)):
            raise UserError(f"no column {data.text_a}; this looks like {format}: set {setting} to {format}")
        record = {key: text_of(raw, column_of[key], settings[key]) for key in ("text_a", "text_b")}
        if needs_label or column_of["label"] in raw:
            record["label"] = label_of(raw, column_of["label"], settings["label"])
        yield record | _optional(raw)

    return unpack


def _optional(raw: Record) -> Record:
    """What a record may have beside texts and label."""
    found = {key: name_of(raw, key) for key in NAMES if key in raw}
    found["score"] = score_of(raw, "score")
    return {key: value for key, value in found.items() if value not in ("", None)}


def _list(record: Record, column: str, required: bool) -> list[Any]:
    if not required and record.get(column) is None:
        return []
    require_column(record, column, "the format")
    if not isinstance(record[column], list):
        raise UserError(f"{column} is {shown(record[column])}, not a list: write it in [ ]")
    return record[column]


def _flagembedding(raw: Record) -> Iterator[Record]:
    query = text_of(raw, "query", "the format")
    for column, label in (("pos", 1), ("neg", 0)):
        texts, scores = _list(raw, column, label == 1), _list(raw, f"{column}_scores", False)
        if scores and len(scores) != len(texts):
            raise UserError(f"{column} has {len(texts)} texts, {column}_scores {len(scores)} numbers: score each text")
        for k, text in enumerate(texts):
            at = f"{column}[{k}]"
            record = {"text_a": query, "text_b": text_of({at: text}, at, "the format"), "label": label}
            at = f"{column}_scores[{k}]"
            score = score_of({at: scores[k]}, at) if scores else None
            yield record if score is None else {**record, "score": score}


def _tevatron(raw: Record) -> Iterator[Record]:
    query, query_id = text_of(raw, "query", "the format"), name_of(raw, "query_id")
    for column, label in (("positive_passages", 1), ("negative_passages", 0)):
        for k, passage in enumerate(_list(raw, column, label == 1)):
            if not isinstance(passage, dict):
                raise UserError(f"{column}[{k}] is {shown(passage)}: write an object with docid, title and text")
            try:
                text, names = titled_text(passage), {"id_a": query_id, "id_b": name_of(passage, "docid")}
            except UserError as error:
                raise UserError(f"{column}[{k}]: {error}") from None
            yield {"text_a": query, "text_b": text, "label": label} | {key: name for key, name in names.items() if name}


def _mteb(raw: Record) -> Iterator[Record]:
    """A row of a pair set, or all of them: sets of older make hold three lists in one record."""
    columns = ("sent1", "sent2") if "sent1" in raw and "sentence1" not in raw else ("sentence1", "sentence2")
    columns = (*columns, next((name for name in ("labels", "label", "score") if name in raw), "labels"))
    for column in columns:
        require_column(raw, column, "the format")
    values = [raw[column] for column in columns]
    if not any(isinstance(value, list) for value in values):
        yield _mteb_pair(raw, columns)
        return
    if not all(isinstance(value, list) for value in values) or len({len(value) for value in values}) > 1:
        raise UserError(f"{', '.join(columns)}: lists of unequal length: write as many texts as labels")
    for k, row in enumerate(zip(*values, strict=True)):
        names = tuple(f"{column}[{k}]" for column in columns)
        yield _mteb_pair(dict(zip(names, row, strict=True)), names)


def _mteb_pair(row: Record, columns: tuple[str, str, str]) -> Record:
    text_a, text_b = (text_of(row, column, "the format") for column in columns[:2])
    return {"text_a": text_a, "text_b": text_b, "label": label_of(row, columns[2], "the format")}


class _Triplets:
    """Sentence-Transformers rows; a pair that stands again in the next rows of the same anchor counts once."""

    def __init__(self):
        self.anchor, self.seen = None, set()

    def __call__(self, raw: Record) -> Iterator[Record]:
        if any(name in raw for name in LABEL_COLUMNS):
            yield _labelled_pair(raw)
            return
        anchor, positive, *negatives = _input_columns(raw)
        text_a = text_of(raw, anchor, "the format")
        if text_a != self.anchor:
            self.anchor, self.seen = text_a, set()
        for column in (positive, *negatives):
            text_b = text_of(raw, column, "the format")
            if (text_b, column == positive) not in self.seen:
                self.seen.add((text_b, column == positive))
                yield {"text_a": text_a, "text_b": text_b, "label": int(column == positive)}


def _input_columns(raw: Record) -> list[str]:
    """The columns of the texts: known by their names, else by their order, as the library reads them."""
    negatives = [name for name in raw if re.fullmatch(r"negative(_\d+)?", str(name))]
    for first, second in (("sentence1", "sentence2"), ("anchor", "positive")):
        if {first, second} <= raw.keys():
            return [first, second, *(negatives if second == "positive" else [])]
    columns = [name for name in raw if name not in LABEL_COLUMNS]
    if len(columns) < 2:
        raise UserError(f"fewer than two columns of texts; it has {', '.join(map(str, raw))}: name another file")
    return columns


def _labelled_pair(raw: Record) -> Record:
    """A pair with a class (an integer 0 or 1) or a similarity from 0 to 1: match from 0.5 on, and the score is kept."""
    text_a, text_b, *more = _input_columns(raw)
    if more:
        raise UserError(f"a label beside {len(more) + 2} columns of texts: give pairs or unlabelled triplets")
    record = {"text_a": text_of(raw, text_a, "the format"), "text_b": text_of(raw, text_b, "the format")}
    column = next(name for name in LABEL_COLUMNS if name in raw)
    value = raw[column].strip().lower() if isinstance(raw[column], str) else raw[column]
    is_class = isinstance(value, int) or (isinstance(value, str) and "." not in value and value in LABELS)
    if is_class and column.startswith("label"):
        return {**record, "label": label_of(raw, column, "the format")}
    score = score_of(raw, column)
    if score is None or not 0 <= score <= 1:
        raise UserError(f"{column} is {shown(raw[column])}: write a class 0 or 1, or a similarity scaled to 0 to 1")
    return {**record, "label": int(score >= 0.5), "score": score}


_UNPACK = {"flagembedding": _flagembedding, "tevatron": _tevatron, "mteb": _mteb}
