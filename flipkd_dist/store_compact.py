"""`flipkd store compact`: small shards merged into big ones, and texts that stand twice kept once."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flipkd_dist.durable import one_at_a_time
from flipkd_dist.errors import UserError
from flipkd_dist.store import Store
from flipkd_dist.store_keys import KeySet, unique_order
from flipkd_dist.store_shards import DamagedShard, Shard, read_shard, shard_path, write_shard
from flipkd_dist.store_stats import store_folders, stores_in

SHARD_BYTES = 64 * 2**20  # of vectors in a shard that compact makes; twice that and a small shard are in memory


def compact(path: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Merge small shards into big ones; returns a line for each specification.

    Nothing is taken away before the merged shards are published, so that a kill loses and doubles nothing; what it
    leaves twice the next compact drops. The disk has to hold the merged shards and both indexes for a while.

    Raises:
        UserError: a shard is damaged; there is no store; the disk is full. What was there stays as it was.
    """
    lines = []
    for folder in store_folders(path):
        stores, wrong = stores_in(folder)
        if wrong:
            raise UserError(f"{folder / wrong[0]}: is damaged: run `flipkd store verify --repair {path}` first")
        for store in stores:
            before, after = compact_store(store, shard_bytes)
            lines.append(f"{folder}  {store.spec.key}: {before} shards are {after} now")
    return lines


def compact_store(store: Store, shard_bytes: int = SHARD_BYTES) -> tuple[int, int]:
    """(shards before, shards after) of one specification."""
    rows = max(1, shard_bytes // (store.spec.hidden_size * store.spec.numbers.itemsize))
    with one_at_a_time(store.folder), ExitStack() as undo:
        before = store.shards()
        merge = _Merge(store, rows, set(before), undo)
        # The biggest first: a text that stands twice stays where it need not be moved.
        for name in tqdm(
            sorted(before, key=lambda name: (-before[name][0], name)), desc="compact", unit=" shards", delay=1
        ):
            merge.take(name)
        merge.flush()
        if merge.kept != set(before):
            store.publish_only(sorted(merge.kept))
        undo.pop_all()  # they are published: nothing to take back
        for name in set(before) - merge.kept:
            (store.folder / name).unlink(missing_ok=True)
    store.publish()
    return len(before), len(merge.kept)


class _Merge:
    """Collects what has to move into shards of `rows` vectors; `kept` are the names that hold every text once."""

    def __init__(self, store: Store, rows: int, existing: set[str], undo: ExitStack):
        self.store, self.rows, self.existing, self.undo = store, rows, existing, undo
        self.kept: set[str] = set()
        self.seen, self.waiting, self.num_waiting = KeySet(), [], 0

    def take(self, name: str) -> None:
        """A big shard without any text seen before stays; of others the new texts wait for a merged one."""
        path = self.store.folder / name
        try:
            shard = read_shard(path, self.store.spec)
        except DamagedShard as error:
            raise UserError(
                f"{path}: is damaged ({error}): run `flipkd store verify --repair {self.store.folder}` first"
            ) from None
        order = np.sort(unique_order(shard.keys))
        order = order[~self.seen.holds(shard.keys[order])]
        self.seen.add(shard.keys[order])
        if len(order) == len(shard.keys) and len(order) > self.rows // 2:
            self.kept.add(name)
            return
        self.waiting.append((shard.keys[order], shard.vectors[order]))
        self.num_waiting += len(order)
        while self.num_waiting >= self.rows:
            self.write(self.rows)

    def flush(self) -> None:
        if self.num_waiting:
            self.write(self.num_waiting)

    def write(self, count: int) -> None:
        """A shard of the `count` vectors that wait longest."""
        keys, vectors = (np.concatenate(part) for part in zip(*self.waiting, strict=True))
        self.waiting = [(keys[count:], vectors[count:])]
        self.num_waiting -= count
        shard = Shard.of(keys[:count], vectors[:count])
        path = shard_path(self.store.folder, self.store.spec, shard)
        if path.name not in self.existing:  # else these very texts are there already
            self.undo.callback(self.take_back, path)
            write_shard(self.store.folder, self.store.spec, shard)
        self.kept.add(path.name)

    def take_back(self, path: Path) -> None:
        """Remove a shard that was merged in vain, unless an error came after its publication."""
        entry = self.store.entry()
        if entry is None or path.name not in (shard["name"] for shard in entry["shards"]):
            path.unlink(missing_ok=True)
