"""Non-matches for pairs that hold matches alone: random second texts that are not known to match the first."""

import random
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flipkd_dist.pair_fields import Record
from flipkd_dist.temporary_database import digest

TABLES = (
    "pool (number INTEGER PRIMARY KEY, key BLOB UNIQUE, text TEXT, name TEXT, grp TEXT)",
    "known (key BLOB PRIMARY KEY) WITHOUT ROWID",
    "drawn (key BLOB PRIMARY KEY) WITHOUT ROWID",
)


class Partner(NamedTuple):
    text: str
    name: str | None = None  # its id
    group: str | None = None


class RandomPartners:
    def __init__(self, database: sqlite3.Connection, records: Iterable[Record], documents: Iterable[tuple[str, str]]):
        """Know the pairs and the texts that may become partners.

        Args:
            database: with TABLES; texts and pairs lie there, not in memory.
            records: all pairs; their labelled partners are never drawn, whatever the label.
            documents: id and text of further texts to draw from, such as those of a corpus.
        """
        self.database = database
        for record in records:
            self._offer(Partner(record["text_b"], record.get("id_b"), record.get("group_b")))
            database.execute("INSERT OR IGNORE INTO known VALUES (?)", (_pair(record["text_a"], record["text_b"]),))
        for name, text in documents:
            self._offer(Partner(text, name))
        self.size = database.execute("SELECT COUNT(*) FROM pool").fetchone()[0]

    def _offer(self, partner: Partner) -> None:
        self.database.execute(
            "INSERT OR IGNORE INTO pool (key, text, name, grp) VALUES (?, ?, ?, ?)", (digest(partner.text), *partner)
        )

    def after_matches(self, records: Iterable[Record], count: int, seed: int, lost: Counter) -> Iterator[Record]:
        """The pairs, each match followed by up to `count` non-matches of kind `random`; none is drawn twice.

        Args:
            seed: the only source of chance; the same pairs and seed give the same records.
            lost: gains the number of non-matches that could not be found.
        """
        chance = random.Random(seed)
        self.database.execute("DELETE FROM drawn")
        for record in records:
            yield record
            if record["label"]:
                partners = self._draw(record, count, chance)
                lost["non-matches not made: too few texts to draw from"] += count - len(partners)
                for partner in partners:
                    yield _non_match(record, partner)

    def _draw(self, record: Record, count: int, chance: random.Random) -> list[Partner]:
        width = 4 * count + 16
        while True:  # a wider draw only where nearly all texts match
            numbers = chance.sample(range(1, self.size + 1), min(width, self.size))
            found: list[Partner] = []
            for number in numbers:
                if len(found) == count:
                    break
                row = self.database.execute("SELECT text, name, grp FROM pool WHERE number = ?", (number,)).fetchone()
                if self._may_join(record, Partner(*row)):
                    found.append(Partner(*row))
            if len(found) == count or width >= self.size:
                break
            width *= 8
        for partner in found:
            self.database.execute("INSERT INTO drawn VALUES (?)", (_pair(record["text_a"], partner.text),))
        return found

    def _may_join(self, record: Record, partner: Partner) -> bool:
        if partner.text == record["text_a"] or (partner.group and partner.group == record.get("group_a")):
            return False
        key = (_pair(record["text_a"], partner.text),)
        query = "SELECT 1 FROM {} WHERE key = ?"
        return not any(self.database.execute(query.format(table), key).fetchone() for table in ("known", "drawn"))


def _pair(one: str, other: str) -> bytes:
    """One key for two texts in either order."""
    return digest(*sorted((one, other)))


def _non_match(record: Record, partner: Partner) -> Record:
    made = {"text_a": record["text_a"], "text_b": partner.text, "label": 0, "kind": "random"}
    more = {"id_b": partner.name, "group_b": partner.group}
    more |= {key: record.get(key) for key in ("id_a", "group_a")}
    return made | {key: value for key, value in more.items() if value}
