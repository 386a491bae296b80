"""The teacher's part of a run with checked inputs: which pairs are to be scored, fitted curves, the signals.

The driver calls `fill_pair_store` and `calibrate`, workers `open_signals`.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from flipkd_dist.calibration import Calibration, Meaning, fit, quality
from flipkd_dist.errors import UserError
from flipkd_dist.neighbours import nearest_columns
from flipkd_dist.order import training_order
from flipkd_dist.pair_teacher import numbers_in
from flipkd_dist.pairs import PairTable
from flipkd_dist.preflight import Inputs
from flipkd_dist.run_folder import read_json, write_json
from flipkd_dist.scored_files import ScoredPairs
from flipkd_dist.signals import PairTeacher, TeacherSignals, TextTeacher
from flipkd_dist.store import pair_text

logger = logging.getLogger("flipkd_dist")
SHARD = 65536  # scores of files written at once


def training_batches(inputs: Inputs) -> Iterator[np.ndarray]:
    """Every contrast batch of the run's training, as pair numbers."""
    order, num_steps = training_order(inputs.config, inputs.splits["train"].text_a)
    return chain.from_iterable(order.contrast_batches(number) for number in range(num_steps))


def pair_texts_to_score(inputs: Inputs) -> Iterator[str]:
    """What the cross-encoder has to score: every labelled pair, and the neighbours of every row of every batch.

    Texts of `store.pair_text`, streamed; a neighbour may come again in a later epoch.
    """
    for pairs in inputs.splits.values():
        yield from (pair_text(*texts) for texts in pairs.labelled_texts())
    if count := inputs.config.teacher.neighbours:
        pairs = inputs.splits["train"]
        for batch in training_batches(inputs):
            for row, column in np.argwhere(nearest_columns(pairs, batch, batch, count)):
                yield pair_text(pairs.texts[pairs.text_a[batch[row]]], pairs.texts[pairs.text_b[batch[column]]])


def fill_pair_store(inputs: Inputs, score_pairs: Callable[[Callable[[], Iterator[str]]], object]) -> None:
    """Bring the store of pair scores to the state where it holds all that training and evaluation will ask.

    Args:
        score_pairs: the pool, given what starts a pass over the pairs; it scores them with `inputs.pair_source` into
            `inputs.pair_store` and publishes that. Not called for scored files, which are written here.
    """
    if isinstance(inputs.pair_source, ScoredPairs):
        _write_scores(inputs.pair_source, inputs)
    elif inputs.pair_source is not None:
        score_pairs(partial(pair_texts_to_score, inputs))


def _texts_of(scored: ScoredPairs, part: slice = slice(None)) -> Iterator[str]:
    numbers = zip(scored.first[part], scored.second[part], strict=True)
    return (pair_text(scored.texts[i], scored.texts[j]) for i, j in numbers)


def _write_scores(scored: ScoredPairs, inputs: Inputs) -> None:
    store = inputs.pair_store
    while not store.is_complete(_texts_of(scored)):
        for start in range(0, len(scored.scores), SHARD):
            part = slice(start, start + SHARD)
            texts, scores = list(_texts_of(scored, part)), scored.scores[part]
            new = np.flatnonzero(~store.holds(texts))
            if len(new):
                store.write_shard([texts[k] for k in new], scores[new, None])
        if store.publish():
            break  # else a shard was damaged, and its texts are missing now
    logger.info("teacher.scores: %d scores of the run's pairs are stored", len(scored.scores))


def is_scored(inputs: Inputs) -> bool:
    """Whether nothing is left for the driver to do before training: stores complete, curves fitted."""
    if inputs.store is not None and not inputs.store.is_complete(inputs.texts):
        return False
    source = inputs.pair_source
    if source is not None:
        texts = _texts_of(source) if isinstance(source, ScoredPairs) else pair_texts_to_score(inputs)
        if not inputs.pair_store.is_complete(texts):
            return False
    return not inputs.config.teacher.calibrate or _fitted(inputs) is not None


