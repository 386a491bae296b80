"""`flipkd store stats`, and which stores a path means: of vectors and of pair scores, of every specification."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flipkd_dist.errors import UserError
from flipkd_dist.store import Store
from flipkd_dist.store_index import Index
from flipkd_dist.store_keys import WORD, unique_order
from flipkd_dist.store_manifest import MANIFEST, read_entries
from flipkd_dist.store_shards import DamagedShard, StoreSpec, read_keys, read_spec

SHARDS = "[0-9a-f]" * 12 + "-" + "[0-9a-f]" * 16 + ".parquet"  # key of the specification, name of the shard


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
