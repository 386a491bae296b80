"""The order of pairs is a pure function; shares of ranks partition the batch."""

from itertools import groupby

import numpy as np
import pytest

from flipkd_dist.config import validate
from flipkd_dist.order import Order, rows_of_rank, training_order


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


def test_pairs_of_one_first_text_stay_side_by_side():
    texts = np.array([7] * 6 + [3] * 5 + list(range(10, 20)))
    order = Order(21, 21, 1, 5, texts, group_size=4)
    for epoch in range(3):
        [batch] = order.contrast_batches(epoch)
        assert sorted(batch) == list(range(21))
        runs = [(text, len(list(run))) for text, run in groupby(texts[batch])]
        assert sorted(runs) == sorted([(7, 4), (7, 2), (3, 4), (3, 1), *((text, 1) for text in range(10, 20))])
        plain = Order(21, 21, 1, 5).contrast_batches(epoch)[0]
        leaders = [
            pair for pair in plain if texts[pair] > 9 or pair == next(p for p in plain if texts[p] == texts[pair])
        ]
        kept = [pair for pair in batch if pair in leaders]
        assert kept == leaders  # a group stands where the shuffle has its first member
    assert order.contrast_batches(0)[0].tolist() != order.contrast_batches(1)[0].tolist()
    alone = Order(21, 21, 1, 5, texts).contrast_batches(0)[0]
    assert alone.tolist() == Order(21, 21, 1, 5).contrast_batches(0)[0].tolist()


@pytest.mark.parametrize("workers", [2, [1, 2], [2, 2]])
def test_a_runs_order_is_that_of_its_settings(workers):
    """With workers in a range, that of the most."""
    train = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "group_size": 4, "num_train_epochs": 2}
    distributed = {"num_workers": workers}
    config = validate({"name": "x", "seed": 5, "train": train, "distributed": distributed}, "x.yaml")
    texts = np.repeat(np.arange(6), 4)
    order, num_steps = training_order(config, texts)
    assert num_steps == 2 * 2 and [len(batch) for batch in order.contrast_batches(0)] == [6, 6]
    expected = Order(24, 6, 2, 5, texts, group_size=4)
    for step in range(num_steps):
        found = np.concatenate(order.contrast_batches(step))
        assert found.tolist() == np.concatenate(expected.contrast_batches(step)).tolist()
        assert all(len(set(texts[four])) == 1 for four in found.reshape(-1, 4))


@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 11])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shares_partition_the_rows_evenly(num_rows, world_size):
    shares = [rows_of_rank(num_rows, rank, world_size) for rank in range(world_size)]
    assert [row for share in shares for row in range(num_rows)[share]] == list(range(num_rows))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1
