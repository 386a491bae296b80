"""A cross-encoder as the teacher: reads both texts of a pair at once and gives one score, the logit of a match.

Shapes: k pairs, b pairs of one batch, t tokens of its longest pair.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from flipkd_dist.config import TeacherConfig
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import TOKENIZER_FILES, check_files, fingerprint, one_line, resolve_model
from flipkd_dist.run_folder import read_json
from flipkd_dist.store import StoreSpec
from flipkd_dist.teacher import count_longer, num_positions, quiet

KEY = "teacher.cross_encoder"


def _config(folder: Path) -> PreTrainedConfig:
    """The configuration of a classifier with one or two logits that needs no code or prompt of its own."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything here
        raise UserError(f"{KEY}: {folder}: config.json cannot be used ({one_line(error)}): name another") from None
    if own := {"AutoModelForSequenceClassification"} & (getattr(config, "auto_map", None) or {}).keys():
        raise UserError(
            f"{KEY}: {folder}: brings code of its own for {own.pop()}, which is never run, and the "
            f"library's own {config.model_type} may give other scores: name another model, or save it without auto_map"
        )
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        raise UserError(
            f"{KEY}: {folder}: {config.architectures or config.model_type} is no sequence classification model: "
            "name a cross-encoder, or set teacher.model_name_or_path for an encoder of single texts"
        )
    if config.num_labels not in (1, 2):
        raise UserError(f"{KEY}: {folder} has {config.num_labels} logits: name a model with one or two")
    if (read_json(folder / "config_sentence_transformers.json") or {}).get("default_prompt_name"):
        raise UserError(f"{KEY}: {folder} wants a prompt in front of its texts, which is not supported: name another")
    return config


class CrossEncoder:
    """The classifier of one model folder, in fp32.

    Args:
        max_length: tokens of both texts together, special ones included; the model's own limit counts if it is lower.
    Raises:
        UserError: the folder cannot be loaded completely.
    """

    def __init__(self, folder: Path, max_length: int, device: torch.device | str = "cpu"):
        self.folder, self.device = Path(folder), device
        _config(self.folder)
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"{KEY}: {folder}: there are no tokenizer files: save the tokenizer beside the weights")
        options = dict(trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        try:
            with quiet():
                model, info = AutoModelForSequenceClassification.from_pretrained(folder, **options)
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers, safetensors and tokenizers raise nearly anything here
            raise UserError(f"{KEY}: {folder}: cannot be loaded ({one_line(error)}): name another model") from None
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise UserError(f"{KEY}: {folder}: {len(missing)} weights are missing, such as {missing[0]}: get it again")
        if self.tokenizer.pad_token is None:
            raise UserError(f"{KEY}: {folder}: its tokenizer has no padding token: set pad_token and save it again")
        if len(self.tokenizer) > model.get_input_embeddings().num_embeddings:
            raise UserError(f"{KEY}: {folder}: the tokenizer has more tokens than the model: they do not fit together")
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.max_length = int(min(max_length, num_positions(model), self.tokenizer.model_max_length))
        self.num_truncated = 0  # pairs that were cut so far
        self.model = model.eval().to(device)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # decoders find the last token by it

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Raw scores of pairs, float32 [k, 1], in the order given: the logit, of two logits the second less the first.

        Args:
            texts: pairs as `store.pair_text` writes them.
            batch_size: pairs of one forward; pairs of similar length share one.
        Raises:
            UserError: the model gives values that are not finite.
        """
        scores = np.empty((len(texts), 1), np.float32)
        if not texts:
            return scores
        sides = [list(side) for side in zip(*(text.split("\0") for text in texts), strict=True)]
        tokens = self.tokenizer(*sides, truncation="longest_first", max_length=self.max_length)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        full = np.flatnonzero(lengths == self.max_length)  # only these may have been cut
        self.num_truncated += count_longer(
            self.tokenizer, self.max_length, *([side[k] for k in full] for side in sides)
        )
        longest_first = np.argsort(-lengths, kind="stable")
        for start in range(0, len(texts), batch_size):
            rows = longest_first[start : start + batch_size]
            batch = self.tokenizer.pad({k: [v[row] for row in rows] for k, v in tokens.items()}, return_tensors="pt")
            logits = self.model(**batch.to(self.device)).logits.float().cpu().numpy()
            scores[rows, 0] = logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)
        if not np.isfinite(scores).all():
            raise UserError(
                f"{KEY}: {self.folder}: some scores are not finite: the weights are damaged, get them again"
            )
        return scores


@dataclass(frozen=True)
class CrossEncoderSource:
    """What an actor of the pool gets; its texts are those of `store.pair_text`."""

    settings: TeacherConfig
    folder: Path
    spec: StoreSpec

    def load(self, device: torch.device | str = "cpu") -> CrossEncoder:
        return CrossEncoder(self.folder, self.spec.max_length, device)

    @cached_property
    def hidden_size(self) -> int:
        return _config(self.folder).hidden_size

    @property
    def scale(self) -> str:
        return "logit" if self.settings.scale == "auto" else self.settings.scale


def cross_encoder_source(settings: TeacherConfig) -> CrossEncoderSource:
    """The cross-encoder that the configuration names; no weights are loaded.

    Raises:
        UserError
    """
    folder = resolve_model(settings.cross_encoder, KEY)
    check_files(folder, KEY)
    _config(folder)
    spec = StoreSpec(fingerprint(folder), "pair", 2 * settings.max_length, hidden_size=1, dtype="float32")
    return CrossEncoderSource(settings, folder, spec)
