"""The one optimizer step: forward, losses, backward, update. Every division by a global count stands here.

Rank r backpropagates `world * sum_k weight_k * sum_kr / count_k`, its sums over its own rows against all gathered
columns, the counts over the whole optimizer step (all ranks, all micro-steps). The gather's backward sums over ranks
and the engine averages over ranks, so the gradient is that of `sum_k weight_k * sum_k / count_k` exactly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.batches import BatchMaker
from flipkd_dist.chunks import ChunkedBackward, ChunkedMicroStep, RowBlocks, chunk_slices, num_correct
from flipkd_dist.config import LossConfig
from flipkd_dist.contrast import ContrastRows
from flipkd_dist.contrast_terms import ContrastTerms, contrast_terms, directions
from flipkd_dist.engine import Engine
from flipkd_dist.losses import supervised_sum
from flipkd_dist.order import rows_of_rank
from flipkd_dist.packing import PackedBatch
from flipkd_dist.phases import Clock, no_clock
from flipkd_dist.signals import TeacherSignals
from flipkd_dist.world import World

LOSSES = ("sup", "dist", "mcl")
# Sums that a step leaves behind for logging; the first three are the losses' sums over this rank's rows.
SUMS = (
    *LOSSES,
    "margin_out",
    "margin_entries",
    "correct",
    "cos_match",
    "num_match",
    "cos_mismatch",
    "num_mismatch",
    "cos_off_diagonal",
    "num_off_diagonal",
    "kept_positives",
    "kept_negatives",
    "kept_off_diagonal",
    "tokens",
    "padded_tokens",
    "truncated",
    "unpacked_tokens",
)


@dataclass(frozen=True)
class MicroStep:
    """What a rank needs for one forward and backward."""

    batch: PackedBatch
    directions: list[ContrastRows]  # first texts against second texts; with mcl_symmetric the other way too
    rows_per_rank: list[int]

    @property
    def counts(self) -> Tensor:
        return self.directions[0].counts()


class TrainingStep:
    def __init__(
        self,
        engine: Engine,
        world: World,
        signals: TeacherSignals,
        make_batch: BatchMaker,
        loss: LossConfig,
        mini_batch_size: int | None = None,
    ):
        """
        Args:
            signals: the training pairs and the teacher's word on them.
            mini_batch_size: the most pairs of one forward on one rank; None: its whole share of a contrast batch.
        """
        self.engine, self.world, self.signals, self.pairs = engine, world, signals, signals.pairs
        self.make_batch, self.loss, self.mini_batch_size = make_batch, loss, mini_batch_size
        self.weights = torch.tensor([loss.sup_weight, loss.dist_weight, loss.mcl_weight], dtype=torch.float64)
        self.clock: Clock = no_clock  # told which phase begins and ends; it changes nothing

    def prepare(self, batches: list[np.ndarray]) -> list[MicroStep | ChunkedMicroStep]:
        """This rank's part of an optimizer step whose contrast batches are `batches` (pair numbers).

        It depends on nothing that a step changes, and may run in another thread.
        """
        return [self._prepare(batch) for batch in batches]

    def _prepare(self, batch: np.ndarray) -> MicroStep | ChunkedMicroStep:
        shares = [rows_of_rank(len(batch), rank, self.world.size) for rank in range(self.world.size)]
        own, pairs = shares[self.world.rank], self.pairs
        rows_per_rank = [share.stop - share.start for share in shares]
        texts = [(pairs.texts[pairs.text_a[pair]], pairs.texts[pairs.text_b[pair]]) for pair in batch[own]]
        chunks = chunk_slices(len(texts), max(rows_per_rank), self.mini_batch_size)
        if len(chunks) == 1:
            rows = directions(self.signals, batch, own, self.loss)
            return MicroStep(self.make_batch(texts), rows, rows_per_rank)
        batches, labels = [self.make_batch(texts[chunk]) for chunk in chunks], torch.from_numpy(pairs.label[batch[own]])
        blocks = RowBlocks(self.signals, batch, own, self.loss)
        return ChunkedMicroStep(batches, chunks, labels, blocks, rows_per_rank, blocks.counts())

    def counts(self, micro_steps: list[MicroStep | ChunkedMicroStep]) -> Tensor:
        """Pairs, kept entries and anchors of the whole optimizer step, over all ranks: float64 [3]."""
        own = sum((micro.counts for micro in micro_steps), torch.zeros(3, dtype=torch.float64))
        with self.clock("communication"):
            return self.world.sum(own.to(self.world.device)).cpu()

    def backward(self, micro_steps: list[MicroStep | ChunkedMicroStep], counts: Tensor) -> Tensor:
        """Forward and backward of every micro-step; this rank's sums, float64 [len(SUMS)]."""
        scale = (self.world.size * self.weights / counts.clamp(min=1)).to(self.world.device)
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        with self._reduction(micro_steps):
            for number, micro in enumerate(micro_steps, start=1):
                whole = isinstance(micro, MicroStep)
                total += (self._whole if whole else self._chunked)(micro, scale, number == len(micro_steps))
        return total

    @contextmanager
    def _reduction(self, micro_steps: list[MicroStep | ChunkedMicroStep]) -> Iterator[None]:
        """Many backwards reduce their gradients together; one a micro-step does so as it runs."""
        if all(isinstance(micro, MicroStep) for micro in micro_steps):
            yield
            return
        with self.clock("backward"), self.engine.one_reduction():
            yield

    def _whole(self, micro: MicroStep, scale: Tensor, last: bool) -> Tensor:
        with self.clock("loss"):
            losses, statistics = self._losses(micro)
            loss = (losses * scale.to(losses.dtype)).sum()
        with self.clock("backward"):
            self.engine.backward(loss, last)
        return torch.cat([losses.detach().double(), statistics])

    def _losses(self, micro: MicroStep) -> tuple[Tensor, Tensor]:
        """The three sums over this rank's rows [3], connected to the graph even when zero, and the statistics."""
        device = self.world.device
        sending = partial(self.clock, "communication")
        with self.clock("forward"):
            logits, readout_a, readout_b = self.engine.forward(**micro.batch.tensors(device))
        rows = [direction.to(device) for direction in micro.directions]
        real, labels = len(rows[0].labels), rows[0].labels  # a dummy pair is cut off here
        logits, readout_a, readout_b = logits[:real], readout_a[:real], readout_b[:real]
        all_b = self.world.gather_rows(readout_b, micro.rows_per_rank, sending)
        all_a = self.world.gather_rows(readout_a, micro.rows_per_rank, sending) if self.loss.mcl_symmetric else None
        terms = contrast_terms(readout_a, readout_b, all_a, all_b, rows, self.loss)
        losses = torch.stack([supervised_sum(logits, labels), terms.distance, terms.contrastive])
        return losses, statistics([micro.batch], num_correct(logits, labels), terms)

    def _chunked(self, micro: ChunkedMicroStep, scale: Tensor, last: bool) -> Tensor:
        run = ChunkedBackward(self.engine, self.world, self.loss, self.clock)
        supervised, correct, terms = run(micro, scale, last)
        losses = torch.stack([supervised, terms.distance, terms.contrastive])
        return torch.cat([losses, statistics(micro.batches, correct, terms)])

    def __call__(
        self, micro_steps: list[MicroStep | ChunkedMicroStep], learning_rate: float
    ) -> tuple[Tensor, Tensor, float]:
        """One update. Returns the counts [3], this rank's sums [len(SUMS)] and the gradient's norm before clipping."""
        counts = self.counts(micro_steps)
        sums = self.backward(micro_steps, counts)
        with self.clock("optimizer"):
            return counts, sums, self.engine.step(learning_rate)


