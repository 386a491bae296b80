"""Batches with a shared prefix: the prompt's prefix once per row, every pair's own tokens behind it.

Shapes: R rows of L tokens, P tokens of prefix, m pairs. A row holds `[prefix][pair][pair]...`; positions restart
behind the prefix for every pair, and a pair sees the prefix and itself. Exact for causal students (FlipKD docs:
docs/method.md). One pair a row is the padded layout, which needs no mask of its own. A base that fills a blank (the
original GLM) takes one pair a row, with two positions a token and a mask: docs/glm.md.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.prompt import MASK_FROM_END, EncodedPair

PREFIX, PADDING = -1, -2


@dataclass(frozen=True)
class ComputeCost:
    """Cost of a row of L tokens: `L * linear + L^2 * attention`, in any common unit."""

    linear: float
    attention: float

    def of(self, rows: int, length: int) -> float:
        return rows * length * (self.linear + self.attention * length)


@dataclass(frozen=True)
class PackedBatch:
    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64; with a blank [R, 2, L]
    attention_mask: Tensor  # [R, L] int64 where every row holds one pair, else or with a blank bool [R, 1, L, L]
    segments: Tensor  # [R, L] int64: 2k = text 1 of pair k, 2k + 1 = its text 2, 2m = neither
    answer_positions: Tensor  # [m] int64, into the flattened [R * L]
    num_tokens: int  # that are not padding
    num_truncated: int  # pairs that were cut to the maximum length
    num_unpacked: int  # tokens, padding included, of the same pairs one a row: what packing is compared with

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        names = ("input_ids", "position_ids", "attention_mask", "segments", "answer_positions")
        return {name: getattr(self, name).to(device, non_blocking=True) for name in names}


def _balance(lengths: list[int], num_rows: int) -> list[list[int]]:
    """Pairs to rows, the longest first onto the shortest row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]
    for pair in sorted(range(len(lengths)), key=lambda pair: -lengths[pair]):
        total, row = heapq.heappop(heap)
        rows[row].append(pair)
        heapq.heappush(heap, (total + lengths[pair], row))
    return [sorted(row) for row in rows if row]


def plan_rows(lengths: list[int], prefix_length: int, cost: ComputeCost, share_prefix: bool = True) -> list[list[int]]:
    """The cheapest balanced division of the pairs among rows; `share_prefix=False` gives one pair a row.

    Args:
        lengths: tokens of each pair without the prefix.
    """
    if not share_prefix:
        return [[pair] for pair in range(len(lengths))]

    def price(rows: list[list[int]]) -> float:
        longest = max(sum(lengths[pair] for pair in row) for row in rows)
        return cost.of(len(rows), prefix_length + longest)

    return min((_balance(lengths, count) for count in range(1, len(lengths) + 1)), key=price)


def pack(
    prefix: list[int], pairs: list[EncodedPair], rows: list[list[int]], padding_id: int = 0, blank: bool = False
) -> PackedBatch:
    """Lay the pairs out as `rows` (lists of pair numbers) say; with `blank` they end in one, a pair a row."""
    length = len(prefix) + max(sum(len(pairs[pair].ids) for pair in row) for row in rows)
    ids = np.full((len(rows), length), padding_id, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    owner = np.full((len(rows), length), PADDING, dtype=np.int64)
    segments = np.full((len(rows), length), 2 * len(pairs), dtype=np.int64)
    answers = np.zeros(len(pairs), dtype=np.int64)
    for number, row in enumerate(rows):
        at = len(prefix)
        ids[number, :at], positions[number, :at], owner[number, :at] = prefix, np.arange(at), PREFIX
        for pair in row:
            encoded, end = pairs[pair], at + len(pairs[pair].ids)
            ids[number, at:end] = encoded.ids
            positions[number, at:end] = len(prefix) + np.arange(end - at)
            owner[number, at:end] = pair
            segments[number, at + encoded.text_a.start : at + encoded.text_a.stop] = 2 * pair
            segments[number, at + encoded.text_b.start : at + encoded.text_b.stop] = 2 * pair + 1
            answers[pair] = number * length + end - 1
            at = end
    mask = torch.from_numpy(owner != PADDING).long()
    if blank:
        assert all(len(row) == 1 for row in rows), "a bidirectional context cannot be shared"
        positions, mask = _blank_positions(positions, mask), _blank_mask(mask.bool())
    elif any(len(row) > 1 for row in rows):
        mask = _prefix_mask(torch.from_numpy(owner))
    return PackedBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        mask,
        torch.from_numpy(segments),
        torch.from_numpy(answers),
        int((owner != PADDING).sum()),
        sum(pair.truncated for pair in pairs),
        len(pairs) * (len(prefix) + max(len(pair.ids) for pair in pairs)),
    )


def _prefix_mask(owner: Tensor) -> Tensor:
    """Who sees whom, bool [R, 1, L, L]: causally, the prefix and one's own pair; padding sees padding."""
    seen = (owner.unsqueeze(2) == owner.unsqueeze(1)) | (owner == PREFIX).unsqueeze(1)
    return (seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril()).unsqueeze(1)


def _blank_positions(positions: np.ndarray, is_token: Tensor) -> np.ndarray:
    """Positions in the context and in the blank, [R, 2, L]: the start token has that of its [MASK], and 1."""
    rows, start = np.arange(len(positions)), is_token.sum(1).numpy() - 1
    in_blank = np.zeros_like(positions)
    positions[rows, start], in_blank[rows, start] = start + 1 - MASK_FROM_END, 1
    return np.stack([positions, in_blank], axis=1)


def _blank_mask(is_token: Tensor) -> Tensor:
    """Who sees whom, bool [R, 1, L, L]: everyone the context, the start token itself too; padding sees padding."""
    is_start = torch.zeros_like(is_token)
    is_start[torch.arange(len(is_token)), is_token.sum(1) - 1] = True
    alike = is_token.unsqueeze(2) == is_token.unsqueeze(1)
    return (alike & (is_start.unsqueeze(2) | ~is_start.unsqueeze(1))).unsqueeze(1)
