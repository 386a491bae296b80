"""What a trained student says of labelled pairs, kept in a file: the soft labels of classic distillation.

Shapes: N pairs.
"""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flipkd_dist.durable import whole_file
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.evaluate import pair_texts
from flipkd_dist.model_files import fingerprint
from flipkd_dist.pairs import PairTable
from flipkd_dist.predict import Matcher, progress
from flipkd_dist.stop import StopRequest
from flipkd_dist.token_batches import BatchLimits
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")


def student_fingerprint(adapter: Path) -> str:
    """What a student answers with; the card in flipkd.json carries the fingerprint of its base.

    Raises:
        UserError: nothing has been trained there.
    """
    if not (adapter / "flipkd.json").is_file():
        raise UserError(f"{adapter}: no adapter yet: train the student first whose p(match) is to be learnt")
    names = ("flipkd.json", "adapter_config.json")
    return fingerprint(adapter, also=[name for name in names if (adapter / name).is_file()])


def soft_labels(path: Path, inputs: str, adapter: Path, pairs: PairTable, device: str, stop: StopRequest) -> np.ndarray:
    """The student's p(match) of every pair, float64 [N], out of the file or by the student; kept whole or not at all.

    Args:
        path: a Parquet file with columns `pair` and `p_match`.
        inputs: a hash of adapter and pairs, kept in the file.
    Raises:
        StoppedOnRequest: nothing is kept of a scoring that was stopped.
    """
    known = _read(path, inputs)
    if known is not None:
        logger.info("soft labels: complete for the same inputs, skipped")
        return known
    matcher = Matcher(adapter, device=device)
    with progress(len(pairs), "soft labels") as advance:

        def done(num_pairs: int, num_cut: int) -> None:
            advance(num_pairs, num_cut)
            if stop.made(World()):
                raise StoppedOnRequest("stopped on request: run the same command again to go on")

        p_match = matcher.scores(pair_texts(pairs), BatchLimits(), done)[:, 0]
    table = pa.table({"pair": np.arange(len(pairs)), "p_match": p_match})
    with whole_file(path) as file:
        pq.write_table(table.replace_schema_metadata({"inputs": inputs}), file)
    return p_match


def _read(path: Path, inputs: str) -> np.ndarray | None:
    """Those of the same inputs; None where there are none, or a damaged file."""
    try:
        table = pq.read_table(path)
        same = (table.schema.metadata or {}).get(b"inputs") == inputs.encode()
        return table["p_match"].to_numpy() if same else None
    except (OSError, KeyError, pa.ArrowException):
        return None
