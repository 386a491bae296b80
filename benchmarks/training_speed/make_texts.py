"""Labelled pairs made of a fixed list of words: a pure function of the size's name, the number of pairs and the seed.

Pairs stand in the order of the batches. A size's `group` pairs in a row are a positive and its negatives: trainers of
groups get the first text of the positive as the query. In the sizes of two, every pair has a first text of its own, and
the two first texts of a group have the same number of words, so that both ways cost the same; in `documents` the group
shares its first text.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORDS = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()


@dataclass(frozen=True)
class Size:
    """Numbers of words are ranges, both ends included."""

    words_a: tuple[int, int]
    words_b: tuple[int, int]
    group: int
    shared: bool  # whether the group has one first text
    prompt: str  # a template of flipkd_dist.prompt
    max_length: int  # tokens


SIZES = {
    "short": Size((6, 20), (6, 20), 2, False, "finance", 256),
    "faq": Size((8, 20), (30, 80), 2, False, "faq", 256),
    "documents": Size((3, 6), (150, 250), 16, True, "medical", 512),
}


def _matching(text: list[str], length: int, generator: np.random.Generator) -> list[str]:
    """About `length` words of which most, where there is room, are those of `text`: an encoder finds them alike."""
    times = max(1, round(0.75 * length / len(text)))
    words = [*text * times, *generator.choice(WORDS, max(0, length - times * len(text)))][:length]
    return [words[place] for place in generator.permutation(len(words))]


def make_pairs(name: str, count: int, seed: int) -> list[dict]:
    """`count` records of text_a, text_b and label; the first pair of every group matches, the others do not."""
    size = SIZES[name]
    assert count % size.group == 0, f"{count} pairs are no whole number of groups of {size.group}"
    generator = np.random.default_rng([seed, list(SIZES).index(name)])
    pairs = []
    for _ in range(count // size.group):
        length_a = generator.integers(*size.words_a, endpoint=True)
        text_a: list[str] = []
        for place in range(size.group):
            if not (text_a and size.shared):
                text_a = generator.choice(WORDS, length_a).tolist()
            length_b = int(generator.integers(*size.words_b, endpoint=True))
            other = generator.choice(WORDS, length_b).tolist()
            text_b = _matching(text_a, length_b, generator) if place == 0 else other
            pairs.append({"text_a": " ".join(text_a), "text_b": " ".join(text_b), "label": int(place == 0)})
    return pairs


def groups_of(pairs: list[dict], size: int) -> list[dict]:
    """The same second texts, a positive and its negatives a record, as trainers of groups read them."""
    return [
        {"query": first["text_a"], "pos": [first["text_b"]], "neg": [pair["text_b"] for pair in others]}
        for first, *others in (pairs[at : at + size] for at in range(0, len(pairs), size))
    ]
