"""Which teacher of pairs a run has, and the settings of it that would not fit together or do nothing."""

import reprlib

import numpy as np

from flipkd_dist.config import RunConfig, TeacherConfig
from flipkd_dist.cross_encoder import CrossEncoderSource, cross_encoder_source
from flipkd_dist.errors import UserError
from flipkd_dist.pairs import PairTable
from flipkd_dist.scored_files import ScoredPairs, read_scored_pairs
from flipkd_dist.store import normalised

PairSource = CrossEncoderSource | ScoredPairs
OF_TEXTS = (
    "pooling",
    "prompt",
    "weights",
    "api_base",
    "api_key_env",
    "requests_per_minute",
)  # settings that only an encoder of texts has


def check_settings(config: RunConfig) -> None:
    """
    Raises:
        UserError: the first setting of `teacher` that another one contradicts or leaves without effect.
    """
    teacher, loss = config.teacher, config.loss
    of_pairs = teacher.cross_encoder is not None or teacher.scores is not None
    if teacher.cross_encoder is not None and teacher.scores is not None:
        raise UserError("teacher.scores: teacher.cross_encoder is set too, and one pair has one score: remove one")
    if teacher.neighbours and teacher.cross_encoder is None:
        raise UserError("teacher.neighbours: there is no teacher.cross_encoder to score them: name one or set it to 0")
    if teacher.neighbours and not loss.dist_weight and not loss.mcl_weight:
        raise UserError("teacher.neighbours: dist_weight and mcl_weight are 0, which leaves no use for it: set it to 0")
    if teacher.scale not in ("auto", "cosine") and not of_pairs:
        raise UserError(
            f"teacher.scale = {teacher.scale}: it is about teacher.cross_encoder and teacher.scores, and neither is "
            "set: set it to auto (teacher.calibrate turns cosines into probabilities)"
        )
    if of_pairs and teacher.model_name_or_path is None:
        _check_without_texts(config)


def _check_without_texts(config: RunConfig) -> None:
    """The settings of a run whose teacher knows pairs alone."""
    teacher = config.teacher
    for key in OF_TEXTS:
        if getattr(teacher, key) != TeacherConfig.model_fields[key].default:
            raise UserError(f"teacher.{key}: there is no teacher.model_name_or_path that it is about: remove it")
    if teacher.cross_encoder is not None and not teacher.neighbours and config.loss.mcl_weight > 0:
        raise UserError(
            "teacher.cross_encoder: it knows labelled pairs alone, and L_MCL needs similarities off the diagonal: set "
            "teacher.model_name_or_path to a bi-encoder for them, or teacher.neighbours to the number of columns of "
            "each row that the cross-encoder is to score, or loss.mcl_weight to 0"
        )
    has_lora = config.student.tuning == "lora"
    if teacher.scores is not None and config.student.lora_r is None and has_lora:
        raise UserError(
            "student.lora_r: scored files have no hidden size to take it from: set it, or name a bi-encoder in "
            "teacher.model_name_or_path"
        )


def pair_source(config: RunConfig, tables: dict[str, PairTable]) -> PairSource | None:
    """The cross-encoder or the scored files that the configuration names; no weights are loaded.

    Raises:
        UserError: besides, a labelled pair of `tables` has no score in the files.
    """
    if config.teacher.cross_encoder is not None:
        return cross_encoder_source(config.teacher)
    if config.teacher.scores is None:
        return None
    texts = [text for pairs in tables.values() for text in pairs.texts]
    scored = read_scored_pairs(config.teacher, config.data, texts)
    for split, pairs in tables.items():
        _check_coverage(scored, pairs, split)
    return scored


def numbers_in(scored: ScoredPairs, pairs: PairTable) -> np.ndarray:
    """The number of each of the table's texts among the scored ones, int64; they hold all texts of the run."""
    numbers = {text: number for number, text in enumerate(scored.texts)}
    return np.array([numbers[normalised(text)] for text in pairs.texts], np.int64)


def _check_coverage(scored: ScoredPairs, pairs: PairTable, split: str) -> None:
    numbers, size = numbers_in(scored, pairs), len(scored.texts)
    wanted = numbers[pairs.text_a] * size + numbers[pairs.text_b]
    lacking = ~np.isin(wanted, scored.first * size + scored.second)
    if lacking.any():
        first = int(np.argmax(lacking))
        texts = (reprlib.repr(pairs.texts[side[first]]) for side in (pairs.text_a, pairs.text_b))
        raise UserError(
            f"teacher.scores: {lacking.sum()} of {len(pairs)} pairs of data.{split} have no score, the first is "
            f"{pairs.ids[first]} ({', '.join(texts)}): score them too, in this order of texts"
        )
