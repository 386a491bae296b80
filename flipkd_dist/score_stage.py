"""The stage that fills the teacher's store on the pool, and tells whether teacher, labels and noise filter fit."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from flipkd_dist.config import RunConfig
from flipkd_dist.contradictions import ContradictoryPair, ContradictoryPairs
from flipkd_dist.cross_encoder import CrossEncoderSource
from flipkd_dist.errors import UserError
from flipkd_dist.noise_html import write_html
from flipkd_dist.noise_report import noise_report
from flipkd_dist.pair_stream import PairStream
from flipkd_dist.preflight import Inputs
from flipkd_dist.ray_pool import map_on_actors
from flipkd_dist.score import score
from flipkd_dist.signals import TextTeacher
from flipkd_dist.store import Store
from flipkd_dist.teacher_source import TeacherSource
from flipkd_dist.teacher_stage import calibrate, fill_pair_store, off_diagonal_sample, open_signals

logger = logging.getLogger("flipkd_dist")
NUM_OFF_DIAGONAL = 100_000  # sampled pairs of first and second texts, to see what the filter keeps
ATTEMPTS = 3  # at a store whose shards turn out to be damaged
CHUNK = 8192  # pairs that are looked up at a time

Pair = tuple[str, str, int, str]  # first text, second text, label, id
SimilarityOf = Callable[[list[str], list[str]], np.ndarray]  # k first and k second texts: float32 [k]


@dataclass(frozen=True)
class Job:
    """A store to fill: that of single texts, or one of pair scores, whose texts are `store.pair_text`."""

    source: TeacherSource | CrossEncoderSource
    store: Store
    texts: Callable[[], Iterable[str]]  # a new pass at each call
    total: int | None  # unique texts, where known
    name: str = "teacher"


def fill_store(config: RunConfig, job: Job) -> None:
    """Score on the pool what the store lacks.

    Raises:
        UserError: a node does not see the store, no actor starts, or as raised in an actor.
        RuntimeError: shards come back damaged from the disk again and again.
    """
    mapper = partial(map_on_actors, job.source, job.store, config.distributed.timeout_s)
    for _ in range(ATTEMPTS):
        if score(job.texts(), job.store, mapper, job.total, job.name).is_whole:
            return
    raise RuntimeError(f"{job.store.folder}: shards just written cannot be read: check the disk")


def score_tables(inputs: Inputs) -> None:
    """The stage for pairs in memory: stores filled, curves fitted, report told.

    Raises:
        UserError: besides, L_MCL would have nothing to learn from.
    """
    fill_stores(inputs)
    calibrate(inputs)
    train = inputs.splits["train"]
    worst, similarity = ContradictoryPairs(), open_signals(inputs, "train").of_pairs()
    texts_a, texts_b = ([train.texts[number] for number in side.tolist()] for side in (train.text_a, train.text_b))
    worst.add(similarity, train.label, texts_a, texts_b, train.ids)
    off_diagonal = off_diagonal_sample(inputs, NUM_OFF_DIAGONAL)
    tell(inputs, Similarities(similarity, train.label, off_diagonal, worst.worst()), len(inputs.texts))


def fill_stores(inputs: Inputs) -> None:
    """Score whatever the run's stores lack.

    Raises:
        UserError, RuntimeError: as `fill_store`.
    """
    config = inputs.config
    if inputs.teacher is not None:
        fill_store(config, Job(inputs.teacher, inputs.store, lambda: inputs.texts, len(inputs.texts)))
    fill_pair_store(
        inputs, lambda texts: fill_store(config, Job(inputs.pair_source, inputs.pair_store, texts, None, "pairs"))
    )


def score_streams(inputs: Inputs, pairs: PairStream, num_texts: int) -> None:
    """The stage for any number of pairs, read again for each pass; the teacher is one of single texts.

    Args:
        inputs: without tables.
        pairs: after a pass over their texts.
    Raises:
        UserError: as `score_tables`.
    """
    fill_store(inputs.config, Job(inputs.teacher, inputs.store, pairs.texts, num_texts))
    labelled = ((pair.text_a, pair.text_b, pair.label, pair.id) for pair in pairs.pairs("train"))
    num_pairs, seed = pairs.num_pairs["train"], inputs.config.seed
    tell(inputs, similarities(labelled, num_pairs, TextTeacher(inputs.store.open()).of_texts, seed), num_texts)


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


def _facts(inputs: Inputs, num_texts: int) -> dict[str, str]:
    """What a report says of the teacher."""
    teacher, store = inputs.config.teacher, inputs.store or inputs.pair_store
    named = (teacher.model_name_or_path, teacher.cross_encoder, teacher.scores)
    names = [name for one in named if one for name in ([one] if isinstance(one, str) else one)]
    return {
        "teacher": " and ".join(names),
        "fingerprint": store.spec.teacher_fingerprint[:12],
        "pooling": store.spec.pooling,
        "texts": f"{num_texts:,}",
        "scale": "cosine" if inputs.pair_source is None else inputs.pair_source.scale,
        "calibrated": "yes" if teacher.calibrate else "no",
    }


def tell(inputs: Inputs, found: Similarities, num_texts: int) -> None:
    """Print what the noise filter makes of the similarities, and write it as a page.

    Raises:
        UserError: the filter leaves L_MCL nothing to learn from.
    """
    loss, page, facts = inputs.config.loss, inputs.folder.report, _facts(inputs, num_texts)
    made = noise_report(found.similarity, found.label, found.off_diagonal, loss.threshold, found.worst, facts)
    for line in made.lines():
        logger.info(line)
    write_html(made, page)
    logger.info("the same with plots and the most contradictory pairs: %s", page)
    if loss.mcl_weight > 0 and not made.configured_shares().off_diagonal:
        raise UserError(
            f"loss.threshold: {loss.threshold} keeps no off-diagonal negative of this teacher, so that "
            "L_MCL would learn nothing: lower it or set loss.mcl_weight to 0"
        )
