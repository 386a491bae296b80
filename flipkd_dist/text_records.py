"""Records of one text each: with a name, or with the group that people put it in."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flipkd_dist.errors import UserError
from flipkd_dist.pair_fields import Record, name_of, require_column, text_and_group, text_of
from flipkd_dist.pair_files import stream_places


@dataclass(frozen=True)
class NamedText:
    """A text, what it is called ("" where it has no name) and where it stands, for errors."""

    name: str
    text: str
    where: str

    @property
    def texts(self) -> tuple[str]:
        return (self.text,)

    @property
    def num_characters(self) -> int:
        return len(self.text)


def read_named(source: Path, text: str, name: str | None) -> Iterator[NamedText]:
    """Each record of a file.

    Args:
        name: the column of names, then required; None: `id`, where a record has it.
    Raises:
        UserError: a record without a text or, where one is asked for, a name.
    """

    def fields(record: Record) -> tuple[str, str]:
        if name is not None:
            require_column(record, name, "--id")
        found = name_of(record, name or "id")
        if name is not None and not found:
            raise UserError(f"{name} is empty: fill it in or leave --id out")
        return found, text_of(record, text, "--text")

    return (NamedText(*found, where) for where, found in stream_places(source, fields))


def read_grouped(source: Path, text: str, group: str) -> Iterator[NamedText]:
    """Each record of a file; its group is the name.

    Raises:
        UserError: a record without a text or a group.
    """
    found = stream_places(source, text_and_group, text, group)
    return (NamedText(name, text, where) for where, (text, name) in found)
