"""One record of FlagEmbedding, Sentence-Transformers, Tevatron or MTEB as records of our own (see pair_formats)."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from flipkd_dist.beir_folder import titled_text
from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import LABELS, Record, label_of, name_of, require_column, score_of, shown, text_of

LABEL_COLUMNS = ("label", "labels", "score", "scores")  # what Sentence-Transformers takes for a label, not a text
FIELDS = {
    "pairs": "text_a text_b label score id id_a id_b group_a group_b kind",
    "flagembedding": "query pos neg pos_scores neg_scores",
    "tevatron": "query_id query positive_passages negative_passages",
    "mteb": "sentence1 sentence2 sent1 sent2 labels label score",
    "faq": "text group",
}


def unread_fields(record: Record, format: str) -> list[str]:
    """The fields of a record that its importer has no use for, such as FlagEmbedding's `prompt`."""
    if format == "sentence_transformers":
        labels = [name for name in record if name in LABEL_COLUMNS][:1]
        read = {*labels, *_input_columns(record)}
    else:
        read = {*FIELDS.get(format, "").split()}
    return [str(name) for name in record if name not in read]


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
        texts, scores = _list(raw, column, label == 1 and "neg" not in raw), _list(raw, f"{column}_scores", False)
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


class SentenceTransformers:
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


IMPORTERS: dict[str, Callable[[Record], Iterator[Record]]] = {
    "flagembedding": _flagembedding,
    "tevatron": _tevatron,
    "mteb": _mteb,
}
