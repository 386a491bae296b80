"""The verb `embed`: a file of texts in, their unit vectors out, window by window.

Shapes: N records, d the width of a vector.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flipkd_dist.durable import whole_file
from flipkd_dist.errors import UserError
from flipkd_dist.pair_files import check_output
from flipkd_dist.predict_file import check_not_input
from flipkd_dist.text_encoder import EncoderChoice, encoded_windows, located
from flipkd_dist.text_records import NamedText, read_named

NPY = ".npy"
FORMATS = (NPY, ".parquet")
Parts = Iterator[tuple[list[NamedText], np.ndarray]]


def embed_file(
    choice: EncoderChoice, source: Path, output: Path, text: str = "text", name: str | None = None
) -> tuple[int, int]:
    """Write the vector of every record of `source`, in their order; N and d.

    The file is read twice: first every record is checked, so that a mistake in the last one is told before the model is
    loaded. What is held of it is one window.

    Args:
        output: .parquet (`id`, `vector`) or .npy (float32 [N, d]).
    Raises:
        UserError: an unreadable input, an output that cannot be written, or no such model.
    """
    check_output(output, FORMATS)
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: vectors are written as {' or '.join(FORMATS)}: use one of these")
    if output.suffix == NPY and name is not None:
        raise UserError(
            f"--id: an array holds no names, its rows are those of the input: leave it out or write {FORMATS[1]}"
        )
    check_not_input(output, source)
    entries = partial(read_named, source, text, name)
    if next(entries(), None) is None:  # before a registered adapter is fetched
        raise UserError(f"--input {source}: no texts in it: name a file that has some")
    with located(choice) as found:
        count = sum(1 for _ in found.checked(entries()))
        encoder = found.load()
        parts = encoded_windows(encoder, entries(), count, "embed", f"--input {source}")
        with whole_file(output) as file:
            if output.suffix == NPY:
                write_npy(file, parts, count, encoder.dimension)
            else:
                write_parquet(file, parts, encoder.dimension)
    return count, encoder.dimension


def write_npy(file: BinaryIO, parts: Parts, count: int, width: int) -> None:
    """NumPy's own format, row after row."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, width)})
    for _, vectors in parts:
        file.write(np.ascontiguousarray(vectors, "<f4").tobytes())


def write_parquet(file: BinaryIO, parts: Parts, width: int) -> None:
    """A row group for each window: `id` (null where there is none) and `vector`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), width))])
    with pq.ParquetWriter(file, schema) as writer:
        for window, vectors in parts:
            names = pa.array([entry.name or None for entry in window], pa.string())
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            writer.write_table(pa.table([names, pa.FixedSizeListArray.from_arrays(flat, width)], schema))
