"""Texts encoded alone: one process without sharding against ZeRO-3 on two, at once and in chunks."""

from functools import partial

import numpy as np
import pytest
from gang import run_gang
from test_chunk_parity import OF_PACKING, train
from test_zero_parity import TOLERANCE, difference
from tiny import pair_table, save_student

from flipkd_dist.step import SUMS

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(("reads", "bidirectional"), [("lora_a", False), ("mean", True)])
def test_zero3_equals_one_process(tmp_path, reads, bidirectional, chunk):
    """Contrast batches of eight with a ragged tail of six, three to a step; every loss is there."""
    settings = {"mode": "alone", "readout": reads, "bidirectional": bidirectional, "accumulation": 3}
    folder, pairs = save_student(tmp_path), pair_table(22)
    [expected] = run_gang(1, partial(train, **settings), folder, pairs, 0, 8, None)
    ranks = run_gang(2, partial(train, **settings), folder, pairs, 3, 8, chunk)
    same = [row for row, name in enumerate(SUMS) if name not in OF_PACKING]
    assert np.all(np.array(expected["sums"])[:, :3] > 0.01)
    idle = {name for name, value in expected["gradients"][0].items() if not value.any()}
    assert len(idle) == (7 if reads == "lora_a" else 0)  # of the last layer but the A that is read
    for found in ranks:
        np.testing.assert_allclose(
            np.array(found["sums"])[:, same], np.array(expected["sums"])[:, same], rtol=TOLERANCE, atol=1e-6
        )
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=TOLERANCE)
        for gradients, wanted in zip(found["gradients"], expected["gradients"], strict=True):
            assert not any(gradients.pop(name).any() for name in idle)
            assert difference(gradients, {name: wanted[name] for name in gradients}) < TOLERANCE
        assert difference(found["weights"], expected["weights"]) < TOLERANCE
