"""Vectors of texts from a student that was trained to encode them alone."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import fingerprint
from flipkd_dist.predict import Matcher, progress
from flipkd_dist.token_batches import BatchLimits


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What a student's vector depends on besides its text: the weights and all that stands beside them."""
    card = AdapterCard.read(folder)
    beside = [name for name in ("flipkd.json", "adapter_config.json") if (folder / name).is_file()]
    return {
        "step": card.step,
        "fingerprint": fingerprint(folder, beside),
        "base_fingerprint": card.base_fingerprint,
        "max_length": card.max_length,
        "prompt": card.prompt,
    }


def revision_of(facts: dict[str, Any]) -> str:
    """What tells a model from another of its name: its step, if it has one, and a hash of all facts."""
    step = f"step-{facts['step']}-" if "step" in facts else ""
    return step + hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=6).hexdigest()


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
        self.matcher, self.facts = Matcher(folder, base_model, device), adapter_facts(folder)
        self.num_truncated = 0  # texts that were cut so far

    @property
    def dimension(self) -> int:
        """Of a vector."""
        return self.matcher.student.readout_width

    @property
    def revision(self) -> str:
        return revision_of(self.facts)

    def has_tokens(self, texts: Sequence[str]) -> list[bool]:
        """Which texts have a token: `encode` refuses the others."""
        tokens = self.matcher.make_batch.encoder
        if tokens.first_without_tokens(texts) is None:
            return [True] * len(texts)
        return [tokens.first_without_tokens([text]) is None for text in texts]

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 512,
        max_batch_tokens: int = 8192,
        done: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Unit vectors, float32 [N, dimension], in the order of `texts`.

        Args:
            batch_size: the most texts of a forward.
            max_batch_tokens: the most tokens that a forward computes, the prompt's prefix counted once where it is
                shared.
            done: told how many texts are done, and how many of them were cut, in place of a bar.
        Raises:
            UserError: a text without a token.
        """
        if done is None:
            with progress(len(texts), "embed", "texts") as bar:
                return self.encode(texts, batch_size, max_batch_tokens, bar)

        def counted(num_texts: int, num_truncated: int) -> None:
            self.num_truncated += num_truncated
            done(num_texts, num_truncated)

        return self.matcher.vectors(texts, BatchLimits(max_batch_tokens, batch_size), counted)
