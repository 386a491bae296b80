"""A stream of texts of any length, cut into shards that depend on the texts alone: not on workers, not on time.

So a job that was killed finds, when it runs again, whole shards done and whole shards missing, and scores the missing
ones in the very same company: a store that was interrupted equals an undisturbed one bit for bit.
"""

from collections.abc import Iterable, Iterator

from flipkd_dist.key_table import KeyTable
from flipkd_dist.store import normalised, text_key

WINDOW = 65_536  # texts that are sorted by length together
WINDOW_CHARACTERS = 2**27  # at most, and one text: very long texts do not fill the memory
SHARDS_PER_WINDOW = 32  # of a small job: enough for many workers
MULTIPLE, LARGEST = 64, 2048  # texts of a shard: whole batches, and not more than a killed worker may lose


def windows(texts: Iterable[str]) -> Iterator[list[str]]:
    """The normalised texts, each at its first occurrence only, in windows in the order of the stream."""
    window, num_characters = [], 0
    with KeyTable() as seen:
        for text in texts:
            if not seen.add(text_key(text)):
                continue
            window.append(normalised(text))
            num_characters += len(window[-1])
            if len(window) == WINDOW or num_characters >= WINDOW_CHARACTERS:
                yield window
                window, num_characters = [], 0
        if window:
            yield window


def shard_size(num_texts: int) -> int:
    """Texts of a shard of a window with `num_texts`: a small job has many small shards."""
    share = -(-num_texts // (SHARDS_PER_WINDOW * MULTIPLE)) * MULTIPLE
    return min(max(share, MULTIPLE), LARGEST)


def shards(window: list[str]) -> Iterator[list[str]]:
    """The window in shards, longest texts first: the slow shards start early, and little is padded."""
    ordered = sorted(window, key=lambda text: (-len(text), text))
    size = shard_size(len(ordered))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
