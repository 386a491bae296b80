"""Which pairs, or texts alone, stand in one forward of prediction: pairs of one first text side by side, cut by tokens.

The pairs of a batch share the prompt's prefix, and those with the same first text share that text too (batches.py), so
the tokens of a forward depend on who stands beside whom. Windows bound what is held of a stream; a plan orders one
window, and never sees another.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flipkd_dist.prompt import EncodedPair, EncodedText

T = TypeVar("T")
WINDOW_PAIRS = 4096
WINDOW_CHARACTERS = 2**21  # of the records of a window: so many long documents would otherwise fill the memory
# Inside attention every pair has its whole path (prefix, first text, own tokens), in the linear layers shared tokens
# stand once. Queries, keys, values and their product take about a quarter of the room of a token in the linear layers.
PATHS_PER_TOKEN = 4


@dataclass(frozen=True)
class BatchLimits:
    """The most that one forward takes; a pair that is longer goes alone."""

    tokens: int = 8192  # that the linear layers compute
    pairs: int = 512


def windows(items: Iterable[T], characters_of: Callable[[T], int], pairs_of: Callable[[T], int]) -> Iterator[list[T]]:
    """The items of a stream in bounded lists, at least one in each.

    Args:
        characters_of: how many characters an item holds, those that are not scored too.
        pairs_of: how many pairs an item stands for.
    """
    window: list[T] = []
    num_pairs = characters = 0
    for item in items:
        more_pairs, more_characters = pairs_of(item), characters_of(item)
        if window and (num_pairs + more_pairs > WINDOW_PAIRS or characters + more_characters > WINDOW_CHARACTERS):
            yield window
            window, num_pairs, characters = [], 0, 0
        window.append(item)
        num_pairs, characters = num_pairs + more_pairs, characters + more_characters
    if window:
        yield window


@dataclass
class _Load:
    """What the pairs of a batch take, if they come first text by first text."""

    prefix: int  # tokens of the prompt's prefix
    shared: bool
    pairs: int = 0
    tokens: int = 0  # without the prefix
    longest: int = 0  # pair, without the prefix

    def with_pair(self, length: int, own: int) -> "_Load":
        """Args: length, tokens of the pair; own, those of them that no pair before it in the batch has."""
        longest = max(self.longest, length)
        return _Load(self.prefix, self.shared, self.pairs + 1, self.tokens + own, longest)

    def fits(self, limits: BatchLimits) -> bool:
        paths = self.pairs * (self.prefix + self.longest)  # cells of a padded batch, and of attention in any
        tokens = self.prefix + self.tokens if self.shared else paths
        within = tokens <= limits.tokens and paths <= PATHS_PER_TOKEN * limits.tokens
        return within and self.pairs <= limits.pairs


def token_batches(
    pairs: Sequence[EncodedPair], prefix_length: int, limits: BatchLimits, shared: bool = True
) -> list[list[int]]:
    """Every pair's number in exactly one batch; long pairs come first, those with one first text side by side.

    Args:
        prefix_length: tokens of the prompt's prefix.
        shared: whether a batch computes prefix and first texts once; else it is padded, a pair a row.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.ids[: pair.text_b.start]), []).append(number)  # first text and separator
    for members in groups.values():
        members.sort(key=lambda number: -len(pairs[number].ids))
    in_order = sorted(groups.values(), key=lambda members: -len(pairs[members[0]].ids))
    items = (
        (number, len(pairs[number].ids), pairs[number].text_b.start if position else 0)
        for members in in_order
        for position, number in enumerate(members)
    )
    return _filled(items, _Load(prefix_length, shared), limits)


def text_batches(
    texts: Sequence[EncodedText], prefix_length: int, limits: BatchLimits, shared: bool = True, own_prefix: bool = False
) -> list[list[int]]:
    """Every text's number in exactly one batch, long ones first.

    Args:
        prefix_length: tokens of the prompt's prefix.
        shared: whether a batch is one row; else it is padded, a text a row.
        own_prefix: whether each text of the row has a prefix of its own.
    """
    apart = prefix_length if shared and own_prefix else 0
    in_order = sorted(range(len(texts)), key=lambda number: -len(texts[number].ids))
    items = ((number, apart + len(texts[number].ids), 0) for number in in_order)
    return _filled(items, _Load(prefix_length - apart, shared), limits)


def _filled(items: Iterable[tuple[int, int, int]], empty: _Load, limits: BatchLimits) -> list[list[int]]:
    """Batches of the items in their order.

    Args:
        items: number, tokens, and how many of these the item before has computed, where it is in the same batch.
    """
    batches, batch, load = [], [], empty
    for number, length, common in items:
        more = load.with_pair(length, length - common if batch else length)
        if batch and not more.fits(limits):
            batches.append(batch)
            batch, more = [], empty.with_pair(length, length)
        batch.append(number)
        load = more
    return [*batches, batch] if batch else batches
