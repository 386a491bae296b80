"""Batches of texts that are encoded alone: each stands once, however many pairs have it.

Shapes: U texts, m pairs; R rows of L tokens. Shared, there is one row of N tokens, `[prefix] [text and suffix] [text
and suffix] ...`. Read in both directions, a prefix depends on its text: then each text has a copy of its own. Padded,
there is one text a row. Source: docs/method.md, "Alone".
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.packing import PackedBatch, by_length
from flipkd_dist.prompt import EncodedText


def pack_texts(
    prefix: list[int],
    texts: Sequence[EncodedText],
    pairs: Sequence[tuple[int, int]] | None = None,
    share: bool = True,
    bidirectional: bool = False,
) -> PackedBatch:
    """Lay the texts out in one row, or (`share=False`) one text a row.

    Args:
        pairs: numbers of the first and the second text of each pair; None: every text is a first one, and none a
            second, for a student that is asked for read-outs alone.
        bidirectional: whether tokens see those behind them.
    """
    lengths = np.array([len(prefix) + len(text.ids) for text in texts])
    sides = [[*range(len(texts))], []] if pairs is None else zip(*pairs, strict=True)
    first, second = (torch.tensor(side, dtype=torch.int64) for side in sides)
    members = [(text,) for text in texts] if pairs is None else [(texts[a], texts[b]) for a, b in pairs]
    return PackedBatch(
        **(_in_one_row(prefix, texts, lengths, bidirectional) if share else _padded(prefix, texts, lengths)),
        first_texts=first,
        second_texts=second,
        num_truncated=sum(any(text.truncated for text in one) for one in members),
        num_unpacked=(len(first) + len(second)) * int(lengths.max()),
    )


def _in_one_row(prefix: list[int], texts: Sequence[EncodedText], lengths: np.ndarray, bidirectional: bool) -> dict:
    root = np.arange(0 if bidirectional else len(prefix))  # what all paths begin with
    ids, positions = [np.array(prefix[: len(root)], np.int64)], [root]
    segments, paths, total = [np.full(len(root), len(texts))], [], len(root)
    for number, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        own = np.arange(len(root), length)  # positions in the path
        segment = np.full(len(own), number)
        segment[own < len(prefix) + text.text.start] = len(texts)
        segment[own >= len(prefix) + text.text.stop] = len(texts)
        ids.append(np.array(prefix[len(root) :] + text.ids, np.int64))
        positions.append(own)
        segments.append(segment)
        paths.append(np.concatenate([root, total + np.arange(len(own))]))
        total += len(own)
    grouped, places, masks = by_length(paths, total)
    last_tokens = _row(np.array([path[-1] for path in paths]))[0]
    return {
        "input_ids": _row(np.concatenate(ids)),
        "position_ids": _row(np.concatenate(positions)),
        "attention_mask": None,
        "paths": grouped,
        "path_masks": masks if bidirectional else (),
        "places": places,
        "segments": _row(np.concatenate(segments)),
        "last_tokens": last_tokens,
        "answer_positions": last_tokens,
        "num_tokens": total,
    }


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values[None])


def _padded(prefix: list[int], texts: Sequence[EncodedText], lengths: np.ndarray) -> dict:
    rows, length = len(texts), int(lengths.max())
    ids, segments = np.zeros((rows, length), np.int64), np.full((rows, length), rows)  # no token sees padding
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = prefix + text.ids
        segments[row, len(prefix) + text.text.start : len(prefix) + text.text.stop] = row
    is_token = np.arange(length) < lengths[:, None]
    last_tokens = torch.from_numpy(np.arange(rows) * length + lengths - 1)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(np.where(is_token, np.arange(length), 0)),
        "attention_mask": torch.from_numpy(is_token.astype(np.int64)),  # the student's body knows its direction
        "paths": (),
        "path_masks": (),
        "places": None,
        "segments": torch.from_numpy(segments),
        "last_tokens": last_tokens,
        "answer_positions": last_tokens,
        "num_tokens": int(lengths.sum()),
    }
