"""Labelled pairs out of grouped texts: matches within a group, random and teacher-mined non-matches across groups.

Shapes: n distinct texts, d the width of an encoding.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flipkd_dist.grouped_texts import distinct_texts

log = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]  # n texts to [n, d] unit vectors
SIMILARITIES_PER_CHUNK = 2**23  # 32 MiB of fp32, whatever the number of texts


def make_pairs(
    texts: list[str],
    groups: list[str],
    seed: int,
    encode: Encode | None = None,
    positives_per_text: int = 2,
    random_negatives_per_text: int = 1,
    hard_negatives_per_text: int = 1,
    neighbours: int = 10,
) -> list[dict[str, Any]]:
    """Pairs of distinct texts, none twice in either order, in shuffled order.

    Args:
        texts: repeated spellings count once, and a text that stands in two groups is left out.
        groups: of each text; texts match when their groups are equal.
        seed: the only source of chance.
        encode: the teacher, for hard negatives; None makes none.
        positives_per_text: partners of the own group, as far as it has them; a text is in twice as many pairs.
        random_negatives_per_text: partners drawn uniformly from all other groups.
        hard_negatives_per_text: partners drawn from the `neighbours` nearest texts of other groups.
    Returns:
        Records `{id, text_a, text_b, label, kind, group_a, group_b}`; an id depends on the two texts alone, so that
        files of different splits can be read together.
    """
    rows, _, ambiguous = distinct_texts(texts, groups)
    if ambiguous:
        log.warning("%d texts left out: they stand in two groups", ambiguous)
    texts, groups = [texts[row].strip() for row in rows], [groups[row] for row in rows]
    number = {group: code for code, group in enumerate(dict.fromkeys(groups))}
    codes = np.array([number[group] for group in groups], dtype=np.int64)
    rng = np.random.default_rng(seed)
    partners: list[set[int]] = [set() for _ in texts]  # of each text, so that no pair is made twice
    sources = [
        ("positive", positives_per_text, _same_group(codes, positives_per_text, rng)),
        ("random", random_negatives_per_text, _random_others(codes, random_negatives_per_text, partners, rng)),
    ]
    # Hard negatives come last: the other pairs are the same with and without a teacher.
    if encode and hard_negatives_per_text:
        vectors = np.asarray(encode(texts))
        sources.append(("hard", hard_negatives_per_text, _nearest_others(codes, vectors, neighbours, rng)))
    pairs = []
    for kind, wanted, candidates in sources:
        for a, others in candidates:
            for b in [b for b in others if b not in partners[a]][:wanted]:
                partners[a].add(b)
                partners[b].add(a)
                pairs.append((kind, a, b))
    return [_record(texts, groups, *pairs[row]) for row in rng.permutation(len(pairs))]


def _same_group(codes: np.ndarray, wanted: int, rng: np.random.Generator) -> Iterator[tuple[int, list[int]]]:
    """Each text with the `wanted` texts that follow it on a random circle through its group."""
    for members in np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]):
        circle = rng.permutation(members).tolist()
        # Half-way round, every pair has been met once.
        reach = min(wanted, len(circle) // 2)
        for start, text in enumerate(circle):
            yield text, [circle[(start + step) % len(circle)] for step in range(1, reach + 1)]


def _random_others(
    codes: np.ndarray, wanted: int, partners: list[set[int]], rng: np.random.Generator
) -> Iterator[tuple[int, list[int]]]:
    """Each text with random texts of other groups: enough that `wanted` of them are new partners, if there are any."""
    by_group = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes
    for text, code in enumerate(codes):
        others = len(codes) - sizes[code]
        drawn = rng.choice(others, size=min(others, wanted + len(partners[text])), replace=False)
        # Skip the text's own group, which is one run of `by_group`.
        yield text, by_group[drawn + sizes[code] * (drawn >= starts[code])].tolist()


def _nearest_others(
    codes: np.ndarray, vectors: np.ndarray, neighbours: int, rng: np.random.Generator
) -> Iterator[tuple[int, list[int]]]:
    """Each text with its `neighbours` nearest texts of other groups, shuffled; `vectors` [n, d], unit length."""
    count = len(codes)
    assert vectors.shape[0] == count, "one vector for each text"
    nearest_count = min(neighbours, count)
    chunk = max(1, SIMILARITIES_PER_CHUNK // max(1, count))
    for start in range(0, count, chunk):
        same = codes[start : start + chunk, None] == codes
        distance = np.where(same, np.inf, -(vectors[start : start + chunk] @ vectors.T))
        nearest = np.argpartition(distance, nearest_count - 1, axis=1)[:, :nearest_count]
        for row, found in enumerate(nearest):
            # The partition's inner order depends on the processor: sort before the shuffle.
            found = np.sort(found[distance[row, found] < np.inf])
            yield start + row, rng.permutation(found).tolist()


def _record(texts: list[str], groups: list[str], kind: str, a: int, b: int) -> dict[str, Any]:
    return {
        "id": hashlib.blake2b(f"{texts[a]}\n{texts[b]}".encode(), digest_size=8).hexdigest(),
        "text_a": texts[a],
        "text_b": texts[b],
        "label": int(kind == "positive"),
        "kind": kind,
        "group_a": groups[a],
        "group_b": groups[b],
    }
