"""A rank's rows of the contrast matrix: what the labels and the teacher say, before the student has run.

Shapes: n pairs in the contrast batch, m of them this rank's own rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.losses import noise_filter
from flipkd_dist.pairs import PairTable


@dataclass(frozen=True)
class ContrastRows:
    labels: Tensor  # [m] int64
    teacher_similarity: Tensor  # [m, n]
    keep: Tensor  # bool [m, n], phi without the known matches off the diagonal
    anchor: Tensor  # bool [m]
    negative: Tensor  # bool [m, n], kept and not the row's own pair
    positive_column: Tensor  # [m] int64
    off_diagonal: Tensor  # bool [m, n], not the row's own pair and not known to match

    def to(self, device: torch.device) -> "ContrastRows":
        return ContrastRows(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def contrast_rows(
    pairs: PairTable, vectors: np.ndarray, batch: np.ndarray, own: slice, threshold: float | None, swap: bool = False
) -> ContrastRows:
    """Rows `own` of the matrix over `batch`.

    Args:
        vectors: unit vectors of the teacher, a row for each of `pairs.texts`.
        batch: [n] pair numbers of the contrast batch.
        swap: rows are second texts and columns first texts (the other direction of the loss).
    Source: FlipKD, Eq 3; the masking of known matches is ours (docs/method.md).
    """
    mine = batch[own]
    if swap:
        known = torch.from_numpy(pairs.known_match(batch, mine).T.copy())
        rows, columns = pairs.text_b[mine], pairs.text_a[batch]
    else:
        known = torch.from_numpy(pairs.known_match(mine, batch))
        rows, columns = pairs.text_a[mine], pairs.text_b[batch]
    similarity = torch.from_numpy(vectors[rows] @ vectors[columns].T)
    labels = torch.from_numpy(pairs.label[mine])
    column = torch.arange(own.start, own.start + len(mine))
    diagonal = torch.zeros(len(mine), len(batch), dtype=torch.bool).scatter(1, column.unsqueeze(1), True)
    match = diagonal & (labels == 1).unsqueeze(1)
    unknown = diagonal | ~known
    keep = noise_filter(similarity, match, threshold) & unknown
    return ContrastRows(
        labels=labels,
        teacher_similarity=similarity,
        keep=keep,
        anchor=(match & keep).any(dim=1),
        negative=keep & ~diagonal,
        positive_column=column,
        off_diagonal=unknown & ~diagonal,
    )
