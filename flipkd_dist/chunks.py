"""A contrast batch of any size in the memory of a few pairs: its forward in chunks, with cached gradients.

Source: GradCache (Gao et al. 2021, arXiv 2101.06983). First the read-outs of every chunk without gradient, then the
contrastive losses over all of them and their gradient with respect to the read-outs, then each chunk again with its
share of that gradient; the generators begin each chunk as they did the first time, so dropout draws the same.

Shapes: n pairs of the contrast batch, m of them a rank's own in K chunks, r the width of a read-out. The matrix
[m, n] is never whole: it comes and goes in blocks of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.config import LossConfig
from flipkd_dist.contrast import ContrastRows, contrast_rows
from flipkd_dist.contrast_terms import ContrastTerms, contrast_terms, directions
from flipkd_dist.engine import Engine
from flipkd_dist.losses import supervised_sum
from flipkd_dist.order import rows_of_rank
from flipkd_dist.packing import PackedBatch
from flipkd_dist.phases import Clock
from flipkd_dist.signals import TeacherSignals
from flipkd_dist.world import World

BLOCK_ENTRIES = 2**17  # of the matrix at a time: about a dozen temporaries of half a MiB
BLOCK_ROWS = 64  # at least, however many columns: every block looks all columns up


def chunk_slices(num_rows: int, most_rows: int, chunk_size: int | None) -> list[slice]:
    """A rank's rows in as many even chunks as the rank with the most rows needs; some may be empty.

    Args:
        most_rows: of any rank; every rank runs as many forwards.
        chunk_size: the most rows of a chunk; None: all at once.
    """
    count = max(1, ceil(most_rows / chunk_size)) if chunk_size else 1
    return [rows_of_rank(num_rows, chunk, count) for chunk in range(count)]


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """What labels and teacher say of a rank's rows, made anew whenever it is asked for, a block of rows at a time."""

    signals: TeacherSignals
    batch: np.ndarray  # [n] pair numbers
    own: slice
    loss: LossConfig

    def __iter__(self) -> Iterator[tuple[slice, list[ContrastRows]]]:
        """Each block's place among the own rows, and its rows in every direction."""
        for rows in self._slices():
            place = slice(rows.start - self.own.start, rows.stop - self.own.start)
            yield place, directions(self.signals, self.batch, rows, self.loss)

    def counts(self) -> Tensor:
        """Pairs, kept entries and anchors: float64 [3]."""
        total = torch.zeros(3, dtype=torch.float64)
        for rows in self._slices():
            total += contrast_rows(self.signals, self.batch, rows, self.loss.threshold).counts()
        return total

    def _slices(self) -> Iterator[slice]:
        size = max(BLOCK_ROWS, BLOCK_ENTRIES // max(1, len(self.batch)))
        for start in range(self.own.start, self.own.stop, size):
            yield slice(start, min(start + size, self.own.stop))


@dataclass(frozen=True, eq=False)
class ChunkedMicroStep:
    """What a rank needs for the K forwards and backwards of its share of a contrast batch."""

    batches: list[PackedBatch]  # K; that of an empty chunk holds a dummy pair
    chunks: list[slice]  # K, into the own rows
    labels: Tensor  # [m] int64
    blocks: RowBlocks
    rows_per_rank: list[int]
    counts: Tensor  # float64 [3], of the blocks


class ChunkedBackward:
    def __init__(self, engine: Engine, world: World, loss: LossConfig, clock: Clock):
        self.engine, self.world, self.loss, self.clock = engine, world, loss, clock

    def __call__(self, micro: ChunkedMicroStep, scale: Tensor, last: bool) -> tuple[Tensor, Tensor, ContrastTerms]:
        """Accumulate the gradient of a micro-step.

        Args:
            scale: [3], factors on the sums of the three losses.
            last: of the optimizer step's micro-steps.
        Returns:
            The sum of L_sup, how many answers were right, and the terms of the contrast.
        """
        states, readouts = self.read(micro)
        scale = scale.to(readouts[0].dtype)
        with self.clock("loss"):
            gradients, terms = self.cache_gradients(micro, readouts, scale)
        return *self.replay(micro, states, gradients, scale, last), terms

    def read(self, micro: ChunkedMicroStep) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """The generators' states before each chunk, and the read-outs of first and second texts [m, r]."""
        states, readouts = [], None
        for batch, rows in zip(micro.batches, micro.chunks, strict=True):
            states.append(self.world.random_state())
            with self.clock("forward"):
                found = self.engine.readouts(**batch.tensors(self.world.device))
            # Copied: what they are views of would stay between activations that are freed.
            readouts = readouts or [values.new_empty(len(micro.labels), values.shape[1]) for values in found]
            for side, values in zip(readouts, found, strict=True):
                side[rows] = values[: rows.stop - rows.start]
        return states, readouts

    def cache_gradients(
        self, micro: ChunkedMicroStep, readouts: list[Tensor], scale: Tensor
    ) -> tuple[list[Tensor], ContrastTerms]:
        """The scaled losses' gradients with respect to the read-outs, over all ranks, and the terms of the contrast."""
        own = [values.detach().requires_grad_() for values in readouts]
        sides = (0, 1) if self.loss.mcl_symmetric else (1,)
        sending = partial(self.clock, "communication")
        gathered = {side: self.world.gather_rows(own[side], micro.rows_per_rank, sending) for side in sides}
        # The blocks add up their gradients here, so that the gather runs backwards once.
        columns = {side: values.detach().requires_grad_() for side, values in gathered.items()}
        terms = ContrastTerms.zeros(self.world.device)
        for place, rows in micro.blocks:
            rows = [direction.to(self.world.device) for direction in rows]
            block = contrast_terms(own[0][place], own[1][place], columns.get(0), columns[1], rows, self.loss)
            (scale[1] * block.distance + scale[2] * block.contrastive).backward()
            terms = terms + block
        for side in sides:
            gathered[side].backward(gradient_of(columns[side]))
        return [gradient_of(values) for values in own], terms

    def replay(
        self,
        micro: ChunkedMicroStep,
        states: list[dict[str, Tensor]],
        gradients: list[Tensor],
        scale: Tensor,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        """Every chunk with gradient, dropout as in `read`; the sum of L_sup and the number of right answers."""
        supervised, correct = [], []
        for chunk, (batch, rows, state) in enumerate(zip(micro.batches, micro.chunks, states, strict=True)):
            self.world.restore_random(state)
            with self.clock("forward"):
                logits, *readouts = self.engine.forward(**batch.tensors(self.world.device))
            logits = logits[: rows.stop - rows.start]  # a dummy pair is cut off here
            labels = micro.labels[rows].to(self.world.device)
            value = supervised_sum(logits, labels)
            supervised.append(value.detach())
            correct.append(num_correct(logits, labels))
            value = scale[0] * value
            for found, gradient in zip(readouts, gradients, strict=True):
                value = value + (found[: len(labels)] * gradient[rows]).sum()
            with self.clock("backward"):
                self.engine.backward(value, last and chunk == len(micro.chunks) - 1)
        return torch.stack(supervised).double().sum(), torch.stack(correct).sum()


def gradient_of(values: Tensor) -> Tensor:
    """Zeros where nothing has been sent back: this rank has no rows."""
    return torch.zeros_like(values) if values.grad is None else values.grad


def num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits[:, 0] > logits[:, 1]) == (labels == 1)).sum()
