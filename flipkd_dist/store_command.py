"""`flipkd store verify | stats | compact`: what a store's folders hold, whether it is sound, fewer and bigger shards."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flipkd_dist.durable import one_at_a_time
from flipkd_dist.errors import UserError
from flipkd_dist.store import Store
from flipkd_dist.store_index import Index, index_paths
from flipkd_dist.store_keys import WORD, KeySet, checksums, unique_order
from flipkd_dist.store_manifest import MANIFEST, read_entries
from flipkd_dist.store_shards import (
    DamagedShard,
    Shard,
    StoreSpec,
    first_misfit,
    padded,
    read_keys,
    read_shard,
    read_spec,
    shard_path,
    write_shard,
)

SHARDS = "[0-9a-f]" * 12 + "-" + "[0-9a-f]" * 16 + ".parquet"  # key of the specification, name of the shard
SHARD_BYTES = 64 * 2**20  # of vectors in a shard that compact makes; twice that and a small shard are in memory


def store_folders(path: Path) -> list[Path]:
    """The folders of vectors and of pair scores that PATH means: a run folder, its `teacher/` or `teacher/pairs`.

    Raises:
        UserError: there is no store.
    """
    found = [
        folder for folder in (path, path / "pairs", path / "teacher", path / "teacher" / "pairs") if _is_store(folder)
    ]
    if not found:
        raise UserError(f"{path}: no teacher's store there: name a run folder, its teacher/ or its teacher/pairs")
    return found


def _is_store(folder: Path) -> bool:
    """Whether there are shards, or a manifest that can be read (others have files of that name too)."""
    if any(any(folder.glob(SHARDS + end)) for end in ("", ".damaged")):
        return True
    try:
        return bool(read_entries(folder))
    except UserError:
        return False


def stores_in(folder: Path) -> tuple[list[Store], list[str]]:
    """(the stores of every specification in a folder; what is damaged so that it belongs to none of them)."""
    found: dict[str, StoreSpec] = {}
    wrong, unknown = [], {}
    try:
        found = {key: StoreSpec(**entry["spec"]) for key, entry in read_entries(folder).items()}
    except UserError:
        wrong.append(MANIFEST)
    for path in sorted(folder.glob(SHARDS)):
        key = path.name.split("-")[0]
        if key in found:
            continue
        try:
            spec = read_spec(path)
            if spec.key != key:
                raise DamagedShard("its specification is not the one in its name")
            found[key] = spec
        except DamagedShard:
            unknown.setdefault(key, []).append(path.name)
    wrong += [name for key, names in unknown.items() if key not in found for name in names]
    return [Store(folder, spec) for spec in found.values()], wrong


# verify


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


# stats


def stats(path: Path) -> list[str]:
    """Lines to print: what each specification's store holds.

    Raises:
        UserError: there is no store.
    """
    lines = []
    for folder in store_folders(path):
        stores, wrong = stores_in(folder)
        lines += [f"{folder / name}: cannot be used: see `flipkd store verify`" for name in wrong]
        for store in stores:
            lines += [f"{folder}  {store.spec.key}", *(f"  {name:<12} {value}" for name, value in _facts(store))]
        if not stores and not wrong:
            lines.append(f"{folder}: empty")
    return lines


def _facts(store: Store) -> Iterator[tuple[str, object]]:
    spec, shards = store.spec, store.shards()
    try:
        entry = store.entry()
        index = Index(store.folder, spec.key, entry["index"]) if entry else None
        said = "no" if entry is None else f"{len(entry['shards'])} of {len(shards)} shards"
    except UserError as error:
        entry, index, said = None, None, f"damaged: {error}"
    yield "texts", f"{index.num_keys if index else _count(store):,}" + ("" if index else " (not published)")
    yield "shards", f"{len(shards):,}, {sum(size for size, _ in shards.values()):,} bytes"
    yield "index", f"{index.nbytes:,} bytes" if index else "none"
    yield "published", said
    yield "vectors", f"d = {spec.hidden_size}, {spec.dtype}"
    yield "pooling", spec.pooling
    yield "max length", f"{spec.max_length} tokens"
    yield "prompt", repr(spec.prompt)
    yield "fingerprint", spec.teacher_fingerprint


def _count(store: Store) -> int:
    """Number of unique texts, from the key columns alone."""
    keys = [np.empty((0, 2), WORD)]
    for name in store.shards():
        try:
            keys.append(read_keys(store.folder / name, store.spec))
        except DamagedShard:
            continue
    return len(unique_order(np.concatenate(keys)))


# compact


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
        _check_room(store, sum(size for size, _ in before.values()))
        merge = _Merge(store, rows, set(before), undo)
        # The biggest first: a text that stands twice stays where it need not be moved.
        for name in tqdm(sorted(before, key=lambda name: (-before[name][0], name)), desc="compact", unit=" shards"):
            merge.take(name)
        merge.flush()
        if merge.kept != set(before):
            store.publish_only(sorted(merge.kept))
        undo.pop_all()  # they are published: nothing to take back
        _remove(store.folder, sorted(set(before) - merge.kept))
    store.publish()
    return len(before), len(merge.kept)


def _check_room(store: Store, needed: int) -> None:
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise UserError(f"{store.folder}: compact needs up to {needed:,} bytes, {free:,} are free: make room first")


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
            self.undo.callback(path.unlink, missing_ok=True)
            write_shard(self.store.folder, self.store.spec, shard)
        self.kept.add(path.name)
