"""Vectors of texts from a student that was trained to encode them alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.errors import UserError
from flipkd_dist.predict import Matcher, progress
from flipkd_dist.token_batches import BatchLimits


class Embedder:
    """A base with its adapter; a vector depends on its text alone."""

    def __init__(self, folder: Path, base_model: str | None = None, device: str | None = None):
        """
        Args:
            folder: an adapter folder of a student trained with `student.mode: alone`.
            base_model: where the base is, if not where it was in training.
        Raises:
            UserError: no adapter there, one of pairs, or a base that is not the one it was trained on.
            RuntimeError: the adapter does not answer its probe pair as it did when it was saved.
        """
        if AdapterCard.read(folder).mode != "alone":
            raise UserError(
                f"{folder}: this student reads two texts together and has no vector of one: train with "
                "student.mode=alone, or use flipkd predict and rank"
            )
        self.matcher = Matcher(folder, base_model, device)

    @property
    def dimension(self) -> int:
        """Of a vector."""
        return self.matcher.student.readout_width

    def encode(self, texts: Sequence[str], batch_size: int = 512, max_batch_tokens: int = 8192) -> np.ndarray:
        """Unit vectors, float32 [N, dimension], in the order of `texts`.

        Args:
            batch_size: the most texts of a forward.
            max_batch_tokens: the most tokens that a forward computes, the prompt's prefix counted once where it is
                shared.
        Raises:
            UserError: a text without a token.
        """
        with progress(len(texts), "embed", "texts") as done:
            return self.matcher.vectors(texts, BatchLimits(max_batch_tokens, batch_size), done)
