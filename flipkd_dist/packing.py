"""Batches as the student reads them: what pairs share stands once, every pair's own tokens behind it in the same row.

Shapes: m pairs; R rows of L tokens. Shared, there is one row of all N tokens, `[prefix] [first text] [rest] [rest]
[pair] ...`: the prompt's prefix once, a first text that several pairs have once, then what each pair has for itself. A
pair's path is what it would be alone: prefix, first text, rest. Only attention needs it (`shared_attention`). Padded,
there is one pair a row. A base that fills a blank (the original GLM) takes the padded layout, with two positions a
token and a mask: docs/glm.md. Source: docs/method.md, "Nothing computed twice". Texts encoded alone: text_packing.py.
"""

from collections import defaultdict
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.prompt import MASK_FROM_END, EncodedPair


@dataclass(frozen=True)
class PackedBatch:
    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64; with a blank [R, 2, L]
    attention_mask: Tensor | None  # [R, L] int64, with a blank bool [R, 1, L, L]; shared: None
    paths: tuple[Tensor, ...]  # shared: int64 [pairs, longest], positions in the row, by similar length; else empty
    path_masks: tuple[Tensor, ...]  # read in both directions: bool [pairs, 1, 1, longest] each, what is no padding
    places: Tensor | None  # [N] int64: where a token's attention stands among all of `paths`, flattened
    segments: Tensor  # [R, L] int64: 2k = text 1 of pair k, 2k + 1 = its text 2, S = 2m = neither; alone: k = text k
    first_texts: Tensor  # [m] int64: the segment of each pair's text 1, which several pairs may have
    second_texts: Tensor  # [m] int64: the segment of its text 2
    last_tokens: Tensor  # [S] int64, into the flattened [R * L]: each text's last token; alone: that of its prompt
    answer_positions: Tensor  # [m] int64, into the flattened [R * L]; alone: `last_tokens`, where nothing is answered
    num_tokens: int  # that are not padding
    num_truncated: int  # pairs that were cut to the maximum length
    num_unpacked: int  # tokens, padding included, of the same pairs one a row: what packing is compared with

    def tensors(self, device: torch.device) -> dict[str, Tensor | tuple[Tensor, ...] | None]:
        """What the student's forward takes."""

        def move(value):
            return tuple(map(move, value)) if isinstance(value, tuple) else value.to(device, non_blocking=True)

        found = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.startswith("num_")}
        return {name: None if value is None else move(value) for name, value in found.items()}


def pack(prefix: list[int], pairs: list[EncodedPair], share: bool = True, blank: bool = False) -> PackedBatch:
    """Lay the pairs out in one row that shares what they have in common, or (`share=False`) one pair a row.

    Args:
        blank: the pairs end in one, and cannot share: their context is read in both directions.
    """
    assert not (share and blank), "a bidirectional context cannot be shared"
    return _shared(prefix, pairs) if share else _padded(prefix, pairs, blank)


def _counts(prefix: list[int], pairs: list[EncodedPair]) -> dict[str, int]:
    longest = max(len(pair.ids) for pair in pairs)
    return {
        "num_truncated": sum(pair.truncated for pair in pairs),
        "num_unpacked": len(pairs) * (len(prefix) + longest),
    }


def _shared(prefix: list[int], pairs: list[EncodedPair]) -> PackedBatch:
    by_head = defaultdict(list)  # first text and separator -> the pairs that begin so
    for number, pair in enumerate(pairs):
        by_head[tuple(pair.ids[: pair.text_b.start])].append(number)
    ids, positions, neither = [np.array(prefix, np.int64)], [np.arange(len(prefix))], 2 * len(pairs)
    segments, total = [np.full(len(prefix), neither)], len(prefix)
    paths: list[np.ndarray] = [None] * len(pairs)
    first_texts, answers = np.zeros(len(pairs), np.int64), np.zeros(len(pairs), np.int64)
    last_tokens = np.zeros(2 * len(pairs), np.int64)  # of a segment that stands nowhere: 0, which nobody reads

    def append(tokens: list[int], position: int, text: slice, number: int) -> np.ndarray:
        """Put tokens at the end of the row, the first at `position` of its path; where they stand."""
        nonlocal total
        segment = np.full(len(tokens), neither)
        segment[text] = number
        ids.append(np.array(tokens, np.int64))
        positions.append(position + np.arange(len(tokens)))
        segments.append(segment)
        total += len(tokens)
        return np.arange(total - len(tokens), total)

    root = np.arange(len(prefix))
    for head, members in by_head.items():
        stem = np.concatenate([root, append(list(head), len(root), pairs[members[0]].text_a, 2 * members[0])])
        for number in members:
            pair, start = pairs[number], len(head)
            text_b = slice(pair.text_b.start - start, pair.text_b.stop - start)
            paths[number] = np.concatenate([stem, append(pair.ids[start:], len(stem), text_b, 2 * number + 1)])
            first_texts[number], answers[number] = 2 * members[0], total - 1
            last_tokens[2 * number + 1] = total - len(pair.ids) + pair.text_b.stop - 1
        last_tokens[2 * members[0]] = stem[len(root) + pairs[members[0]].text_a.stop - 1]
    grouped, places, _ = by_length(paths, total)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids)[None]),
        position_ids=torch.from_numpy(np.concatenate(positions)[None]),
        attention_mask=None,
        paths=grouped,
        path_masks=(),
        places=places,
        segments=torch.from_numpy(np.concatenate(segments)[None]),
        first_texts=torch.from_numpy(first_texts),
        second_texts=torch.arange(1, 2 * len(pairs), 2),
        last_tokens=torch.from_numpy(last_tokens),
        answer_positions=torch.from_numpy(answers),
        num_tokens=total,
        **_counts(prefix, pairs),
    )


