"""`flipkd store verify`: every byte of a store read and compared; what is damaged can be taken out."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flipkd_dist.errors import UserError
from flipkd_dist.store import Store
from flipkd_dist.store_index import Index, index_paths
from flipkd_dist.store_keys import checksums
from flipkd_dist.store_manifest import MANIFEST
from flipkd_dist.store_shards import DamagedShard, Shard, first_misfit, padded, read_shard
from flipkd_dist.store_stats import SHARDS, store_folders, stores_in


def verify(path: Path, repair: bool = False) -> list[str]:
    """Read every byte of a store; returns what is damaged, a line each.

    With `repair` the damaged shards are removed, so that the next run scores their texts again, and readers get what
    is left.

    Raises:
        UserError: there is no store; the disk is full.
    """
    lines = []
    for folder in store_folders(path):
        stores, wrong = stores_in(folder)
        wrong += sorted(path.name for path in folder.glob(f"{SHARDS}.damaged"))
        lines += [f"{folder / name}: cannot be used" for name in wrong]
        if repair:
            _remove(folder, [name for name in wrong if name != MANIFEST])
        for store in stores:
            damage = dict(_damage_of(store))
            lines += [f"{folder / name}: {what}" for name, what in damage.items()]
            if repair and (damage or wrong):
                _remove(folder, [name for name in damage if name.endswith(".parquet")])
                store.publish(rebuild=True)
        if repair and not stores:
            _remove(folder, wrong)
    return lines


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _damage_of(store: Store) -> Iterator[tuple[str, str]]:
    """(file name, what is wrong with it) of each damaged file."""
    listed, index = {}, None
    try:
        entry = store.entry()
        if entry is not None:
            listed = {shard["name"]: shard for shard in entry["shards"]}
            index = Index(store.folder, store.spec.key, entry["index"])
    except UserError:  # a damaged manifest is named already
        if listed:
            yield _index_name(store, entry), "the index does not fit the manifest, or is not there"
    here = store.shards()
    missing = [name for name in listed if name not in here]
    for name in missing:
        yield name, "the manifest names it, and it is not there"
    check = _IndexCheck(index) if index is not None and not missing else None
    rest = [name for name in here if name not in listed]
    for name in tqdm([*listed, *rest], desc="verify", unit=" shards", delay=1):
        if name in missing:
            continue
        try:
            shard = read_shard(store.folder / name, store.spec)
            if (row := first_misfit(shard.vectors, store.spec)) is not None:
                raise DamagedShard(f"vector {row} is not finite, or not of length 1")
        except DamagedShard as error:
            yield name, str(error)
            if check is not None and name in listed:
                check.skip(listed[name]["rows"])
            continue
        if check is not None and name in listed:
            check.compare(shard)
    if check is not None and not check.fits():
        yield _index_name(store, entry), "the index does not hold what the shards hold"


def _index_name(store: Store, entry: dict) -> str:
    return index_paths(store.folder, store.spec.key, entry["index"]["id"])[0].name


class _IndexCheck:
    """Whether an index holds the rows of its shards, in their order, and points to each key's."""

    def __init__(self, index: Index):
        self.index, self.start, self.own, self.right, self.skipped = index, 0, 0, True, False

    def compare(self, shard: Shard) -> None:
        """The next shard in the order of the manifest."""
        index, rows = self.index, padded(shard.vectors)
        records = index.rows_in_order(self.start, len(rows))
        same = len(records) == len(rows) and np.array_equal(records[:, :-1], rows)
        self.right &= same and np.array_equal(records[:, -1], shard.checksums)
        position, found = index.find(shard.keys)
        place = index.place[position]
        own = place == self.start + np.arange(len(rows))
        self.own += int(np.sum(own & found))
        self.right &= bool(found.all() and ((place >= 0) & (place < index.num_rows)).all())
        if self.right and not own.all():  # a text of two shards: the row of the other one has to be the same text's
            other = index.rows[place[~own]]
            self.right &= np.array_equal(checksums(shard.keys[~own], other[:, :-1]), other[:, -1])
        self.start += len(rows)

    def skip(self, num_rows: int) -> None:
        """A shard that cannot be read: its rows cannot be compared."""
        self.start += num_rows
        self.skipped = True

    def fits(self) -> bool:
        complete = self.skipped or (self.own == self.index.num_keys and self.start == self.index.num_rows)
        return bool(self.right and complete)
