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

CPU_TOKENS = 768  # of one forward at most; what is larger falls out of a core's cache and takes longer per token


@contextmanager
def quiet() -> Iterator[None]:
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
    if own := {"AutoModel"} & (getattr(config, "auto_map", None) or {}).keys():
        raise UserError(
            f"teacher {folder}: brings code of its own for {own.pop()}, which is never run, and the "
            f"library's own {config.model_type} may give other vectors: name another model, or save it without auto_map"
        )
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
        with quiet():
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


def num_positions(model: torch.nn.Module) -> float:
    """The longest input that the table of learnt positions allows; infinite without such a table."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa and its kin count positions from padding_idx + 1.
    sizes = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for table in tables
        if isinstance(table, torch.nn.Embedding)
    ]
    return min(sizes, default=float("inf"))


def prompt_length(tokenizer, prompt: str, max_length: int) -> int:
    """Tokens that a prompt puts before every text: leading special ones included, a trailing one not.

    Raises:
        UserError: it leaves no room for a text.
    """
    if not prompt:
        return 0
    ids = tokenizer(prompt)["input_ids"]
    length = len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)
    if length + 2 > max_length:  # a token of the text and a special one
        raise UserError(f"teacher.max_length = {max_length}: the prompt alone has {length} tokens: raise it")
    return length


def count_longer(tokenizer, max_length: int, *texts: list[str]) -> int:
    """How many texts, or pairs of texts, have more than `max_length` tokens, special ones included."""
    if not texts[0]:
        return 0
    ids = tokenizer(*texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return sum(len(one) > max_length for one in ids)


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: str, num_prompt: int = 0) -> Tensor:
    """One unit vector per text [b, d] out of the token vectors [b, t, d].

    Args:
        attention_mask: [b, t], 0 at padding, which is on the right.
        pooling: "mean", "max" over the tokens, "cls" the first or "lasttoken" the last one.
        num_prompt: leading tokens that are not pooled.
    Source: FlipKD, section 2.
    """
    if pooling == "cls":
        return F.normalize(hidden[:, num_prompt], dim=-1)
    if pooling == "lasttoken":
        return F.normalize(hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1], dim=-1)
    hidden, mask = hidden[:, num_prompt:], attention_mask[:, num_prompt:].unsqueeze(-1)
    if pooling == "max":
        return F.normalize(hidden.masked_fill(mask == 0, -torch.inf).amax(1), dim=-1)
    return F.normalize((hidden * mask).sum(1), dim=-1)  # the count cancels in the norm


class Teacher:
    """The encoder of one model folder, in fp32.

    Args:
        folder: of a transformers model with safetensors weights, see `model_files.resolve_model`.
        pooling: "mean", "cls", "max" or "lasttoken", see `pooled`.
        max_length: tokens, special ones and the prompt's included; longer texts are cut.
        prompt: stands before every text.
        include_prompt: whether the prompt's tokens are pooled too.
    Raises:
        UserError: the folder cannot be loaded completely, has fewer positions than `max_length`, or the prompt leaves
            no room for a text.
    """

    def __init__(
        self,
        folder: Path,
        pooling: str,
        max_length: int,
        device: torch.device | str = "cpu",
        prompt: str = "",
        include_prompt: bool = True,
    ):
        self.folder, self.pooling, self.max_length, self.device = Path(folder), pooling, max_length, device
        self.prompt, self.num_truncated = prompt, 0  # texts that were cut so far
        self.hidden_size = teacher_hidden_size(self.folder)
        model, self.tokenizer = _load(self.folder)
        if max_length > num_positions(model):
            limit = num_positions(model)
            raise UserError(
                f"teacher.max_length = {max_length}: {folder} has {limit} positions: set it to {limit} or less"
            )
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        num_prompt = prompt_length(self.tokenizer, prompt, max_length)
        self.num_unpooled = 0 if include_prompt else num_prompt
        model.config.use_cache = False  # of decoders, which would keep keys and values for nobody
        self.model = model.eval().to(device)

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Unit vectors of the texts, float32 [n, d], in the order given.

        Args:
            batch_size: texts of one forward at most; fewer on a CPU where they are long. Texts of similar length share
                one; the vectors do not depend on it.
        Raises:
            UserError: the model gives values that are not finite.
        """
        vectors = np.empty((len(texts), self.hidden_size), np.float32)
        if not texts:
            return vectors
        texts = [self.prompt + text for text in texts] if self.prompt else texts
        tokens = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, return_attention_mask=False, verbose=False
        )
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        full = [texts[row] for row in np.flatnonzero(lengths == self.max_length)]
        self.num_truncated += count_longer(self.tokenizer, self.max_length, full)
        longest_first = np.argsort(-lengths, kind="stable")  # memory that is too small shows at once
        start = 0
        while start < len(texts):
            fitting = CPU_TOKENS // max(1, lengths[longest_first[start]]) if str(self.device) == "cpu" else batch_size
            rows = longest_first[start : start + max(1, min(batch_size, fitting))]
            start += len(rows)
            batch = self._padded(tokens, rows, lengths[rows])
            hidden = self.model(**batch).last_hidden_state
            unit = pooled(hidden, batch["attention_mask"], self.pooling, self.num_unpooled)
            vectors[rows] = unit.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise UserError(
                f"teacher {self.folder}: some vectors are not finite: the weights are damaged, get them again"
            )
        return vectors

    def _padded(self, tokens, rows: np.ndarray, lengths: np.ndarray) -> dict[str, Tensor]:
        """The model's inputs [b, t] for some of the texts; `tokenizer.pad` does the same several times slower."""
        there = np.arange(lengths.max()) < lengths[:, None]
        fill = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        batch = {"attention_mask": torch.from_numpy(there.astype(np.int64))}
        for name, values in tokens.items():
            array = np.full(there.shape, fill.get(name, 0), np.int64)
            array[there] = np.concatenate([values[row] for row in rows])
            batch[name] = torch.from_numpy(array)
        return {name: value.to(self.device) for name, value in batch.items()}
