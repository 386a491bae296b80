"""What plain transformers makes of a tuned student's folder."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.base import load_tokenizer
from flipkd_dist.prompt import PairEncoder


@torch.no_grad()
def plain_answers(folder: Path, texts: list[tuple[str, str]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """p(match) of `texts`, and the last hidden states [L, h] of each, from nothing but the folder."""
    card = AdapterCard.read(folder)
    encoder = PairEncoder(load_tokenizer(folder), card.prompt, card.answers, card.max_length)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    p_match, states = [], []
    for a, b in texts:
        ids = torch.tensor([encoder.prefix + encoder.encode(a, b).ids])
        logits = model.eval()(input_ids=ids).logits[0, -1]
        p_match.append(torch.softmax(logits[encoder.answer_ids].double(), dim=0)[0].item())
        states.append(model.base_model(input_ids=ids).last_hidden_state[0].numpy())
    return np.array(p_match), states
