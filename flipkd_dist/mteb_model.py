"""An encoder of ours as a model of MTEB, so that the public benchmark runs on it."""

import logging
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flipkd_dist.errors import UserError

logger = logging.getLogger("flipkd_dist")


class MtebModel:
    """What `mteb.evaluate` takes for a model: it encodes texts, and compares vectors by their cosine.

    Prompts of tasks are not used: an adapter has the prompt that it was trained with. Only texts are encoded.

    Args:
        encoder: has `encode(texts, **options)` -> unit vectors float32 [N, d], such as `embedder.Embedder`.
        name: ORGANISATION/NAME under which MTEB keeps the results.
        revision: under which, too: MTEB takes kept results for those of any model of this name and revision. None:
            the encoder's own, of which an `Embedder` has one.
        options: of `encode`, in place of its own defaults; MTEB's own batch size is meant for models that pad.
    Raises:
        UserError: no revision, here or there.
    Source: MTEB's EncoderProtocol.
    """

    def __init__(self, encoder: Any, name: str, revision: str | None = None, **options: int):
        self.encoder, self.name, self.options = encoder, name, options
        self.revision = revision or getattr(encoder, "revision", None)
        if not self.revision:
            raise UserError(f"MtebModel {name}: this encoder has no revision of its own: give one")
        self.num_without_tokens = 0  # texts so far that got a vector of zeros

    @cached_property
    def mteb_model_meta(self) -> Any:
        """MTEB's ModelMeta: the name and revision under which results are kept, and that vectors compare by cosine."""
        from mteb.models import ModelMeta
        from mteb.models.model_meta import ScoringFunction

        known = {"name": self.name, "revision": self.revision, "similarity_fn_name": ScoringFunction.COSINE}
        return ModelMeta.create_empty({**known, "framework": ["PyTorch"]})

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: Any) -> np.ndarray:
        """Unit vectors of all texts of the batches, float32 [N, d]; zeros for a text that has no token.

        Args:
            inputs: MTEB's batches, each with a list `text`.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        has_tokens = self.encoder.has_tokens(texts) if hasattr(self.encoder, "has_tokens") else [True] * len(texts)
        some = self.encoder.encode([text for text, one in zip(texts, has_tokens, strict=True) if one], **self.options)
        if len(some) == len(texts):
            return some
        vectors = np.zeros((len(texts), some.shape[1]), np.float32)
        vectors[np.array(has_tokens)] = some
        self.num_without_tokens += len(texts) - len(some)
        logger.warning("%d texts have no token: their vectors are zeros, similar to nothing", len(texts) - len(some))
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of all pairs, [N1, N2]."""
        one, other = _tensors(embeddings1, embeddings2)
        return one @ other.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines row by row, [N]."""
        one, other = _tensors(embeddings1, embeddings2)
        return (one * other).sum(-1)


def _tensors(*vectors: Any) -> list[Tensor]:
    """As fp32 tensors of unit rows, at least two axes each."""
    found = [torch.atleast_2d(torch.as_tensor(part, dtype=torch.float32)) for part in vectors]
    return [torch.nn.functional.normalize(part, dim=-1) for part in found]
