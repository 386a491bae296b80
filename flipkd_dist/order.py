"""Which pairs a step trains on: a pure function of (seed, epoch, step), and a rank's share of (batch, rank, world)."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from flipkd_dist.config import RunConfig


@dataclass(frozen=True)
class Order:
    """The order of `num_pairs` pairs over epochs of optimizer steps.

    A contrast batch holds the pairs of one micro-step over all ranks; a step is `accumulation` contrast batches.
    The last step of an epoch takes what is left: a shorter contrast batch, then empty ones.
    """

    num_pairs: int
    contrast_batch_size: int  # pairs of one micro-step over all ranks
    accumulation: int  # micro-steps of an optimizer step
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.num_pairs / (self.contrast_batch_size * self.accumulation))

    def contrast_batches(self, step: int) -> list[np.ndarray]:
        """The pair indices of each micro-step of optimizer step `step` (counted from 0 over all epochs)."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        order = _permutation(self.num_pairs, self.seed, epoch)
        size = self.contrast_batch_size
        first = step_of_epoch * self.accumulation * size
        return [order[first + micro * size : first + (micro + 1) * size] for micro in range(self.accumulation)]


@lru_cache(maxsize=1)  # a step asks for the epoch that the last one asked for
def _permutation(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_pairs)
    order.setflags(write=False)
    return order


def training_order(config: RunConfig, num_pairs: int, world_size: int) -> tuple[Order, int]:
    """The order of a run's training and its number of optimizer steps."""
    train = config.train
    contrast_batch = train.per_device_train_batch_size * world_size
    order = Order(num_pairs, contrast_batch, train.gradient_accumulation_steps, config.seed)
    return order, train.max_steps if train.max_steps > 0 else train.num_train_epochs * order.steps_per_epoch


def rows_of_rank(num_rows: int, rank: int, world_size: int) -> slice:
    """The contiguous share of `num_rows` rows that `rank` owns; shares differ by at most one row."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
