"""The teacher: a small encoder that turns every text, by itself, into one unit vector.

Shapes: n texts, b texts of one batch, t tokens of its longest text, d the hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import TOKENIZER_FILES, one_line


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading bars and its table of unused weights; `_load` checks the missing ones itself."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _config(folder: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(
            f"teacher {folder}: config.json cannot be used ({one_line(error)}): name another model"
        ) from None
    if config.is_encoder_decoder or not isinstance(getattr(config, "hidden_size", None), int):
        raise UserError(f"teacher {folder}: {config.model_type} is not a text encoder: name another model")
    return config


def teacher_hidden_size(folder: Path) -> int:
    """d, from the configuration alone: no weights are read.

    Raises:
        UserError: the configuration cannot be read, or is not that of a text encoder.
    """
    return _config(folder).hidden_size


def _load(folder: Path):
    """(model in fp32, tokenizer), complete or an error."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make up an empty one
        raise UserError(f"teacher {folder}: there are no tokenizer files: save the tokenizer beside the weights")
    options = dict(trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    try:
        with _quiet():
            model, info = AutoModel.from_pretrained(folder, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers, safetensors and tokenizers raise nearly anything here
        raise UserError(f"teacher {folder}: cannot be loaded ({one_line(error)}): name another model") from None
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # the pooler's output is not used
    if missing:
        raise UserError(f"teacher {folder}: {len(missing)} weights are missing, such as {missing[0]}: get it again")
    if tokenizer.pad_token is None:
        raise UserError(f"teacher {folder}: its tokenizer has no padding token: set pad_token and save it again")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"teacher {folder}: the tokenizer has more tokens than the model: they do not belong together")
    return model, tokenizer


def _num_positions(model: torch.nn.Module) -> float:
    """The longest input that the table of learnt positions allows; infinite without such a table."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa and its kin count positions from padding_idx + 1.
    sizes = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for table in tables
        if isinstance(table, torch.nn.Embedding)
    ]
    return min(sizes, default=float("inf"))


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One unit vector per text [b, d] out of the token vectors [b, t, d]: their mean, or the first one ("cls").

    Args:
        attention_mask: [b, t], 0 at padding, which is on the right.
    Source: FlipKD, section 2.
    """
    if pooling == "cls":
        return F.normalize(hidden[:, 0], dim=-1)
    return F.normalize((hidden * attention_mask.unsqueeze(-1)).sum(1), dim=-1)  # the count cancels in the norm


class Teacher:
    """The encoder of one model folder, in fp32.

    Args:
        folder: of a transformers model with safetensors weights, see `model_files.resolve_model`.
        pooling: "mean" over the tokens, or "cls", the first token.
        max_length: tokens, special ones included; longer texts are cut.
    Raises:
        UserError: the folder cannot be loaded completely, or has fewer positions than `max_length`.
    """

    def __init__(self, folder: Path, pooling: str, max_length: int, device: torch.device | str = "cpu"):
        self.folder, self.pooling, self.max_length, self.device = Path(folder), pooling, max_length, device
        self.hidden_size = teacher_hidden_size(self.folder)
        model, self.tokenizer = _load(self.folder)
        if max_length > _num_positions(model):
            limit = _num_positions(model)
            raise UserError(
                f"teacher.max_length = {max_length}: {folder} has {limit} positions: set it to {limit} or less"
            )
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.model = model.eval().to(device)

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Unit vectors of the texts, float32 [n, d], in the order given.

        Args:
            batch_size: texts of one forward. Texts of similar length share one; the vectors do not depend on it.
        Raises:
            UserError: the model gives values that are not finite.
        """
        vectors = np.empty((len(texts), self.hidden_size), np.float32)
        if not texts:
            return vectors
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        longest_first = np.argsort(-lengths, kind="stable")  # memory that is too small shows at once
        for start in range(0, len(texts), batch_size):
            rows = longest_first[start : start + batch_size]
            batch = self.tokenizer.pad({k: [v[row] for row in rows] for k, v in tokens.items()}, return_tensors="pt")
            batch = batch.to(self.device)
            hidden = self.model(**batch).last_hidden_state
            vectors[rows] = pooled(hidden, batch["attention_mask"], self.pooling).float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise UserError(
                f"teacher {self.folder}: some vectors are not finite: the weights are damaged, get them again"
            )
        return vectors
