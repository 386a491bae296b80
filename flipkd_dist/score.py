"""Fills the teacher's store, and says whether this teacher's similarities fit the labels and the noise filter."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass
from math import ceil

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from flipkd_dist.losses import noise_filter
from flipkd_dist.store import Store
from flipkd_dist.teacher_source import Encoder
from flipkd_dist.text_stream import shards, windows

logger = logging.getLogger("flipkd_dist")

# Shards of texts in, the number of texts of each shard out as it completes; it encodes and writes them, and takes the
# next shard only when a worker is about to need it.
MapShards = Callable[[Iterator[list[str]]], Generator[int]]

FEW = 0.05  # a share kept below this is worth a warning
GRID = np.arange(1, 20) / 20  # thetas that may be suggested


@dataclass(frozen=True)
class ScoreSummary:
    num_texts: int  # unique
    num_new: int  # texts that were encoded now
    seconds: float


def score_shard(teacher: Encoder, store: Store, batch_size: int, texts: list[str]) -> int:
    """Encode and store one shard; returns its number of texts. This is all that a worker does."""
    store.write_shard(texts, teacher.encode(texts, batch_size))
    return len(texts)


def score_shards_here(teacher: Encoder, store: Store, batch_size: int = 64) -> MapShards:
    """The mapper that needs no workers: one shard after the other in this process."""
    return lambda shards: (score_shard(teacher, store, batch_size, shard) for shard in shards)


def survey(texts: Iterable[str], store: Store) -> tuple[int, bool]:
    """(how many unique texts, whether the store is complete for them); reads the whole stream."""
    num_texts, is_complete = 0, True
    for window in windows(texts):
        num_texts += len(window)
        is_complete = is_complete and store.is_complete(window)
    return num_texts, is_complete


def score(
    texts: Iterable[str], store: Store, map_shards: MapShards, total: int | None = None, name: str = "teacher"
) -> ScoreSummary:
    """Bring the store to the state where it holds every text; what is there already is not encoded again.

    Args:
        texts: of any number; a window of them is in memory at a time.
        map_shards: encodes and writes shards, in any order.
        total: how many unique texts there are, where that is known: the progress bar then says how long it takes.
        name: of the store, for progress and messages.
    """
    start = time.monotonic()
    with tqdm(total=total, desc=name, unit=" texts") as bar:
        missing = _Missing(texts, store, bar.update)
        num_new = 0
        with closing(map_shards(iter(missing))) as finished:  # whatever happens here, the workers end
            for num_done in finished:
                num_new += num_done
                bar.update(num_done)
    assert num_new == missing.num_missing, f"{num_new} of {missing.num_missing} texts were scored"
    if not missing.published:
        store.publish()
    seconds = time.monotonic() - start
    if missing.published:
        logger.info("%s store: all %d texts are there, nothing to do", name, missing.num_texts)
    else:
        logger.info("%s store: %d of %d texts are new, %.1f s", name, num_new, missing.num_texts, seconds)
    return ScoreSummary(missing.num_texts, num_new, seconds)


class _Missing:
    """The shards of a stream without the texts that the store holds, and what was seen on the way."""

    def __init__(self, texts: Iterable[str], store: Store, skip: Callable[[int], object]):
        self.texts, self.store, self.skip = texts, store, skip
        self.num_texts = self.num_missing = 0
        self.published = True  # so far: every text is there, and readers see it

    def __iter__(self) -> Iterator[list[str]]:
        for window in windows(self.texts):
            self.num_texts += len(window)
            if self.store.is_complete(window):
                self.skip(len(window))
                continue
            self.published = False
            held = dict(zip(window, self.store.holds(window).tolist(), strict=True))
            self.skip(sum(held.values()))
            for shard in shards(window):
                if missing := [text for text in shard if not held[text]]:
                    self.num_missing += len(missing)
                    yield missing


@dataclass(frozen=True)
class FilterShares:
    """What the noise filter keeps of each kind of pair, 0 to 1; None where there is no such pair."""

    positives: float | None
    negatives: float | None  # labelled ones
    off_diagonal: float | None

    @property
    def smallest(self) -> float:
        return min((share for share in astuple(self) if share is not None), default=1.0)


def filter_shares(
    similarity: np.ndarray, label: np.ndarray, off_diagonal: np.ndarray, threshold: float | None
) -> FilterShares:
    """The shares that the noise filter keeps. FlipKD, Eq 3.

    Args:
        similarity, label: [N] teacher cosines and labels (0/1) of the labelled pairs.
        off_diagonal: [K] teacher cosines of first and second texts of different pairs.
        threshold: theta; None keeps everything.
    """

    def kept(values: np.ndarray, match: bool) -> float | None:
        if not len(values):
            return None
        values = torch.from_numpy(np.asarray(values))
        return noise_filter(values, torch.full(values.shape, match), threshold).double().mean().item()

    similarity, label = np.asarray(similarity), np.asarray(label)
    return FilterShares(
        kept(similarity[label == 1], True), kept(similarity[label == 0], False), kept(off_diagonal, False)
    )


def suggested_threshold(similarity: np.ndarray, label: np.ndarray, off_diagonal: np.ndarray) -> float | None:
    """The strictest theta of the grid that still keeps half of every kind of pair, else the one that keeps most.

    A lower theta always keeps more of every kind, so "keeps most" alone would filter nothing. None: even the lowest
    leaves hardly anything of one kind, only switching the filter off helps.
    """
    smallest = np.array([filter_shares(similarity, label, off_diagonal, float(theta)).smallest for theta in GRID])
    halves = np.flatnonzero(smallest >= 0.5)
    best = halves[-1] if len(halves) else np.argmax(smallest)
    return float(GRID[best]) if smallest[best] >= FEW else None


def _histogram(similarity: np.ndarray, label: np.ndarray) -> list[str]:
    """Ten bins of 0.1, the share of each label's pairs as a bar; what lies outside [0, 1] joins the outer bins."""
    bins = np.clip(np.floor(np.asarray(similarity, np.float64) * 10 + 1e-6).astype(int), 0, 9)
    lines = [f"{'similarity':<12}{'matches':>9} {'':20} {'non-matches':>12}"]
    for index in range(10):
        line = f"{'below 0.1' if index == 0 else f'{index / 10:.1f} to {(index + 1) / 10:.1f}':<12}"
        for value, width in ((1, 9), (0, 12)):
            count = int(np.sum((bins == index) & (label == value)))
            bar = "#" * ceil(20 * count / max(1, int(np.sum(label == value))))
            line += f"{count:>{width}} {bar:<20} "
        lines.append(line.rstrip())
    return lines


