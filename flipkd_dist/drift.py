"""What merging does to p(match): the pairs it is measured on, the answers before and after."""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.base import load_tokenizer
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import pair_texts
from flipkd_dist.pairs import read_pairs
from flipkd_dist.predict import Matcher
from flipkd_dist.prompt import PairEncoder

logger = logging.getLogger("flipkd_dist")
MOST_PAIRS = 64
BUILT_IN = (
    ("my card was stolen yesterday", "somebody took my card, what now?"),
    ("how do i change my pin", "where can i set a new pin?"),
    ("how do i change my pin", "how do i close my account?"),
    ("the cash machine kept my card", "an atm swallowed my card"),
    ("when does my transfer arrive", "which currencies can i hold?"),
    ("is there a fee for paying abroad", "what do purchases in other countries cost me?"),
    ("i forgot my password", "a password reset is what i need"),
    ("can i open a second account", "why was my payment declined?"),
)


@dataclass(frozen=True)
class Drift:
    """Differences of p(match) between adapter and merged model."""

    num_pairs: int
    largest: float
    mean: float
    num_changed: int  # decisions at the threshold
    threshold: float
    where: str  # device and type of the computation

    def __str__(self) -> str:
        return (
            f"p(match) of {self.num_pairs} pairs before and after merging ({self.where}): largest difference "
            f"{self.largest:.2g}, mean {self.mean:.2g}; {self.num_changed} of {self.num_pairs} decisions at "
            f"{self.threshold:.4f} changed"
        )


def default_pairs(card: AdapterCard, run: Path) -> list[tuple[str, str]]:
    """The adapter's probe pair, and validation and test pairs of the run (spread evenly) or pairs of our own."""
    probe = (card.probe.text_a, card.probe.text_b)
    pairs = _pairs_of_run(run) if (run / "config.yaml").is_file() else []
    pairs = [pair for pair in dict.fromkeys(pairs or BUILT_IN) if pair != probe]
    count = min(len(pairs), MOST_PAIRS - 1)
    return [probe, *(pairs[number * len(pairs) // count] for number in range(count))]


def _pairs_of_run(run: Path) -> list[tuple[str, str]]:
    """The pairs behind the run's predictions, as far as their files are still there."""
    found = []
    try:
        config = RunConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        for split in ("validation", "test"):
            if getattr(config.data, split):
                found += pair_texts(read_pairs(getattr(config.data, split), config.data, f"data.{split}"))
    except (UserError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        logger.warning("%s: not all pairs of this run can be read (%s): give --probes FILE", run, reason)
    return found


class Before:
    """Answers of base and adapter, and how they were computed; the models are gone afterwards."""

    def __init__(self, adapter: Path, base_model: str | None, texts: list[tuple[str, str]]):
        matcher = Matcher(adapter, base_model, merge=False)  # or merging would be compared with itself
        self.texts, self.threshold = texts, matcher.threshold
        self.dtype, self.device = matcher.student.answer_rows.dtype, matcher.world.device
        self.p_match, _ = matcher.predict(texts, 16)
        del matcher
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def drift(self, folder: Path, card: AdapterCard) -> Drift:
        """Against the merged model in `folder`.

        Raises:
            RuntimeError: it gives no numbers.
        """
        after = plain_p_match(folder, card, self.texts, self.dtype, self.device)
        differences = np.abs(after - self.p_match)
        if not np.isfinite(differences).all():
            raise RuntimeError("the merged model gives p(match) that is not a number: nothing was exported")
        # The threshold is the score of some validation pair: on it, rounding alone is no change of mind.
        changed = ((after >= self.threshold) != (self.p_match >= self.threshold)) & (differences > 1e-5)
        where = f"{self.device.type}, {str(self.dtype).removeprefix('torch.')}"
        return Drift(
            len(after), float(differences.max()), float(differences.mean()), int(changed.sum()), self.threshold, where
        )


@torch.no_grad()
def plain_p_match(
    folder: Path, card: AdapterCard, texts: list[tuple[str, str]], dtype: torch.dtype, device: torch.device
) -> np.ndarray:
    """p(match) of each pair from a causal LM's folder by transformers alone, float64 [N]."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    model = model.to(device).eval()
    encoder = PairEncoder(load_tokenizer(folder), card.prompt, card.answers, card.max_length)
    found = []
    for text_a, text_b in tqdm(texts, "probe", unit=" pairs", disable=None, leave=False):
        ids = torch.tensor([encoder.prefix + encoder.encode(text_a, text_b).ids], device=device)
        logits = model(input_ids=ids).logits[0, -1, encoder.answer_ids]
        found.append(torch.softmax(logits.double(), dim=0)[0].item())
    return np.array(found)
