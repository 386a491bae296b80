"""Which pairs a step trains on: a pure function of (seed, epoch, step), and a rank's share of (batch, rank, world)."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from flipkd_dist.config import RunConfig


@dataclass(frozen=True, eq=False)
class Order:
    """The order of `num_pairs` pairs over epochs of optimizer steps.

    A contrast batch holds the pairs of one micro-step over all ranks; a step is `accumulation` contrast batches.
    The last step of an epoch takes what is left: a shorter contrast batch, then empty ones.
    Pairs are shuffled anew in every epoch, and then up to `group_size` of one first text stand side by side.
    """

    num_pairs: int
    contrast_batch_size: int  # pairs of one micro-step over all ranks
    accumulation: int  # micro-steps of an optimizer step
    seed: int
    first_texts: np.ndarray | None = None  # [num_pairs], a number for each first text; needed with a group_size
    group_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.num_pairs / (self.contrast_batch_size * self.accumulation))

    def contrast_batches(self, step: int) -> list[np.ndarray]:
        """The pair indices of each micro-step of optimizer step `step` (counted from 0 over all epochs)."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        order = _order_of_epoch(self, epoch)
        size = self.contrast_batch_size
        first = step_of_epoch * self.accumulation * size
        return [order[first + micro * size : first + (micro + 1) * size] for micro in range(self.accumulation)]


@lru_cache(maxsize=1)  # a step asks for the epoch that the last one asked for
def _order_of_epoch(order: Order, epoch: int) -> np.ndarray:
    shuffled = np.random.Generator(np.random.PCG64([order.seed, epoch])).permutation(order.num_pairs)
    if order.group_size > 1:
        shuffled = shuffled[_side_by_side(order.first_texts[shuffled], order.group_size)]
    shuffled.setflags(write=False)
    return shuffled


def _side_by_side(texts: np.ndarray, group_size: int) -> np.ndarray:
    """Places of `texts` [n], up to `group_size` equal ones together, a group where its first member stands."""
    by_text = np.argsort(texts, kind="stable")
    place = np.arange(len(texts))
    is_start = np.append(True, texts[by_text][1:] != texts[by_text][:-1])
    number = place - np.maximum.accumulate(np.where(is_start, place, 0))  # among those of the same text
    leader = by_text[place - number % group_size]
    return by_text[np.lexsort((number, leader))]


def training_order(config: RunConfig, first_texts: np.ndarray) -> tuple[Order, int]:
    """The order of a run's training and its number of optimizer steps, the same for any number of workers.

    Args:
        first_texts: [num_pairs], a number for each first text.
    """
    train, size = config.train, config.contrast_batch_size
    accumulation = train.gradient_accumulation_steps
    order = Order(len(first_texts), size, accumulation, config.seed, first_texts, train.group_size)
    return order, train.max_steps if train.max_steps > 0 else train.num_train_epochs * order.steps_per_epoch


def rows_of_rank(num_rows: int, rank: int, world_size: int) -> slice:
    """The contiguous share of `num_rows` rows that `rank` owns; shares differ by at most one row."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
