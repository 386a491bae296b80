"""L_dist and the contrastive loss of rows of the contrast matrix out of read-outs, and what is logged of them.

Shapes: n pairs of the contrast batch, k rows (all of a rank's own, or a block of them), r the width of a read-out.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.config import LossConfig
from flipkd_dist.contrast import ContrastRows, contrast_rows
from flipkd_dist.losses import (
    Margins,
    arccse_margins,
    contrastive_sum,
    cosine_matrix,
    distance_sum,
    kdmcse_margins,
    mcl_margins,
)
from flipkd_dist.signals import TeacherSignals


@dataclass(frozen=True)
class ContrastTerms:
    """Sums over the rows."""

    distance: Tensor  # L_dist
    contrastive: Tensor  # L_MCL, or what loss.contrastive sets in its place
    margin: Tensor  # [2], entries that left [0, pi], and all entries of anchors
    statistics: Tensor  # float64 [9], see `matrix_statistics`

    @classmethod
    def zeros(cls, device: torch.device) -> "ContrastTerms":
        """Of no rows, in float64."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(zeros(()), zeros(()), zeros(2), zeros(9))

    def __add__(self, other: "ContrastTerms") -> "ContrastTerms":
        """Of the rows of both, without gradient."""
        return ContrastTerms(*((getattr(self, n) + getattr(other, n)).detach() for n in self.__dataclass_fields__))


def directions(signals: TeacherSignals, batch: np.ndarray, rows: slice, loss: LossConfig) -> list[ContrastRows]:
    """First texts against second texts; with mcl_symmetric the other way too."""
    swaps = [False, True] if loss.mcl_symmetric else [False]
    return [contrast_rows(signals, batch, rows, loss.threshold, swap) for swap in swaps]


def contrast_terms(
    readout_a: Tensor,
    readout_b: Tensor,
    all_a: Tensor | None,
    all_b: Tensor,
    rows: list[ContrastRows],
    loss: LossConfig,
) -> ContrastTerms:
    """
    Args:
        readout_a, readout_b: [k, r], of the rows' first and second texts.
        all_a, all_b: [n, r], of the contrast batch; the first is needed with mcl_symmetric only.
        rows: what labels and teacher say of the rows, a direction each.
    """
    similarity = cosine_matrix(readout_a, all_b)
    contrastive, margin = _contrastive(similarity, rows[0], loss)
    if loss.mcl_symmetric:
        backwards, margin_backwards = _contrastive(cosine_matrix(readout_b, all_a), rows[1], loss)
        contrastive = (contrastive + backwards) / 2
        margin = margin + margin_backwards
    distance = distance_sum(similarity, rows[0].teacher_similarity, rows[0].keep)
    return ContrastTerms(distance, contrastive, margin, matrix_statistics(rows[0], similarity))


def _margins(similarity: Tensor, rows: ContrastRows, loss: LossConfig) -> Margins:
    match loss.contrastive:
        case "mcl":
            return mcl_margins(rows.teacher_similarity, rows.positive_column, loss.margin, loss.mcl_negative_margin)
        case "infonce":
            return Margins()
        case "arccse":
            return arccse_margins(similarity, loss.margin)
        case "kdmcse":
            return kdmcse_margins(similarity, rows.teacher_similarity, loss.margin)


def _contrastive(similarity: Tensor, rows: ContrastRows, loss: LossConfig) -> tuple[Tensor, Tensor]:
    margins = _margins(similarity, rows, loss)
    return contrastive_sum(similarity, margins, rows.anchor, rows.negative, rows.positive_column, loss.temperature)


@torch.no_grad()
def matrix_statistics(rows: ContrastRows, similarity: Tensor) -> Tensor:
    """Sum of cosines and number of matching, other labelled and off-diagonal entries; how many of each are kept.

    By products with masks: to index by a mask would wait for the device.
    """
    own = rows.positive_column.unsqueeze(1)
    diagonal, kept = similarity.gather(1, own).squeeze(1), rows.keep.gather(1, own).squeeze(1)
    match, off = rows.labels == 1, rows.off_diagonal
    return torch.stack(
        [
            value.double()
            for value in (
                (diagonal * match).sum(),
                match.sum(),
                (diagonal * ~match).sum(),
                (~match).sum(),
                (similarity * off).sum(),
                off.sum(),
                (kept & match).sum(),
                (kept & ~match).sum(),
                (rows.keep & off).sum(),
            )
        ]
    )
