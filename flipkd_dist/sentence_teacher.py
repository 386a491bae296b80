"""The teacher whose folder holds more than a model and a pooling: run by the Sentence-Transformers library.

The only module that imports sentence_transformers, inside its functions. Shapes: n texts, d the hidden size.
"""

import logging
from pathlib import Path

import numpy as np
import torch

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line
from flipkd_dist.sentence_folder import SentenceFolder
from flipkd_dist.teacher import count_longer, num_positions, prompt_length, quiet


def _load(folder: Path, device: torch.device | str):
    from sentence_transformers import SentenceTransformer

    library = logging.getLogger("sentence_transformers")
    level = library.level
    library.setLevel(logging.ERROR)  # `read_sentence_folder` has refused what it would only warn of
    try:
        with quiet():
            return SentenceTransformer(
                str(folder),
                device=str(device),
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
    except Exception as error:  # the library, transformers and safetensors raise nearly anything here
        raise UserError(f"teacher {folder}: cannot be loaded ({one_line(error)}): name another model") from None
    finally:
        library.setLevel(level)


class SentenceTeacher:
    """The encoder of a Sentence-Transformers folder with modules of any kind, in fp32.

    Args:
        folder, form: and what `read_sentence_folder` says of it.
        pooling: that of the form, or one of "mean", "cls", "max", "lasttoken" in place of it.
        hidden_size: d that its configuration promises.
        max_length, device, prompt: as for `teacher.Teacher`.
    Raises:
        UserError: the folder cannot be loaded, has fewer positions than `max_length`, or gives vectors of another d.
    """

    def __init__(
        self,
        folder: Path,
        form: SentenceFolder,
        pooling: str,
        hidden_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        prompt: str = "",
    ):
        self.folder, self.hidden_size, self.max_length, self.prompt = Path(folder), hidden_size, max_length, prompt
        self.num_truncated = 0  # texts that were cut so far
        self.model = _load(self.folder, device).eval()
        if max_length > num_positions(self.model[0]):
            limit = num_positions(self.model[0])
            raise UserError(
                f"teacher.max_length = {max_length}: {folder} has {limit} positions: set it to {limit} or less"
            )
        self.model.max_seq_length = max_length
        prompt_length(self.model.tokenizer, prompt, max_length)
        if pooling != form.pooling:
            module = next(module for module in self.model if hasattr(module, "pooling_mode"))
            module.pooling_mode = pooling
        found = self.encode(["a"], 1).shape[1]
        if found != hidden_size:
            raise UserError(
                f"teacher {folder}: gives vectors of {found} numbers where its modules promise {hidden_size}: "
                "name another model"
            )

    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Unit vectors of the texts, float32 [n, d], in the order given.

        Args:
            batch_size: texts of one forward.
        Raises:
            UserError: the model gives values that are not finite.
        """
        if not texts:
            return np.empty((0, self.hidden_size), np.float32)
        vectors = self.model.encode(
            texts, prompt=self.prompt, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        whole = [self.prompt + text for text in texts]
        self.num_truncated += count_longer(self.model.tokenizer, self.max_length, whole)
        if not np.isfinite(vectors).all():
            raise UserError(
                f"teacher {self.folder}: some vectors are not finite: the weights are damaged, get them again"
            )
        return vectors.astype(np.float32, copy=False)
