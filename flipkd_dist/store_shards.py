"""One Parquet shard of the teacher's store: keys, vectors, checksums, and the specification they belong to.

Columns: `key` 16 bytes, `vector` d numbers of the specification's dtype (little-endian), `checksum` an unsigned 64-bit
integer of key and vector. Shapes: k rows of a shard, d the hidden size, w words of 8 bytes in a padded row.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd_dist.durable import whole_file
from flipkd_dist.store_keys import WORD, checksums

KEY_BYTES = 16
UNIT = 1e-3  # how far from 1 the length of a float16 vector may be


@dataclass(frozen=True)
class StoreSpec:
    """Everything that a vector depends on besides its text."""

    teacher_fingerprint: str
    pooling: str
    max_length: int  # tokens
    hidden_size: int  # 1 for scores of pairs
    prompt: str = ""
    dtype: str = "float16"  # of unit vectors, which are scaled back to length 1 when read; others are read as stored

    @property
    def key(self) -> str:
        """12 hex digits that stand for the specification."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=6).hexdigest()

    @property
    def numbers(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def are_unit(self) -> bool:
        """Whether vectors have length 1, so that their direction is all that counts."""
        return self.dtype == "float16"


class DamagedShard(Exception):
    """What is wrong with a shard that cannot be used."""


@dataclass(frozen=True)
class Shard:
    """Keys [k, 2], vectors [k, d] in the stored dtype and checksums [k] of one file, in the file's order."""

    keys: np.ndarray
    vectors: np.ndarray
    checksums: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, vectors: np.ndarray) -> "Shard":
        return cls(keys, vectors, checksums(keys, padded(vectors)))

    @cached_property
    def name(self) -> str:
        """16 hex digits that stand for the keys."""
        return hashlib.blake2b(self.keys.tobytes(), digest_size=8).hexdigest()


def padded(vectors: np.ndarray) -> np.ndarray:
    """Vectors [k, d] as whole words [k, w], zeros behind."""
    rows = np.zeros((len(vectors), -(-vectors.shape[1] * vectors.itemsize // WORD.itemsize)), WORD)
    rows.view(vectors.dtype)[:, : vectors.shape[1]] = vectors
    return rows


def first_misfit(vectors: np.ndarray, spec: StoreSpec) -> int | None:
    """The first vector [d] that is not finite, or not of length 1 where it should be."""
    values = vectors.astype(np.float32, copy=False)
    length = np.sqrt(np.einsum("ij,ij->i", values, values))
    good = np.abs(length - 1) < UNIT if spec.are_unit else np.isfinite(values).all(1)
    return None if good.all() else int(np.argmin(good))


def shard_path(folder: Path, spec: StoreSpec, shard: Shard) -> Path:
    return folder / f"{spec.key}-{shard.name}.parquet"


def write_shard(folder: Path, spec: StoreSpec, shard: Shard) -> Path:
    """The file of a shard, durably; its name says what it holds.

    Raises:
        UserError: the disk is full.
    """
    columns = {
        "key": _bytes_array(shard.keys),
        "vector": _bytes_array(shard.vectors),
        "checksum": pa.array(shard.checksums),
    }
    table = pa.table(columns).replace_schema_metadata({"flipkd": json.dumps(asdict(spec))})
    path = shard_path(folder, spec, shard)
    with whole_file(path) as file:
        # Neither dictionaries nor compression gain anything on vectors. Bytes, not lists, of numbers: ten times faster.
        pq.write_table(
            table, file, use_dictionary=False, compression="none", write_statistics=False, write_page_checksum=True
        )
    return path


def read_shard(path: Path, spec: StoreSpec) -> Shard:
    """A shard, every number checked against its checksum.

    Raises:
        DamagedShard
    """
    table = _read(path, spec, ["key", "vector", "checksum"])
    vectors = _rows(table["vector"], spec.numbers)
    sums = table["checksum"].combine_chunks().to_numpy()
    shard = Shard(_rows(table["key"], WORD), vectors, sums)
    if shard.keys.shape[1:] != (2,) or vectors.shape[1:] != (spec.hidden_size,):
        raise DamagedShard("its vectors are not of the size in its specification")
    if path.name != shard_path(path.parent, spec, shard).name:
        raise DamagedShard("its texts are not those in its name")
    if not np.array_equal(checksums(shard.keys, padded(vectors)), sums):
        raise DamagedShard("vectors do not match their checksums")
    return shard


def read_keys(path: Path, spec: StoreSpec) -> np.ndarray:
    """The keys [k, 2] of a shard; its vectors are not read.

    Raises:
        DamagedShard
    """
    return _rows(_read(path, spec, ["key"])["key"], WORD)


def read_spec(path: Path) -> StoreSpec:
    """The specification that a shard says it belongs to.

    Raises:
        DamagedShard
    """
    try:
        return StoreSpec(**json.loads(pq.read_schema(path).metadata[b"flipkd"]))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DamagedShard(" ".join(str(error).split())[:200]) from None


def _read(path: Path, spec: StoreSpec, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(columns=columns)
        stored = json.loads(table.schema.metadata[b"flipkd"])
        if table.column_names != columns:
            raise DamagedShard("it has other columns")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DamagedShard(" ".join(str(error).split())[:200]) from None
    if stored != asdict(spec):
        raise DamagedShard("its specification is not the one in its name")
    return table


def _bytes_array(values: np.ndarray) -> pa.Array:
    """Rows of numbers as rows of bytes, without a copy."""
    values = np.ascontiguousarray(values)
    width = values.shape[1] * values.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])


def _rows(column: pa.ChunkedArray, dtype: np.dtype) -> np.ndarray:
    """Rows of bytes as rows of numbers [k, bytes / itemsize]."""
    width = getattr(column.type, "byte_width", 0)
    if not pa.types.is_fixed_size_binary(column.type) or column.null_count or width % dtype.itemsize:
        raise DamagedShard("its columns have other types")
    array = column.combine_chunks()
    values = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    return values.view(dtype).reshape(len(array), -1)
