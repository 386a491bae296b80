"""What the noise filter keeps of each kind of pair, and the theta that it suggests.

Shapes: N labelled pairs, K off-diagonal ones; kinds of pair are positives, labelled negatives, off-diagonal pairs.
"""

from dataclasses import astuple, dataclass

import numpy as np
import torch

from flipkd_dist.losses import noise_filter

KINDS = ("positives", "labelled negatives", "off-diagonal pairs")
COUNTS_AS_MATCH = (True, False, False)  # of each kind
FEW = 0.05  # a share kept below this is worth a warning
HALF = 0.5  # what a suggested theta keeps of every kind, if any does
GRID = np.arange(1, 20) / 20  # thetas that may be suggested
RULE = "the strictest theta that keeps half of every kind of pair, else the one that keeps most"


@dataclass(frozen=True)
class FilterShares:
    """What the noise filter keeps of each kind of pair, 0 to 1; None where there is no such pair."""

    positives: float | None
    negatives: float | None  # labelled ones
    off_diagonal: float | None

    @property
    def smallest(self) -> float:
        return min((share for share in astuple(self) if share is not None), default=1.0)


def kinds_of(similarity: np.ndarray, label: np.ndarray, off_diagonal: np.ndarray) -> list[torch.Tensor]:
    """The similarities of each kind of pair."""
    similarity, label = np.asarray(similarity), np.asarray(label)
    return [torch.from_numpy(x) for x in (similarity[label == 1], similarity[label == 0], np.array(off_diagonal))]


def kept(values: torch.Tensor, match: bool, threshold: float | None) -> torch.Tensor:
    """Which similarities of one kind the filter keeps: bool, shaped as `values`."""
    return noise_filter(values, torch.full(values.shape, match), threshold)


def shares_of(kinds: list[torch.Tensor], threshold: float | None) -> FilterShares:
    """The shares kept of each kind, given their similarities."""

    def share(values: torch.Tensor, match: bool) -> float | None:
        return kept(values, match, threshold).sum().item() / len(values) if len(values) else None

    return FilterShares(*map(share, kinds, COUNTS_AS_MATCH))


def filter_shares(
    similarity: np.ndarray, label: np.ndarray, off_diagonal: np.ndarray, threshold: float | None
) -> FilterShares:
    """The shares that the noise filter keeps. FlipKD, Eq 3.

    Args:
        similarity, label: [N] teacher similarities and labels (0/1) of the labelled pairs.
        off_diagonal: [K] teacher similarities of first and second texts of different pairs.
        threshold: theta; None keeps everything.
    """
    return shares_of(kinds_of(similarity, label, off_diagonal), threshold)


def suggested_threshold(similarity: np.ndarray, label: np.ndarray, off_diagonal: np.ndarray) -> float | None:
    """The strictest theta of the grid that still keeps half of every kind of pair, else the one that keeps most.

    A lower theta always keeps more of every kind, so "keeps most" alone would filter nothing. None: even the lowest
    leaves hardly anything of one kind, only switching the filter off helps.
    """
    return suggestion([shares_of(kinds_of(similarity, label, off_diagonal), float(theta)) for theta in GRID])


def suggestion(shares: list[FilterShares]) -> float | None:
    """As `suggested_threshold`, given the shares at every theta of the grid."""
    smallest = np.array([share.smallest for share in shares])
    halves = np.flatnonzero(smallest >= HALF)
    best = halves[-1] if len(halves) else np.argmax(smallest)
    return float(GRID[best]) if smallest[best] >= FEW else None
