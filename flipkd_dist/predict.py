"""p(match) of pairs from a saved adapter, in one process and without the teacher."""

from pathlib import Path

import numpy as np
import torch

from flipkd_dist.adapter import WEIGHTS, AdapterCard, check_probe, load_weights
from flipkd_dist.base import check_base, fills_blank, load_tokenizer, shares_prefix
from flipkd_dist.base_loader import Whole
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import student_scores
from flipkd_dist.model_files import fingerprint, resolve_model
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.run_folder import read_json
from flipkd_dist.student import load_student
from flipkd_dist.world import World


class Matcher:
    """A base with its adapter; `threshold` is the decision threshold of p(match) from validation."""

    def __init__(self, folder: Path, base_model: str | None = None, device: str | None = None):
        """
        Args:
            folder: an adapter folder.
            base_model: where the base is, if not where it was in training.
        Raises:
            UserError: no adapter there, or a base that is not the one it was trained on.
            RuntimeError: the adapter does not answer its probe pair as it did when it was saved.
        """
        card = AdapterCard.read(folder)
        base = find_base(card, folder, base_model)
        lora = read_json(folder / "adapter_config.json")
        if lora is None or not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder}: adapter_config.json or {WEIGHTS} is missing: name a complete adapter folder")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # On a CPU bf16 is slow, and fp32 answers the same up to bf16's rounding.
        dtype = torch.float32 if device == "cpu" else getattr(torch, card.dtype)
        settings = StudentConfig(
            model_name_or_path=str(base),
            lora_r=lora["r"],
            lora_alpha=float(lora["lora_alpha"]),
            lora_target_modules=sorted(lora["target_modules"]),
            encoder_module=card.encoder_module,
            attn_implementation=card.attn_implementation,
            load_in_4bit=card.load_in_4bit,
            bnb_4bit_quant_type=card.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=card.bnb_4bit_use_double_quant,
        )
        blank = fills_blank(check_base(base, settings))
        encoder = PairEncoder(load_tokenizer(folder), card.prompt, card.answers, card.max_length, blank)
        student = load_student(base, settings, encoder.answer_ids, lora["r"], dtype=dtype, placement=Whole(device))
        load_weights(student, folder / WEIGHTS)
        self.threshold, self.student = card.threshold, student.to(device).eval()
        self.make_batch = BatchMaker(encoder, student, shares_prefix(student.model.config, card.max_length))
        self.world = World(device=torch.device(device))
        [p_match], _ = self.predict([(card.probe.text_a, card.probe.text_b)])
        check_probe(p_match, card, dtype)

    def predict(self, texts: list[tuple[str, str]], batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """p(match) and the cosine of the read-outs of each pair, float64 [N] each; `batch_size` in pairs."""
        return student_scores(self.student, self.world, self.make_batch, texts, batch_size, "predict")


def find_base(card: AdapterCard, folder: Path, base_model: str | None = None) -> Path:
    """The folder of the base that the adapter in `folder` was trained on.

    Args:
        base_model: where it is, if not where it was in training.
    Raises:
        UserError: not found, or another one.
    """
    base = resolve_model(base_model or card.base_model, "student.model_name_or_path")
    if fingerprint(base) != card.base_fingerprint:
        raise UserError(
            f"student.model_name_or_path: {base} is not the base that {folder} was trained on: name that one"
        )
    return base


def adapter_folder(model: str) -> Path:
    """The adapter in a run folder, or the adapter folder itself."""
    for folder in (Path(model) / "adapter", Path(model)):
        if (folder / "flipkd.json").is_file():
            return folder
    raise UserError(f"{model}: neither a run folder nor an adapter folder: name one, or models:/NAME@ALIAS")
