"""Comparisons made of chosen scores, for the tests of what is computed from them."""

import dataclasses

import numpy as np
from tiny import pair_table

from flipkd_dist.comparison import REFERENCE, Comparison, Row, RowScores, RunScores
from flipkd_dist.pairs import PairTable


def labelled(labels: np.ndarray, hard: float = 0.0, seed: int = 0) -> PairTable:
    """A table with these labels; a share of the non-matches is hard."""
    chosen = np.random.default_rng(seed).random(len(labels)) < hard
    kind = ["hard" if one and not label else "" for one, label in zip(chosen, labels, strict=True)]
    return dataclasses.replace(pair_table(len(labels), seed), label=np.asarray(labels, np.int64), kind=kind)


def pair_splits(sizes: dict[str, int], hard: float = 0.0, seed: int = 0) -> dict[str, PairTable]:
    generator = np.random.default_rng(seed)
    return {split: labelled(generator.integers(2, size=size), hard, seed) for split, size in sizes.items()}


def noisy_runs(
    pairs: dict[str, PairTable], strength: float, seeds: int, checkpoints: int, seed: int, shared: float = 0.0
) -> list[RunScores]:
    """Runs that tell the labels apart the better the greater `strength`; noise of size `shared` is that of all rows."""
    common = np.random.default_rng(99)
    shift = {split: common.normal(size=len(table)) * shared for split, table in pairs.items()}
    generator, runs = np.random.default_rng(seed), []
    for number in range(seeds):
        scores: dict[str, dict[str, np.ndarray]] = {"p_match": {}, "similarity": {}}
        for reading in scores:
            for split, table in pairs.items():
                noise = generator.normal(size=(checkpoints, len(table))) + shift[split]
                scores[reading][split] = 1 / (1 + np.exp(noise - strength * (2 * table.label - 1)))
        runs.append(RunScores(42 + number, list(range(checkpoints, 0, -1)), scores))
    return runs


def comparison_of(pairs: dict[str, PairTable], rows: dict[str, list[RunScores]]) -> Comparison:
    return Comparison("x", pairs, [RowScores(Row(name, name.upper(), {}), runs) for name, runs in rows.items()])


def two_rows(pairs: dict[str, PairTable], reference: list[RunScores], other: list[RunScores]) -> Comparison:
    return comparison_of(pairs, {REFERENCE: reference, "flip": other})
