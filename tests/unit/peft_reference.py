"""An adapter's answers by transformers and PEFT alone, and a card for adapters of `tiny.started_student`."""

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flipkd_dist.adapter import AdapterCard, Probe
from flipkd_dist.base import load_tokenizer
from flipkd_dist.prompt import PairEncoder

CARD = AdapterCard(
    base_model="tiny",
    base_fingerprint="0123",
    prompt="do i same ? {text_a} | {text_b} =",
    answers=["yes", "no"],
    encoder_module="q_proj",
    attn_implementation="auto",
    max_length=120,
    threshold=0.4,
    step=7,
    probe=Probe("card", "pin", 0.7, 0.5),
)


@torch.no_grad()
def plain_peft(base: Path, folder: Path, texts: list[tuple[str, str]]) -> np.ndarray:
    """p(match) of `texts` from nothing but the base's folder and the adapter's."""
    card = AdapterCard.read(folder)
    encoder = PairEncoder(load_tokenizer(folder), card.prompt, card.answers, card.max_length)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    found = []
    for a, b in texts:
        logits = model(input_ids=torch.tensor([encoder.prefix + encoder.encode(a, b).ids])).logits[0, -1]
        found.append(torch.softmax(logits[encoder.answer_ids].double(), dim=0)[0].item())
    return np.array(found)
