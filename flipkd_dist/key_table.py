"""Which keys have been seen, of any number of them: a table on local disk, gone with its process."""

from typing import Self

from flipkd_dist.temporary_database import digest, temporary_database


class KeyTable:
    """Keys and where they came first, in a temporary database: about 40 bytes a key besides what is kept with it.

    A context manager, gone when it is left.

    Raises:
        UserError: when it is left, where there was no room.
    """

    def __enter__(self) -> Self:
        self._open = temporary_database("seen (key BLOB PRIMARY KEY, value) WITHOUT ROWID")
        self._database = self._open.__enter__()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._open.__exit__(*error)  # which turns SQLite's word for a full disk into ours

    def add(self, key: bytes, value: str | None = None) -> bool:
        """Whether the key is new; it keeps the value that it came with first."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, value)).rowcount == 1

    def setdefault(self, name: str, value: str) -> str:
        """The value that the name came with first, as of a dict."""
        key = digest(name)
        if self.add(key, value):
            return value
        return self._database.execute("SELECT value FROM seen WHERE key = ?", (key,)).fetchone()[0]