def report(similarity: np.ndarray, label: np.ndarray, off_diagonal: np.ndarray, threshold: float | None) -> list[str]:
    """Lines to print after scoring: the similarities by label, the teacher's own quality, what the filter keeps.

    A line that starts with "warning:" says that the filter keeps under 5 % of a kind of pair, and what to set instead.
    Arguments as for `filter_shares`.
    """
    similarity, label = np.asarray(similarity), np.asarray(label)
    lines = [f"teacher similarity of {len(label)} labelled pairs:", *_histogram(similarity, label)]
    if len(np.unique(label)) == 2:
        lines.append(f"teacher ROC-AUC {roc_auc_score(label, similarity):.3f}")
    else:
        lines.append("teacher ROC-AUC: not defined, the pairs are of one class")
    if len(label):
        lines.append(f"teacher and label agree at 0.5: {np.mean((similarity >= 0.5) == (label == 1)):.1%}")
    if threshold is None:
        return [*lines, "the noise filter is off: every pair is kept"]
    shares = filter_shares(similarity, label, off_diagonal, threshold)
    kinds = dict(zip(("positives", "labelled negatives", "off-diagonal pairs"), astuple(shares), strict=True))
    texts = [f"{share:.1%} of {kind}" if share is not None else f"(no {kind})" for kind, share in kinds.items()]
    lines.append(f"the noise filter at theta {threshold:g} keeps {', '.join(texts)}")
    few = [kind for kind, share in kinds.items() if share is not None and share < FEW]
    if few:
        theta = suggested_threshold(similarity, label, off_diagonal)
        then = "null, which switches it off" if theta is None else f"{theta:.2f}"
        lines.append(
            f"warning: the noise filter keeps under {FEW:.0%} of {' and '.join(few)}: set loss.threshold to {then}"
        )
    return lines
