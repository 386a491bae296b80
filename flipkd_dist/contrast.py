"""A rank's rows of the contrast matrix: what the labels and the teacher say, before the student has run.

Shapes: n pairs in the contrast batch, m of them this rank's own rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.losses import noise_filter
from flipkd_dist.signals import TeacherSignals


@dataclass(frozen=True)
class ContrastRows:
    labels: Tensor  # [m] int64
    teacher_similarity: Tensor  # [m, n], 0 where the teacher knows nothing
    keep: Tensor  # bool [m, n], phi without unknown entries and the known matches off the diagonal
    anchor: Tensor  # bool [m]
    negative: Tensor  # bool [m, n], kept and not the row's own pair
    positive_column: Tensor  # [m] int64
    off_diagonal: Tensor  # bool [m, n], not the row's own pair, known to the teacher, not known to match

    def to(self, device: torch.device) -> "ContrastRows":
        return ContrastRows(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def counts(self) -> Tensor:
        """Pairs, kept entries and anchors: float64 [3]."""
        return torch.tensor([len(self.labels), self.keep.sum(), self.anchor.sum()], dtype=torch.float64)


def contrast_rows(
    signals: TeacherSignals, batch: np.ndarray, own: slice, threshold: float | None, swap: bool = False
) -> ContrastRows:
    """Rows `own` of the matrix over `batch`. Entries that the teacher does not know are in no loss.

    Args:
        signals: the teacher's word on the training pairs.
        batch: [n] pair numbers of the contrast batch.
        swap: rows are second texts and columns first texts (the other direction of the loss).
    Source: FlipKD, Eq 3; the masking of known matches is ours (docs/method.md).
    """
    pairs, mine = signals.pairs, batch[own]
    matching = pairs.known_match(batch, mine).T.copy() if swap else pairs.known_match(mine, batch)
    similarity, known = map(torch.from_numpy, signals.of_batch(batch, own, swap))
    labels = torch.from_numpy(pairs.label[mine])
    column = torch.arange(own.start, own.start + len(mine))
    diagonal = torch.zeros(len(mine), len(batch), dtype=torch.bool).scatter(1, column.unsqueeze(1), True)
    match = diagonal & (labels == 1).unsqueeze(1)
    usable = known & (diagonal | ~torch.from_numpy(matching))
    keep = noise_filter(similarity, match, threshold) & usable
    return ContrastRows(
        labels=labels,
        teacher_similarity=similarity,
        keep=keep,
        anchor=(match & keep).any(dim=1),
        negative=keep & ~diagonal,
        positive_column=column,
        off_diagonal=usable & ~diagonal,
    )
