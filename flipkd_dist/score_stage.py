"""The stage that fills the teacher's store on the pool, and tells whether teacher, labels and noise filter fit."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from flipkd_dist.config import RunConfig
from flipkd_dist.contradictions import ContradictoryPair, ContradictoryPairs
from flipkd_dist.errors import UserError
from flipkd_dist.noise_html import write_html
from flipkd_dist.noise_report import noise_report
from flipkd_dist.ray_pool import map_on_actors
from flipkd_dist.score import score
from flipkd_dist.store import Store, StoreReader
from flipkd_dist.teacher_source import TeacherSource

logger = logging.getLogger("flipkd_dist")
NUM_OFF_DIAGONAL = 100_000  # sampled pairs of first and second texts, to see what the filter keeps
CHUNK = 8192  # pairs that are looked up at a time

Pair = tuple[str, str, int, str]  # first text, second text, label, id
SimilarityOf = Callable[[list[str], list[str]], np.ndarray]  # k first and k second texts: float32 [k]


@dataclass(frozen=True)
class Job:
    """A store to fill: that of single texts, or one of pair scores, whose texts are `store.pair_text`."""

    source: TeacherSource
    store: Store
    texts: Callable[[], Iterable[str]]  # a new pass at each call
    total: int | None  # unique texts, where known
    name: str = "teacher"


def fill_stores(config: RunConfig, jobs: list[Job]) -> None:
    """Score what the stores lack, on the pool, one store after the other.

    Raises:
        UserError: a node does not see the stores, no actor starts, or as raised in an actor.
    """
    for job in jobs:
        mapper = partial(map_on_actors, job.source, job.store, config.distributed.timeout_s)
        score(job.texts(), job.store, mapper, job.total, job.name)


def cosines(reader: StoreReader) -> SimilarityOf:
    """The similarity of texts whose unit vectors the store holds."""

    def similarity_of(texts_a: list[str], texts_b: list[str]) -> np.ndarray:
        return np.einsum("nd,nd->n", reader.vectors(texts_a), reader.vectors(texts_b))

    return similarity_of


@dataclass(frozen=True, eq=False)
class Similarities:
    """What the teacher says of the labelled pairs, and of first and second texts of different pairs."""

    similarity: np.ndarray  # [N] float32
    label: np.ndarray  # [N] int8
    off_diagonal: np.ndarray  # [at most NUM_OFF_DIAGONAL] float32
    worst: list[ContradictoryPair]  # by |label - similarity|


def similarities(pairs: Iterable[Pair], num_pairs: int, similarity_of: SimilarityOf, seed: int) -> Similarities:
    """One pass over the labelled pairs, with a sample of pairs of their texts.

    Args:
        num_pairs: how many the pass gives.
    """
    rows, columns = np.random.default_rng(seed).integers(num_pairs, size=(2, NUM_OFF_DIAGONAL))
    rows, columns = rows[rows != columns], columns[rows != columns]
    sampled_a, sampled_b = (dict.fromkeys(sample.tolist(), "") for sample in (rows, columns))
    similarity, label = np.empty(num_pairs, np.float32), np.empty(num_pairs, np.int8)
    first, pairs, worst = 0, iter(pairs), ContradictoryPairs()
    while chunk := list(islice(pairs, min(CHUNK, num_pairs - first))):
        texts_a, texts_b, labels, ids = (list(column) for column in zip(*chunk, strict=True))
        part = slice(first, first + len(chunk))
        similarity[part], label[part] = similarity_of(texts_a, texts_b), labels
        worst.add(similarity[part], label[part], texts_a, texts_b, ids)
        for number, (text_a, text_b) in enumerate(zip(texts_a, texts_b, strict=True), first):
            if number in sampled_a:
                sampled_a[number] = text_a
            if number in sampled_b:
                sampled_b[number] = text_b
        first += len(chunk)
    if first < num_pairs:
        raise UserError(f"data.train: {first} pairs where there were {num_pairs}: leave the files alone and run again")
    off_diagonal = [np.empty(0, np.float32)]
    for at in range(0, len(rows), CHUNK):
        texts_a = [sampled_a[row] for row in rows[at : at + CHUNK].tolist()]
        texts_b = [sampled_b[column] for column in columns[at : at + CHUNK].tolist()]
        off_diagonal.append(similarity_of(texts_a, texts_b))
    return Similarities(similarity, label, np.concatenate(off_diagonal), worst.worst())


def facts_of(config: RunConfig, store: Store, num_texts: int) -> dict[str, str]:
    """What a report says of the teacher."""
    named, spec = config.teacher.model_name_or_path, store.spec
    return {
        "teacher": " and ".join(named) if isinstance(named, list) else str(named),
        "fingerprint": spec.teacher_fingerprint[:12],
        "pooling": spec.pooling,
        "texts": f"{num_texts:,}",
    }


def tell(config: RunConfig, found: Similarities, facts: dict[str, str], page: Path) -> None:
    """Print what the noise filter makes of the similarities, and write it as a page.

    Args:
        facts: of the teacher, to stand in the report.
    Raises:
        UserError: the filter leaves L_MCL nothing to learn from.
    """
    threshold = config.loss.threshold
    made = noise_report(found.similarity, found.label, found.off_diagonal, threshold, found.worst, facts)
    for line in made.lines():
        logger.info(line)
    write_html(made, page)
    logger.info("the same with plots and the most contradictory pairs: %s", page)
    if config.loss.mcl_weight > 0 and not made.configured_shares().off_diagonal:
        raise UserError(
            f"loss.threshold: {threshold} keeps no off-diagonal negative of this teacher, so that "
            "L_MCL would learn nothing: lower it or set loss.mcl_weight to 0"
        )