def by_length(paths: list[np.ndarray], num_tokens: int) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
    """Paths in rectangles, none more than twice as long as another in it; where each token is found in them; masks.

    Behind a path's end stands token 0, which no token of the path can see, unless it reads in both directions: the
    masks, bool [p, 1, 1, L], say where a path has tokens.
    """
    alike = defaultdict(list)
    for path in paths:
        alike[(len(path) - 1).bit_length()].append(path)
    places, grouped, masks, first = np.zeros(num_tokens, np.int64), [], [], 0
    for members in alike.values():
        rectangle = np.zeros((len(members), max(map(len, members))), np.int64)
        for row, path in enumerate(members):
            rectangle[row, : len(path)] = path
            places[path] = first + row * rectangle.shape[1] + np.arange(len(path))
        grouped.append(torch.from_numpy(rectangle))
        is_token = np.arange(rectangle.shape[1]) < np.array([[len(path)] for path in members])
        masks.append(torch.from_numpy(is_token[:, None, None]))
        first += rectangle.size
    return tuple(grouped), torch.from_numpy(places), tuple(masks)


def _padded(prefix: list[int], pairs: list[EncodedPair], blank: bool) -> PackedBatch:
    lengths = np.array([len(prefix) + len(pair.ids) for pair in pairs])
    rows, length = len(pairs), int(lengths.max())
    ids = np.zeros((rows, length), dtype=np.int64)  # no token sees padding
    segments = np.full((rows, length), 2 * rows, dtype=np.int64)
    last_tokens = np.zeros(2 * rows, np.int64)
    for row, pair in enumerate(pairs):
        ids[row, : lengths[row]] = prefix + pair.ids
        for segment, text in ((2 * row, pair.text_a), (2 * row + 1, pair.text_b)):
            segments[row, len(prefix) + text.start : len(prefix) + text.stop] = segment
            last_tokens[segment] = row * length + len(prefix) + text.stop - 1
    is_token = np.arange(length) < lengths[:, None]
    positions, mask = np.where(is_token, np.arange(length), 0), torch.from_numpy(is_token.astype(np.int64))
    if blank:
        positions, mask = _blank_positions(positions, lengths), _blank_mask(mask.bool())
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=mask,
        paths=(),
        path_masks=(),
        places=None,
        segments=torch.from_numpy(segments),
        first_texts=torch.arange(0, 2 * rows, 2),
        second_texts=torch.arange(1, 2 * rows, 2),
        last_tokens=torch.from_numpy(last_tokens),
        answer_positions=torch.from_numpy(np.arange(rows) * length + lengths - 1),
        num_tokens=int(lengths.sum()),
        **_counts(prefix, pairs),
    )


def _blank_positions(positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions in the context and in the blank, [R, 2, L]: the start token has that of its [MASK], and 1."""
    rows, start = np.arange(len(positions)), lengths - 1
    in_blank = np.zeros_like(positions)
    positions[rows, start], in_blank[rows, start] = start + 1 - MASK_FROM_END, 1
    return np.stack([positions, in_blank], axis=1)


def _blank_mask(is_token: Tensor) -> Tensor:
    """Who sees whom, bool [R, 1, L, L]: everyone the context, the start token itself too; padding sees padding."""
    is_start = torch.zeros_like(is_token)
    is_start[torch.arange(len(is_token)), is_token.sum(1) - 1] = True
    alike = is_token.unsqueeze(2) == is_token.unsqueeze(1)
    return (alike & (is_start.unsqueeze(2) | ~is_start.unsqueeze(1))).unsqueeze(1)
