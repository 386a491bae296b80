"""The order of pairs is a pure function; shares of ranks partition the batch."""

import numpy as np
import pytest

from flipkd_dist.order import Order, rows_of_rank


def test_an_epoch_holds_every_pair_once_with_a_ragged_tail():
    order = Order(num_pairs=23, contrast_batch_size=4, accumulation=3, seed=1)
    assert order.steps_per_epoch == 2
    batches = [batch for step in range(2) for batch in order.contrast_batches(step)]
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert sorted(np.concatenate(batches)) == list(range(23))


def test_the_last_step_of_an_epoch_may_have_empty_micro_steps():
    batches = Order(num_pairs=13, contrast_batch_size=4, accumulation=3, seed=1).contrast_batches(1)
    assert [len(batch) for batch in batches] == [1, 0, 0]


def test_order_depends_on_seed_and_epoch_alone():
    order = Order(50, 8, 1, seed=7)
    first = [order.contrast_batches(step)[0].tolist() for step in range(14)]
    assert first == [Order(50, 8, 1, seed=7).contrast_batches(step)[0].tolist() for step in range(14)]
    assert first[0] != first[7]  # another epoch
    assert first[0] != Order(50, 8, 1, seed=8).contrast_batches(0)[0].tolist()


def test_accumulation_only_regroups_the_contrast_batches():
    flat = [batch.tolist() for step in range(6) for batch in Order(24, 4, 1, seed=0).contrast_batches(step)]
    grouped = [batch.tolist() for step in range(2) for batch in Order(24, 4, 3, seed=0).contrast_batches(step)]
    assert flat == grouped


@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 11])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_partition_the_rows_evenly(num_rows, world_size):
    shares = [rows_of_rank(num_rows, rank, world_size) for rank in range(world_size)]
    assert [row for share in shares for row in range(num_rows)[share]] == list(range(num_rows))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1
