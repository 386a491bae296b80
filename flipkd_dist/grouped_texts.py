"""Texts that carry a group (an intent, a cluster of duplicates): cleared of repetitions, split without leakage."""

import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from flipkd_dist.errors import UserError


def normalise(text: str) -> str:
    """What two spellings of one text share: lower case, punctuation as a space ("top-up", "top up"), single spaces."""
    kept = "".join(" " if unicodedata.category(char).startswith("P") else char for char in text.lower())
    # A text of nothing but punctuation stands for itself.
    return " ".join(kept.split()) or text.strip()


class Distinct(NamedTuple):
    rows: list[int]  # the first row of each text that is kept
    repeated: int  # rows left out because their text stands earlier in the same group
    ambiguous: int  # rows left out because their text stands in two groups


def distinct_texts(texts: Sequence[str], groups: Sequence[str]) -> Distinct:
    """The rows of texts that differ after `normalise` and belong to one group."""
    first: dict[str, int] = {}
    in_two_groups = set()
    spellings = [normalise(text) for text in texts]
    for row, (spelling, group) in enumerate(zip(spellings, groups, strict=True)):
        if groups[first.setdefault(spelling, row)] != group:
            in_two_groups.add(spelling)
    rows = [row for spelling, row in first.items() if spelling not in in_two_groups]
    ambiguous = sum(spelling in in_two_groups for spelling in spellings)
    return Distinct(rows, repeated=len(spellings) - ambiguous - len(rows), ambiguous=ambiguous)


def split_texts(
    texts: Sequence[str], groups: Sequence[str], fractions: dict[str, float], by: Literal["text", "group"], seed: int
) -> dict[str, list[int]]:
    """Divide the distinct texts among splits, so that no text stands in two of them after `normalise`.

    Args:
        fractions: the share of each split; together 1.
        by: "text" divides every group among the splits, two texts at least to a split while a group has them, the
            largest split first; "group" gives whole groups to a split (shares are of groups), so that a test set
            holds groups never seen.
        seed: the only source of chance.
    Returns:
        The rows of each split, ascending.
    Raises:
        UserError: fractions that are not shares of a whole.
    """
    if not all(share > 0 for share in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"split {fractions}: the shares must be above 0 and sum to 1: correct them")
    rng = np.random.default_rng(seed)
    members: dict[str, list[int]] = {}
    for row in distinct_texts(texts, groups).rows:
        members.setdefault(groups[row], []).append(row)
    # Each pool is divided among the splits; the lists in it stay whole.
    pools = [[[row] for row in rows] for rows in members.values()] if by == "text" else [list(members.values())]
    splits: dict[str, list[int]] = {name: [] for name in fractions}
    for pool in pools:
        owners = np.repeat(list(splits), _shares(len(pool), list(fractions.values())))
        for rows, owner in zip(pool, rng.permutation(owners), strict=True):
            splits[owner] += rows
    return {name: sorted(rows) for name, rows in splits.items()}


def _shares(size: int, fractions: list[float]) -> list[int]:
    """`size` in whole shares near the fractions, each of two at least; too small a size serves the largest first."""
    largest_first = sorted(range(len(fractions)), key=lambda share: -fractions[share])
    served = largest_first[: max(1, size // 2)]
    shares = [0] * len(fractions)
    for share in served[: size // 2]:
        shares[share] = 2
    for _ in range(size - sum(shares)):
        shares[max(served, key=lambda share: size * fractions[share] - shares[share])] += 1
    return shares