def statistics(batches: list[PackedBatch], correct: Tensor, terms: ContrastTerms) -> Tensor:
    """SUMS without the losses: float64."""
    packing = [
        [batch.num_tokens, batch.input_ids.numel(), batch.num_truncated, batch.num_unpacked] for batch in batches
    ]
    packing = torch.tensor(packing, dtype=torch.float64, device=correct.device).sum(dim=0)
    return torch.cat([terms.margin.double(), correct.double().unsqueeze(0), terms.statistics, packing])


def summarise(counts: Tensor, sums: Tensor, loss: LossConfig) -> dict[str, float]:
    """Logged values out of the counts and sums of one or several steps, both summed over ranks.

    With several steps the losses are averages weighted by each step's counts.
    """
    value = dict(zip(SUMS, sums.tolist(), strict=True))
    num_pairs, num_kept, num_anchors = (max(count, 1.0) for count in counts.tolist())

    def share(part: str, whole: str) -> float:
        return value[part] / max(value[whole], 1.0)

    losses = {
        "loss_sup": value["sup"] / num_pairs,
        "loss_dist": value["dist"] / num_kept,
        "loss_mcl": value["mcl"] / num_anchors,
    }
    weights = (loss.sup_weight, loss.dist_weight, loss.mcl_weight)
    return {
        "loss": sum(weight * term for weight, term in zip(weights, losses.values(), strict=True)),
        **losses,
        "accuracy": value["correct"] / num_pairs,
        "cosine_match": share("cos_match", "num_match"),
        "cosine_mismatch": share("cos_mismatch", "num_mismatch"),
        "cosine_off_diagonal": share("cos_off_diagonal", "num_off_diagonal"),
        "margin_out_share": share("margin_out", "margin_entries"),
        "kept_positives": share("kept_positives", "num_match"),
        "kept_negatives": share("kept_negatives", "num_mismatch"),
        "kept_off_diagonal": share("kept_off_diagonal", "num_off_diagonal"),
        "truncated_share": value["truncated"] / num_pairs,
        "saved_tokens_share": 1 - value["padded_tokens"] / value["unpacked_tokens"],
    }
