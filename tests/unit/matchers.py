"""An adapter folder for prediction, its answers pair by pair, and a matcher without a model."""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
import torch
from peft_reference import CARD
from tiny import PROMPTS, save_student, started_student

from flipkd_dist.adapter import Probe, save_adapter
from flipkd_dist.batches import BatchMaker
from flipkd_dist.evaluate import student_scores
from flipkd_dist.model_files import fingerprint
from flipkd_dist.world import World

PROBE = ("lost my card", "where is my card")


def single_scores(student, encoder, texts: list[tuple[str, str]]) -> np.ndarray:
    """p(match) and similarity of each pair by itself, in a padded batch, [N, 2]."""
    make_batch = BatchMaker(encoder, student, share_prefix=False)
    return np.array([np.concatenate(student_scores(student, World(), make_batch, [pair], 1)) for pair in texts])


def saved_adapter(folder: Path, family: str = "glm", encoder_module: str = "q_proj", **settings):
    """An adapter folder, and the student and encoder that it was saved from; `settings` of `started_student`."""
    base = save_student(folder / "base", family)
    student, encoder = started_student(base, **settings)
    with torch.no_grad():
        [[p_match, _]] = single_scores(student, encoder, [PROBE])
    card = dataclasses.replace(
        CARD,
        base_model=str(base),
        base_fingerprint=fingerprint(base),
        encoder_module=encoder_module,
        max_length=settings.get("max_length", 120),
        prompt=PROMPTS[settings.get("mode", "pair")],
        mode=settings.get("mode", "pair"),
        readout=student.reads,
        bidirectional=student.bidirectional,
        probe=Probe(*PROBE, float(p_match), 0.0),
    )
    state = {name: value.detach() for name, value in student.trained_parameters().items()}
    save_adapter(folder / "adapter", student, state, encoder.tokenizer, card)
    return folder / "adapter", student.eval(), encoder


def made_up_score(pair: tuple[str, str]) -> tuple[float, float]:
    return zlib.crc32("|".join(pair).encode()) / 2**32, len(pair[1]) / 1000


class MadeUpEncoder:
    """Stands for the encoder: a text has no tokens if it is the replacement character."""

    def first_without_tokens(self, texts) -> str | None:
        return next((text for text in texts if text == "\ufffd"), None)


class MadeUpMatcher:
    """Stands for `Matcher`: a score is a checksum of the pair; it notes how many pairs it is given at a time."""

    threshold = 0.5

    def __init__(self, *_):
        self.calls: list[int] = []

    def scores(self, texts, limits, done) -> np.ndarray:
        self.calls.append(len(texts))
        done(len(texts), 0)
        return np.array([made_up_score(pair) for pair in texts]).reshape(-1, 2)
