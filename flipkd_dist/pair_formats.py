"""Pairs in the formats that people already have, one after the other as records of our own.

A record holds text_a, text_b (without surrounding whitespace) and label, and whatever of these the format has: score,
id, id_a and id_b (names of the two texts), group_a, group_b, kind. The names of fields are those that the projects
document: FlagEmbedding (fine-tuning data), Sentence-Transformers (dataset format), Tevatron (training data), BEIR
(custom datasets), MTEB (pair classification).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from flipkd_dist.beir_folder import beir_pairs, is_beir_folder
from flipkd_dist.config import DataConfig
from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record, label_of, name_of, score_of, text_of
from flipkd_dist.pair_files import EXTENSIONS, HUB_ID, file_format, place, read_records
from flipkd_dist.pair_importers import IMPORTERS, SentenceTransformers

SOURCES = ("auto", "pairs", "flagembedding", "sentence_transformers", "tevatron", "beir", "mteb", "faq")
FOREIGN = ("flagembedding", "sentence_transformers", "tevatron", "beir", "mteb")
NAMES = ("id", "id_a", "id_b", "group_a", "group_b", "kind")
SIGNS = {  # fields by which a record is known, the most telling first
    "tevatron": ({"query", "positive_passages"},),
    "flagembedding": ({"query", "pos"}, {"query", "neg"}),
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
            f"data.{renamed[0]}: {getattr(data, renamed[0])}: no effect where data.format is {data.format}: remove it"
        )
    if data.format == "beir":
        for number, record, qrels in beir_pairs(path):
            yield number, record, Place(qrels, number, "tsv")
        return
    container = _container(path, data.format, setting)
    unpack = IMPORTERS.get(data.format) or _own_columns(data, setting, needs_label)
    if data.format == "sentence_transformers":
        unpack = SentenceTransformers()
    for number, raw in read_records(path, container):
        where = Place(path, number, container)
        try:
            records = list(unpack(raw))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for k, record in enumerate(records, 1):
            yield (number if len(records) == 1 else f"{number}.{k}"), record, where


def pair_id(record: Record, number: int | str, prefix: str) -> str:
    """The id of a pair: its own, else one made of the ids of its texts, else of its number, after `prefix`."""
    if record.get("id"):
        return record["id"]
    ids = f"{record['id_a']}/{record['id_b']}" if record.get("id_a") and record.get("id_b") else number
    return f"{prefix}:{ids}"


def look(record: Record) -> str | None:
    """The format that a record looks like."""
    return next((name for name, signs in SIGNS.items() for sign in signs if sign <= record.keys()), None)


def first_record(path: str | Path, format: str = "auto") -> Record:
    """The first record of a file as it stands there; empty where there is none, or a folder."""
    if format == "beir":
        return {}
    return next(read_records(path, _container(path, format, "--from")), (0, {}))[1]


def _container(path: str | Path, format: str, setting: str) -> str:
    """The form of the file itself: the extension's; JSONL where a format that is JSONL has another extension."""
    if format not in FOREIGN:
        format = "auto" if format in SOURCES else format  # pairs and faq do not say of what form the file is
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
