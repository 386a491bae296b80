"""Fills the teacher's store."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from flipkd_dist.store import Store
from flipkd_dist.teacher_source import Encoder
from flipkd_dist.text_stream import shards, windows

logger = logging.getLogger("flipkd_dist")

# Shards of texts in, the number of texts of each shard out as it completes; it encodes and writes them, and takes the
# next shard only when a worker is about to need it.
MapShards = Callable[[Iterator[list[str]]], Generator[int]]


@dataclass(frozen=True)
class ScoreSummary:
    num_texts: int  # unique
    num_new: int  # texts that were encoded now
    is_whole: bool = True  # False: a shard turned out to be damaged, its texts are to be scored again


@dataclass(frozen=True)
class Scored:
    """What a worker tells of a shard that it has written."""

    path: Path
    num_texts: int
    num_truncated: int  # of them, cut to the teacher's maximum length


def score_shard(teacher: Encoder, store: Store, batch_size: int, texts: list[str]) -> Scored:
    """Encode and store one shard. This is all that a worker does."""
    before = teacher.num_truncated
    path = store.write_shard(texts, teacher.encode(texts, batch_size))
    return Scored(path, len(texts), teacher.num_truncated - before)


def score_shards_here(teacher: Encoder, store: Store, batch_size: int = 64) -> MapShards:
    """The mapper that needs no workers: one shard after the other in this process."""
    return lambda shards: (score_shard(teacher, store, batch_size, shard).num_texts for shard in shards)


def survey(texts: Iterable[str], store: Store) -> tuple[int, bool]:
    """(how many unique texts, whether the store is complete for them); reads the whole stream, with a progress bar."""
    num_texts, is_complete = 0, True
    for window in windows(tqdm(texts, desc="check", unit=" texts", delay=3)):
        num_texts += len(window)
        is_complete = is_complete and store.is_complete(window)
    return num_texts, is_complete


def score(
    texts: Iterable[str], store: Store, map_shards: MapShards, total: int | None = None, name: str = "teacher"
) -> ScoreSummary:
    """Bring the store to the state where it holds every text; what is there already is not encoded again.

    Args:
        texts: of any number; a window of them is in memory at a time.
        map_shards: encodes and writes shards, in any order.
        total: how many unique texts there are, where that is known: the progress bar then says how long it takes.
        name: of the store, for progress and messages.
    """
    start = time.monotonic()
    with tqdm(total=total, desc=name, unit=" texts") as bar:
        missing = _Missing(texts, store, bar.update)
        num_new = 0
        with closing(map_shards(iter(missing))) as finished:  # whatever happens here, the workers end
            for num_done in finished:
                num_new += num_done
                bar.update(num_done)
    assert num_new == missing.num_missing, f"{num_new} of {missing.num_missing} texts were scored"
    is_whole = missing.published or store.publish()
    seconds = time.monotonic() - start
    if missing.published:
        logger.info("%s store: all %d texts are there, nothing to do", name, missing.num_texts)
    else:
        logger.info("%s store: %d of %d texts are new, %.1f s", name, num_new, missing.num_texts, seconds)
    return ScoreSummary(missing.num_texts, num_new, is_whole)


class _Missing:
    """The shards of a stream without the texts that the store holds, and what was seen on the way."""

    def __init__(self, texts: Iterable[str], store: Store, skip: Callable[[int], object]):
        self.texts, self.store, self.skip = texts, store, skip
        self.num_texts = self.num_missing = 0
        self.published = True  # so far: every text is there, and readers see it

    def __iter__(self) -> Iterator[list[str]]:
        for window in windows(self.texts):
            self.num_texts += len(window)
            if self.store.is_complete(window):
                self.skip(len(window))
                continue
            self.published = False
            held = dict(zip(window, self.store.holds(window).tolist(), strict=True))
            self.skip(sum(held.values()))
            for shard in shards(window):
                if missing := [text for text in shard if not held[text]]:
                    self.num_missing += len(missing)
                    yield missing
