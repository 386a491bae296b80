"""Which keys have been seen, of any number of them: a table on local disk, gone with its process."""

import hashlib
import sqlite3

CACHE_KIB = 32 * 1024  # what the table keeps in memory, however many keys there are


class KeyTable:
    """Keys and whole numbers; SQLite's database without a name, which is removed however the process ends.

    It lies in SQLITE_TMPDIR or TMPDIR, else in /var/tmp: about 40 bytes a key.
    """

    def __init__(self):
        self._database = sqlite3.connect("", isolation_level=None)
        for setting in (f"cache_size = -{CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, value INTEGER) WITHOUT ROWID")
        self._database.execute("BEGIN")  # one transaction: a commit for each key would cost more than the key

    def add(self, key: bytes, value: int = 0) -> bool:
        """Whether the key is new; it keeps the value that it came with first."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, value)).rowcount == 1

    def setdefault(self, name: str, value: int) -> int:
        """The value that the name came with first, as of a dict."""
        key = hashlib.blake2b(name.encode(), digest_size=16).digest()
        if self.add(key, value):
            return value
        return self._database.execute("SELECT value FROM seen WHERE key = ?", (key,)).fetchone()[0]

    def close(self) -> None:
        self._database.close()
