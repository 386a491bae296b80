"""What need not fit into memory: SQLite tables in a file without a name, gone when they are closed."""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from flipkd_dist.errors import UserError

CACHE_KIB = 16 * 1024  # smaller tables never reach the disk


@contextmanager
def temporary_database(*tables: str) -> Iterator[sqlite3.Connection]:
    """A private database with these tables (CREATE statements), in SQLITE_TMPDIR, TMPDIR or the system's place.

    Raises:
        UserError: no room for it.
    """
    database = sqlite3.connect("", isolation_level=None)
    try:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KIB}"):
            database.execute(f"PRAGMA {pragma}")
        for table in tables:
            database.execute(f"CREATE TABLE {table}")
        database.execute("BEGIN")  # one transaction: a commit for each row would cost most of the time
        yield database
    except sqlite3.OperationalError as error:
        raise UserError(f"temporary index: {error}: free space, or set TMPDIR to a folder that has some") from None
    finally:
        database.close()


def digest(*texts: str) -> bytes:
    """16 bytes that stand for texts in an index."""
    return hashlib.blake2b("\0\0".join(texts).encode(), digest_size=16).digest()
