"""The fields of a record: texts, labels and names, checked one by one. Errors say what and how to mend it; the
reader of the file adds the place."""

import difflib
import math
import re
import reprlib
from typing import Any

from flipkd_dist.errors import UserError

Record = dict[str, Any]

# True == 1 == 1.0, so three spellings share an entry; delimited files hold all of them as texts.
LABELS = {0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def require_column(record: Record, column: str, setting: str) -> None:
    """Raise UserError if `record` lacks `column`; `setting` is what the user sets to name the column."""
    if column in record:
        return
    near = difflib.get_close_matches(column, map(str, record), n=1, cutoff=0)
    present = f"it has {', '.join(map(str, record))}; the nearest is {near[0]}" if near else "it has none"
    raise UserError(" ".join(f"no column {column}; {present}: correct the file or {setting}".split()))


def text_of(record: Record, column: str, setting: str) -> str:
    """The text in a column without surrounding whitespace.

    Raises:
        UserError: no such column, not a text, or nothing to see in it.
    """
    require_column(record, column, setting)
    text = record[column]
    if not isinstance(text, str):
        raise UserError(f"{column} is {shown(text)}, not a text: write a text in quotes or remove the record")
    text = text.strip()
    if not any(map(str.isprintable, text)):
        raise UserError(f"{column} is empty: fill it in or remove the record")
    return _writable(text, column)


def label_of(record: Record, column: str, setting: str) -> int:
    """The label in a column: 1 = match, 0 = none.

    Raises:
        UserError: no such column, or neither 0 nor 1.
    """
    require_column(record, column, setting)
    label = record[column]
    if isinstance(label, str):
        label = label.strip().lower()
    if not isinstance(label, str | int | float) or label not in LABELS:
        raise UserError(f"{column} is {shown(record[column])}: write 0 or 1 (1 = match)")
    return LABELS[label]


def name_of(record: Record, column: str) -> str:
    """The id, group or kind in an optional column, a number as its digits; "" where there is none.

    Raises:
        UserError: neither a text nor a number.
    """
    name = record.get(column)
    if name is None or name != name:  # pandas writes a missing name as NaN
        return ""
    if isinstance(name, float):
        return f"{name:.17g}"  # pandas turns whole numbers into floats where one is missing
    if not isinstance(name, str | int):
        raise UserError(f"{column} is {shown(name)}: write a text or a number")
    return _writable(str(name).strip(), column)


def _writable(text: str, column: str) -> str:
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # JSON can escape what no UTF-8 file can hold
        raise UserError(f"{column} holds half of a surrogate pair: correct its \\u escapes")
    return text


def score_of(record: Record, column: str) -> float | None:
    """The score in an optional column; None where there is none.

    Raises:
        UserError: not a finite number.
    """
    score = record.get(column)
    if score is None or score != score or score == "":  # NaN: a missing number of pandas
        return None
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(score, bool) or not math.isfinite(number):
        raise UserError(f"{column} is {shown(score)}: write a number")
    return number


def text_and_group(
    record: Record, text_column: str, group_column: str, settings: tuple[str, str] = ("--text", "--group")
) -> tuple[str, str]:
    """The text of a record and the group that it stands in, both required; `settings` name the columns."""
    require_column(record, group_column, settings[1])
    text, group = text_of(record, text_column, settings[0]), name_of(record, group_column)
    if not group:
        raise UserError(f"{group_column} is empty: fill it in or remove the record")
    return text, group


def shown(value: object) -> str:
    """A value as an error shows it: short, on one line."""
    return "null" if value is None else " ".join(reprlib.repr(value).split())
