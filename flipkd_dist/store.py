"""The teacher's store: one vector per unique text, in Parquet shards and a mapped index under `teacher/` of a run.

Shards are the durable form: complete or absent, with the key of their specification in their name, so that another
teacher starts afresh and finds its own vectors again later. `publish` builds from them what readers map into memory;
the manifest is written last and says what that is. docs/store.md tells the whole. Shapes: n texts, d the hidden size.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flipkd_dist.durable import one_at_a_time, sweep
from flipkd_dist.errors import UserError
from flipkd_dist.store_index import SUFFIXES, Index, index_paths, write_index
from flipkd_dist.store_keys import WORD, KeySet, chunks, keys_of, normalised, pair_text, text_key
from flipkd_dist.store_manifest import MANIFEST, Entry, new_entry, read_entries, write_entries
from flipkd_dist.store_reader import StoreReader
from flipkd_dist.store_shards import (
    DamagedShard,
    Shard,
    StoreSpec,
    first_misfit,
    padded,
    read_keys,
    read_shard,
    write_shard,
)

__all__ = ["MANIFEST", "Store", "StoreReader", "StoreSpec", "normalised", "pair_text", "text_key"]

logger = logging.getLogger("flipkd_dist")

Listing = dict[str, tuple[int, int]]  # name: (bytes, time of the last change)


@dataclass(frozen=True)
class Store:
    """The vectors of one specification in `folder`; those of others are left alone. Cheap to send to a worker."""

    folder: Path
    spec: StoreSpec
    _seen: "_Seen" = field(default_factory=lambda: _Seen(), init=False, repr=False, compare=False)

    def __reduce__(self):
        return Store, (self.folder, self.spec)

    def shards(self) -> Listing:
        """Every complete shard by name, in order, with what tells that it changed."""
        found = {}
        for path in sorted(self.folder.glob(f"{self.spec.key}-*.parquet")):
            with suppress(FileNotFoundError):  # merged by another process meanwhile
                status = path.stat()
                found[path.name] = (status.st_size, status.st_mtime_ns)
        return found

    def entry(self) -> Entry | None:
        """What the manifest says of this specification.

        Raises:
            UserError: the manifest is damaged.
        """
        return read_entries(self.folder).get(self.spec.key)

    def _published(self, shards: Listing) -> tuple[Index | None, set[str]]:
        """The index and the shards in it; None where there is none, or it or a shard is not as it was published."""
        try:
            entry = self.entry()
            listed = {shard["name"]: shard["bytes"] for shard in entry["shards"]} if entry else {}
            if entry and all(shards.get(name, (None,))[0] == size for name, size in listed.items()):
                return Index(self.folder, self.spec.key, entry["index"]), set(listed)
        except UserError as error:
            logger.debug("teacher store: %s", error)
        return None, set()

    def holds(self, texts: Iterable[str]) -> np.ndarray:
        """Which texts a complete shard holds, published or not: bool [n].

        Of shards that are not published the keys are read, once for this object, and kept (16 bytes a text).
        """
        shards = self.shards()
        index, published = self._published(shards)
        unpublished = {name: status for name, status in shards.items() if name not in published}
        keys = self._seen.keys_of(self.folder, self.spec, unpublished)
        found = [np.empty(0, bool)]
        for chunk in chunks(texts):
            asked = keys_of(chunk)
            found.append(keys.holds(asked) | (index.find(asked)[1] if index else False))
        return np.concatenate(found)

    def is_complete(self, texts: Iterable[str]) -> bool:
        """Whether every text is published, in shards that are all there; a few texts are in memory at a time."""
        index, _ = self._published(self.shards())
        return index is not None and all(index.find(keys_of(chunk))[1].all() for chunk in chunks(texts))

    def write_shard(self, texts: Sequence[str], vectors: np.ndarray) -> Path:
        """Add the vectors [k, d] of k texts; safe to repeat and to race.

        Raises:
            UserError: a vector is not finite, or not of length 1 in a store of unit vectors; the disk is full.
        """
        assert vectors.shape == (len(texts), self.spec.hidden_size) and len(texts), vectors.shape
        if (wrong := first_misfit(np.asarray(vectors), self.spec)) is not None:
            what = "a vector of length 1" if self.spec.are_unit else "finite numbers"
            raise UserError(
                f"teacher: does not give {what} for {texts[wrong]!r}: take another teacher or mend its files"
            )
        stored = np.ascontiguousarray(vectors, self.spec.numbers)
        return write_shard(self.folder, self.spec, Shard.of(keys_of(texts), stored))

    def publish(self, rebuild: bool = False) -> bool:
        """Give readers every complete shard; does nothing where they have it (unless `rebuild`).

        A shard that cannot be read is set aside with a warning: its texts count as missing from then on. One shard is
        in memory at a time, and some 36 bytes a text while the keys are sorted.

        Returns:
            Whether every shard could be read.
        Raises:
            UserError: the disk is full; what was published stays.
        """
        with one_at_a_time(self.folder):
            shards = self.shards()
            index, published = self._published(shards)
            if rebuild or index is None or published != set(shards):
                self.publish_only(list(shards))
            self._sweep()
            return shards.keys() <= self.shards().keys()

    def publish_only(self, names: list[str]) -> None:
        """Give readers these shards and no others; the caller keeps other publishers away (`one_at_a_time`)."""
        listed: list[dict] = []
        words = padded(np.empty((0, self.spec.hidden_size), self.spec.numbers)).shape[1]
        index = write_index(self.folder, self.spec.key, words, self._parts(names, listed))
        try:
            entries = read_entries(self.folder)
        except UserError as error:
            logger.warning("teacher store: %s (written anew)", error)
            entries = {}
        try:
            write_entries(self.folder, entries | {self.spec.key: new_entry(self.spec, listed, index)})
        except BaseException:  # a signal or a failing sync may come after the new manifest has its name
            if not self.is_named(index["id"]):
                for path in index_paths(self.folder, self.spec.key, index["id"]):
                    path.unlink(missing_ok=True)
            raise

    def is_named(self, index_id: str) -> bool:
        """Whether the manifest sends readers to this index."""
        try:
            entry = self.entry()
        except UserError:
            return False
        return entry is not None and entry["index"]["id"] == index_id

    def _parts(self, names: list[str], listed: list[dict]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(keys, rows, checksums) of those shards that can be read, which are noted in `listed`."""
        for name in tqdm(names, desc="index", unit=" shards", delay=2):
            path = self.folder / name
            try:
                shard = read_shard(path, self.spec)
            except DamagedShard as error:
                set_aside(path, error)
                continue
            listed.append({"name": name, "bytes": path.stat().st_size, "rows": len(shard.keys)})
            yield shard.keys, padded(shard.vectors), shard.checksums

    def _sweep(self) -> None:
        """Remove what killed writers left and what the manifest no longer names; open readers keep what they have."""
        sweep([*self.folder.glob(f"{self.spec.key}-*.tmp"), *self.folder.glob(f"{MANIFEST}.*.tmp")])
        entry = self.entry()
        named = index_paths(self.folder, self.spec.key, entry["index"]["id"]) if entry else []
        for suffix in SUFFIXES:
            for path in self.folder.glob(f"{self.spec.key}-*.{suffix}"):
                if path not in named:
                    path.unlink(missing_ok=True)

    def open(self) -> StoreReader:
        """A reader of what `publish` declared: maps two files, reads none of them.

        Raises:
            UserError: nothing is published for this teacher; the manifest or the index is damaged.
        """
        entry = self.entry()
        while entry is not None:
            try:
                return StoreReader(self.folder, self.spec, Index(self.folder, self.spec.key, entry["index"]))
            except UserError:
                before, entry = entry, self.entry()
                if entry == before:  # else it was published anew while we looked
                    raise
        raise UserError(f"{self.folder}: no vectors of this teacher are published there: run `flipkd score` first")


class _Seen:
    """What a Store remembers between calls: the keys of shards that are not published."""

    def __init__(self) -> None:
        self.read: Listing = {}
        self.keys = KeySet()

    def keys_of(self, folder: Path, spec: StoreSpec, shards: Listing) -> KeySet:
        """The keys of these shards; only what is new among them is read."""
        if not self.read.items() <= shards.items():  # one is gone, changed or published
            self.read, self.keys = {}, KeySet()
        new = [np.empty((0, 2), WORD)]
        for name in shards.keys() - self.read.keys():
            try:
                new.append(read_keys(folder / name, spec))
            except DamagedShard as error:
                _warn(folder / name, error)
        self.read = shards
        if sum(map(len, new)):
            self.keys.add(np.concatenate(new))
        return self.keys


def _warn(path: Path, error: Exception) -> None:
    logger.warning("teacher store: %s cannot be used (%s): its texts count as missing", path, error)


def set_aside(path: Path, error: Exception) -> None:
    """Rename a shard that cannot be used, so that its texts are scored again."""
    if path.exists():  # else another process merged it
        _warn(path, error)
        path.replace(path.with_name(f"{path.name}.damaged"))