def calibrate(inputs: Inputs) -> None:
    """Fit each source's curve on the labelled training pairs and keep them; nothing to do without teacher.calibrate.

    Raises:
        UserError: see `calibration.fit`.
    """
    if not inputs.config.teacher.calibrate or _fitted(inputs) is not None:
        return
    signals = _signals(inputs, "train", {})
    pairs, curves = signals.pairs, {}
    sides = ([pairs.texts[i] for i in side] for side in (pairs.text_a, pairs.text_b))
    found = {"texts": lambda: signals.cosines(), "pairs": lambda: signals.scored.scores(*sides)}
    for kind, teacher in (("texts", signals.texts), ("pairs", signals.scored)):
        if teacher is None:
            continue
        scores, what = found[kind](), {"texts": "the bi-encoder", "pairs": "the teacher of pairs"}[kind]
        curve = fit(scores, pairs.label, what)
        before = quality(teacher.meaning.similarity(scores, lambda k: f"pair {pairs.ids[k]}"), pairs.label)
        after = quality(curve.probability(scores), pairs.label)
        logger.info("teacher.calibrate: %s: %s before, %s after", what, before, after)
        curves[kind] = asdict(curve)
    write_json(_calibration_file(inputs), {"inputs": inputs.calibration_key, **curves})


def _calibration_file(inputs: Inputs) -> Path:
    return inputs.folder.notes / "calibration.json"


def _fitted(inputs: Inputs) -> dict[str, Calibration] | None:
    """The curves by kind ("texts", "pairs"); None where there are none for these inputs."""
    kept = read_json(_calibration_file(inputs))
    if not isinstance(kept, dict) or kept.get("inputs") != inputs.calibration_key:
        return None
    return {kind: Calibration(**kept[kind]) for kind in ("texts", "pairs") if kind in kept}


def open_signals(inputs: Inputs, split: str) -> TeacherSignals:
    """The teacher's word on the pairs of a split, out of the published stores.

    Raises:
        UserError: calibration is asked for and has not been fitted, or a score is not of the declared scale.
    """
    curves = _fitted(inputs) if inputs.config.teacher.calibrate else {}
    if curves is None:
        raise UserError(
            f"{_calibration_file(inputs)}: missing, or fitted on other pairs or scores: run `flipkd score` first"
        )
    return _signals(inputs, split, curves)


def _signals(inputs: Inputs, split: str, curves: dict[str, Calibration]) -> TeacherSignals:
    pairs, scored = inputs.splits[split], inputs.pair_source
    also = _also_scored(scored, pairs) if isinstance(scored, ScoredPairs) else None
    return TeacherSignals(pairs, _text_teacher(inputs, curves), _pair_teacher(inputs, curves), also)


def _text_teacher(inputs: Inputs, curves: dict[str, Calibration]) -> TextTeacher | None:
    if inputs.store is None:
        return None
    return TextTeacher(inputs.store.open(), Meaning("cosine", curves.get("texts")))


def _pair_teacher(inputs: Inputs, curves: dict[str, Calibration]) -> PairTeacher | None:
    if inputs.pair_source is None:
        return None
    meaning = Meaning(inputs.pair_source.scale, curves.get("pairs"))
    return PairTeacher(inputs.pair_store.open(), meaning, inputs.config.teacher.neighbours)


def _also_scored(scored: ScoredPairs, pairs: PairTable) -> np.ndarray:
    """Pairs of the table's texts that the files score, [K, 2] numbers into `pairs.texts`."""
    place = np.full(len(scored.texts), -1)
    place[numbers_in(scored, pairs)] = np.arange(len(pairs.texts))
    found = np.stack([place[scored.first], place[scored.second]], axis=1)
    return found[(found >= 0).all(axis=1)]


def off_diagonal_sample(inputs: Inputs, size: int) -> np.ndarray:
    """alpha of first and second texts of different training pairs, for the noise filter's report: float32 [k].

    Random pairs where the teacher knows every text, else the known entries of the run's own batches.

    Raises:
        UserError: L_MCL is on and the teacher knows no such entry.
    """
    signals, pairs = open_signals(inputs, "train"), inputs.splits["train"]
    if signals.texts is None:
        found = signals.off_diagonal(training_batches(inputs), size)
    else:
        rows, columns = np.random.default_rng(inputs.config.seed).integers(len(pairs), size=(2, size))
        rows, columns = rows[rows != columns], columns[rows != columns]
        sides = pairs.text_a[rows], pairs.text_b[columns]
        found = signals.texts.of_texts(*([pairs.texts[i] for i in side] for side in sides))
    if inputs.config.loss.mcl_weight > 0 and not len(found):
        raise UserError(
            "loss.mcl_weight: the teacher knows no pair off the diagonal of any batch, so that L_MCL would learn "
            "nothing: name a bi-encoder in teacher.model_name_or_path, score more pairs, or set it to 0"
        )
    return found
