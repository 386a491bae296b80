"""The teacher's store: one vector per unique text, in Parquet shards under `teacher/` of a run.

A shard is complete or absent (temporary name, then rename); the manifest is written last and names the shards that
readers use. Shards carry the key of their specification in their name, so that another teacher starts afresh and finds
its own vectors again later. Shapes: n texts, k vectors of a shard, d the hidden size.
"""

import hashlib
import json
import logging
import os
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger("flipkd_dist")

KEY = np.dtype("V16")
MANIFEST = "manifest.json"


def normalised(text: str) -> str:
    """What the teacher reads in place of the text: composed Unicode (NFC), single spaces; NUL parts a pair's texts."""
    return "\0".join(" ".join(part.split()) for part in unicodedata.normalize("NFC", text).split("\0"))


def pair_text(text_a: str, text_b: str) -> str:
    """A pair as the one text that a store of pair scores knows it by; `split("\\0")` gives its texts back."""
    return normalised(f"{text_a}\0{text_b}")


def text_key(text: str) -> bytes:
    """16 bytes that stand for the normalised text."""
    return hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()


def _keys_of(texts: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"".join(map(text_key, texts)), KEY)


def _find(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position in `sorted_keys`, whether it is there) of each key."""
    if not len(sorted_keys):
        return np.zeros(len(keys), np.intp), np.zeros(len(keys), bool)
    position = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return position, sorted_keys[position] == keys


def _write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A file that is whole under `path`, or not there, whenever the machine stops."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # two writers of one shard never share a draft
    with draft.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class StoreSpec:
    """Everything that a vector depends on besides its text."""

    teacher_fingerprint: str
    pooling: str
    max_length: int  # tokens
    hidden_size: int  # 1 for scores of pairs
    prompt: str = ""
    dtype: str = "float32"

    @property
    def key(self) -> str:
        """12 hex digits that stand for the specification."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Store:
    """The vectors of one specification in `folder`; shards of others are left alone. Cheap to send to a worker."""

    folder: Path
    spec: StoreSpec

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """(keys [k], vectors [k, d]) of a shard; None, with a warning, where it cannot be read whole."""
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read()
            if json.loads(table.schema.metadata[b"flipkd"]) != asdict(self.spec):
                raise ValueError("its specification is not the one in its name")
            vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            return np.frombuffer(b"".join(table["key"].to_pylist()), KEY), vectors
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning("teacher store: %s cannot be used (%s): its texts count as missing", path, reason)
            return None

    def _shards(self, paths: Iterable[Path]) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
        """(path, keys [k], vectors [k, d]) of those shards that can be read, one in memory at a time."""
        for path in paths:
            shard = self._read(path)
            if shard is not None:
                yield path, *shard

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.spec.key}-*.parquet"))

    def _manifest_paths(self) -> list[Path] | None:
        """The shards that the manifest names; None where there is no manifest, or not one of this specification."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            if manifest["spec"] != asdict(self.spec):
                return None
            paths = [self.folder / shard["name"] for shard in manifest["shards"]]
            sizes = [shard["bytes"] for shard in manifest["shards"]]
            return paths if [path.stat().st_size for path in paths] == sizes else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _all_keys(self, paths: Iterable[Path]) -> np.ndarray:
        return np.unique(np.concatenate([np.empty(0, KEY), *(keys for _, keys, _ in self._shards(paths))]))

    def stored_keys(self) -> np.ndarray:
        """The sorted keys of every complete shard, in the manifest or not."""
        return self._all_keys(self._paths())

    def holds(self, texts: Sequence[str]) -> np.ndarray:
        """Which texts a complete shard holds, published or not: bool [n]."""
        return _find(self.stored_keys(), _keys_of(texts))[1]

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The unique texts that no complete shard holds, in the order given."""
        unique = list(dict.fromkeys(texts))
        return [text for text, is_there in zip(unique, self.holds(unique), strict=True) if not is_there]

    def is_complete(self, texts: Iterable[str]) -> bool:
        """Whether the manifest is there, its shards are whole and they hold every text."""
        paths = self._manifest_paths()
        return paths is not None and bool(_find(self._all_keys(paths), _keys_of(texts))[1].all())

    def write_shard(self, texts: list[str], vectors: np.ndarray) -> Path:
        """Add the vectors [k, d] of k texts; safe to repeat and to race."""
        assert vectors.shape == (len(texts), self.spec.hidden_size) and texts, vectors.shape
        keys = _keys_of(texts)
        width = self.spec.hidden_size
        values = pa.array(np.ascontiguousarray(vectors, self.spec.dtype).ravel())
        columns = {
            "key": pa.array([key.tobytes() for key in keys], pa.binary(16)),
            "vector": pa.FixedSizeListArray.from_arrays(values, width),
        }
        table = pa.table(columns).replace_schema_metadata({"flipkd": json.dumps(asdict(self.spec))})
        name = hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()
        path = self.folder / f"{self.spec.key}-{name}.parquet"
        self.folder.mkdir(parents=True, exist_ok=True)
        # Neither dictionaries nor compression gain anything on vectors.
        options = dict(use_dictionary=False, compression="none", write_statistics=False, write_page_checksum=True)
        _write_durably(path, lambda file: pq.write_table(table, file, **options))
        return path

    def publish(self) -> None:
        """Declare every complete shard part of the store; what killed writers left behind is removed."""
        keys, shards = [np.empty(0, KEY)], []
        for path, shard_keys, _ in self._shards(self._paths()):
            keys.append(shard_keys)
            shards.append({"name": path.name, "bytes": path.stat().st_size, "rows": len(shard_keys)})
        num_vectors = len(np.unique(np.concatenate(keys)))
        manifest = {"spec": asdict(self.spec), "num_vectors": num_vectors, "shards": shards}
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(manifest, indent=1) + "\n"
        _write_durably(self.folder / MANIFEST, lambda file: file.write(text.encode()))
        for draft in self.folder.glob(f"{self.spec.key}-*.tmp"):
            draft.unlink(missing_ok=True)

    def open(self) -> "StoreReader":
        """A reader of what `publish` declared."""
        shards = list(self._shards(self._manifest_paths() or []))
        keys = np.concatenate([np.empty(0, KEY), *(keys for _, keys, _ in shards)])
        empty = np.empty((0, self.spec.hidden_size), self.spec.dtype)
        unique, first = np.unique(keys, return_index=True)
        return StoreReader(self, unique, np.concatenate([empty, *(vectors for *_, vectors in shards)])[first])


class StoreReader:
    """Vectors by text, read-only."""

    def __init__(self, store: Store, keys: np.ndarray, array: np.ndarray):
        self.store, self.keys, self.array = store, keys, array

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """The row of each text in the array, int64 [n].

        Raises:
            KeyError: the store is not complete for these texts (an error of ours: scoring comes first).
        """
        rows, found = _find(self.keys, _keys_of(texts))
        if not found.all():
            first = texts[int(np.argmin(found))]
            raise KeyError(f"{self.store.folder} lacks {np.sum(~found)} of {len(texts)} texts, the first is {first!r}")
        return rows

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of rows, float32 [n, d]."""
        return self.array[rows].astype(np.float32)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of texts, float32 [n, d] in the order given."""
        return self.at(self.rows(texts))
