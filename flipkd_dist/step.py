"""The one optimizer step: forward, losses, backward, update. Every division by a global count stands here.

Rank r backpropagates `world * sum_k weight_k * sum_kr / count_k`, its sums over its own rows against all gathered
columns, the counts over the whole optimizer step (all ranks, all micro-steps). The gather's backward sums over ranks
and the engine averages over ranks, so the gradient is that of `sum_k weight_k * sum_k / count_k` exactly.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import LossConfig
from flipkd_dist.contrast import ContrastRows, contrast_rows
from flipkd_dist.engine import Engine
from flipkd_dist.losses import contrastive_sum, cosine_matrix, distance_sum, supervised_sum
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


class TrainingStep:
    def __init__(self, engine: Engine, world: World, signals: TeacherSignals, make_batch: BatchMaker, loss: LossConfig):
        """
        Args:
            signals: the training pairs and the teacher's word on them.
        """
        self.engine, self.world, self.signals, self.pairs = engine, world, signals, signals.pairs
        self.make_batch, self.loss = make_batch, loss
        self.weights = torch.tensor([loss.sup_weight, loss.dist_weight, loss.mcl_weight], dtype=torch.float64)
        self.clock: Clock = no_clock  # told which phase begins and ends; it changes nothing

    def prepare(self, batches: list[np.ndarray]) -> list[MicroStep]:
        """This rank's part of an optimizer step whose contrast batches are `batches` (pair numbers)."""
        with self.clock("data"):
            return [self._prepare(batch) for batch in batches]

    def _prepare(self, batch: np.ndarray) -> MicroStep:
        shares = [rows_of_rank(len(batch), rank, self.world.size) for rank in range(self.world.size)]
        own, pairs = shares[self.world.rank], self.pairs
        directions = [
            contrast_rows(self.signals, batch, own, self.loss.threshold, swap)
            for swap in ([False, True] if self.loss.mcl_symmetric else [False])
        ]
        texts = [(pairs.texts[pairs.text_a[pair]], pairs.texts[pairs.text_b[pair]]) for pair in batch[own]]
        return MicroStep(self.make_batch(texts), directions, [share.stop - share.start for share in shares])

    def counts(self, micro_steps: list[MicroStep]) -> Tensor:
        """Pairs, kept entries and anchors of the whole optimizer step, over all ranks: float64 [3]."""
        own = torch.zeros(3, dtype=torch.float64)
        for micro in micro_steps:
            rows = micro.directions[0]
            own += torch.tensor([len(rows.labels), rows.keep.sum(), rows.anchor.sum()], dtype=torch.float64)
        with self.clock("communication"):
            return self.world.sum(own.to(self.world.device)).cpu()

    def backward(self, micro_steps: list[MicroStep], counts: Tensor) -> Tensor:
        """Forward and backward of every micro-step; this rank's sums, float64 [len(SUMS)]."""
        scale = (self.world.size * self.weights / counts.clamp(min=1)).to(self.world.device)
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        for number, micro in enumerate(micro_steps, start=1):
            with self.clock("loss"):
                losses, statistics = self._losses(micro)
                loss = (losses * scale.to(losses.dtype)).sum()
            with self.clock("backward"):
                self.engine.backward(loss, last=number == len(micro_steps))
            total += torch.cat([losses.detach().double(), statistics])
        return total

    def _losses(self, micro: MicroStep) -> tuple[Tensor, Tensor]:
        """The three sums over this rank's rows [3], connected to the graph even when zero, and the statistics."""
        device, loss = self.world.device, self.loss
        sending = partial(self.clock, "communication")
        with self.clock("forward"):
            logits, readout_a, readout_b = self.engine.forward(**micro.batch.tensors(device))
        rows = micro.directions[0].to(device)
        real = len(rows.labels)  # a dummy pair is cut off here
        logits, readout_a, readout_b = logits[:real], readout_a[:real], readout_b[:real]
        similarity = cosine_matrix(readout_a, self.world.gather_rows(readout_b, micro.rows_per_rank, sending))
        contrastive, margin_out = self._contrastive(similarity, rows)
        if loss.mcl_symmetric:
            other = cosine_matrix(readout_b, self.world.gather_rows(readout_a, micro.rows_per_rank, sending))
            backwards, margin_out_backwards = self._contrastive(other, micro.directions[1].to(device))
            contrastive = (contrastive + backwards) / 2
            margin_out = margin_out + margin_out_backwards
        losses = torch.stack(
            [
                supervised_sum(logits, rows.labels),
                distance_sum(similarity, rows.teacher_similarity, rows.keep),
                contrastive,
            ]
        )
        return losses, torch.cat([margin_out.double(), self._statistics(micro.batch, rows, logits, similarity)])

    def _contrastive(self, similarity: Tensor, rows: ContrastRows) -> tuple[Tensor, Tensor]:
        loss = self.loss
        return contrastive_sum(
            similarity,
            rows.teacher_similarity,
            rows.anchor,
            rows.negative,
            rows.positive_column,
            loss.margin,
            loss.temperature,
            loss.mcl_negative_margin,
        )

    @torch.no_grad()
    def _statistics(self, batch: PackedBatch, rows: ContrastRows, logits: Tensor, similarity: Tensor) -> Tensor:
        own = rows.positive_column.unsqueeze(1)
        diagonal, kept = similarity.gather(1, own).squeeze(1), rows.keep.gather(1, own).squeeze(1)
        match, off = rows.labels == 1, rows.off_diagonal
        return torch.stack(
            [
                value.double()
                if isinstance(value, Tensor)
                else torch.tensor(value, dtype=torch.float64, device=off.device)
                for value in (
                    ((logits[:, 0] > logits[:, 1]) == match).sum(),
                    diagonal[match].sum(),
                    match.sum(),
                    diagonal[~match].sum(),
                    (~match).sum(),
                    similarity[off].sum(),
                    off.sum(),
                    kept[match].sum(),
                    kept[~match].sum(),
                    (rows.keep & off).sum(),
                    batch.num_tokens,
                    batch.input_ids.numel(),
                    batch.num_truncated,
                    batch.num_unpacked,
                )
            ]
        )

    def __call__(self, micro_steps: list[MicroStep], learning_rate: float) -> tuple[Tensor, Tensor, float]:
        """One update. Returns the counts [3], this rank's sums [len(SUMS)] and the gradient's norm before clipping."""
        counts = self.counts(micro_steps)
        sums = self.backward(micro_steps, counts)
        with self.clock("optimizer"):
            return counts, sums, self.engine.step(learning_rate)


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
