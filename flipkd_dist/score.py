"""Fills the teacher's store."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from tqdm import tqdm

from flipkd_dist.store import Store

if TYPE_CHECKING:
    from flipkd_dist.teacher import Teacher

logger = logging.getLogger("flipkd_dist")

# Shards of texts in, the number of texts of each shard out as it completes; it encodes and writes them.
MapShards = Callable[[list[list[str]]], Iterator[int]]

SHARDS_PER_WORKER = 4  # at least, so that no worker waits long for the last one


@dataclass(frozen=True)
class ScoreSummary:
    num_texts: int  # unique
    num_new: int  # texts that were encoded now
    seconds: float


def score_shard(teacher: "Teacher", store: Store, batch_size: int, texts: list[str]) -> int:
    """Encode and store one shard; returns its number of texts. This is all that a worker does."""
    store.write_shard(texts, teacher.encode(texts, batch_size))
    return len(texts)


def score_shards_here(teacher: "Teacher", store: Store, batch_size: int = 64) -> MapShards:
    """The mapper that needs no workers: one shard after the other in this process."""
    return lambda shards: (score_shard(teacher, store, batch_size, shard) for shard in shards)


def score(
    texts: Sequence[str], store: Store, map_shards: MapShards, num_workers: int = 1, shard_size: int = 2048
) -> ScoreSummary:
    """Bring the store to the state where it holds every text; what is there already is not encoded again.

    Args:
        map_shards: encodes and writes shards, in any order, on `num_workers` workers.
        shard_size: texts of a shard at most; what a killed worker loses.
    """
    start = time.monotonic()
    unique = list(dict.fromkeys(texts))
    if store.is_complete(unique):
        logger.info("teacher store: all %d texts are there, nothing to do", len(unique))
        return ScoreSummary(len(unique), 0, time.monotonic() - start)
    # Longest first: the slow shards start early, and texts of a shard need little padding.
    missing = sorted(store.missing(unique), key=len, reverse=True)
    size = min(shard_size, max(1, ceil(len(missing) / (SHARDS_PER_WORKER * num_workers))))
    shards = [missing[first : first + size] for first in range(0, len(missing), size)]
    num_new = 0
    if shards:
        with tqdm(total=len(missing), desc="teacher", unit=" texts") as bar:
            for num_done in map_shards(shards):
                num_new += num_done
                bar.update(num_done)
    assert num_new == len(missing), f"{num_new} of {len(missing)} texts were scored"
    store.publish()
    seconds = time.monotonic() - start
    logger.info("teacher store: %d of %d texts are new, %.1f s", num_new, len(unique), seconds)
    return ScoreSummary(len(unique), num_new, seconds)
