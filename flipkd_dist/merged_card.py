"""The model card of a merged model: where it comes from, what merging changed, and code that gives p(match)."""

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.prompt import TEMPLATES, PairEncoder

MERGES = {
    "original": "the base's original weights",
    "dequantized": "the values that the base's 4-bit layers multiply with, as in training",
}
CARD = """---
base_model: {card.base_model}
base_model_relation: merge
library_name: transformers
pipeline_tag: text-generation
---
# {title}

Decides whether two texts match: p(match) from a causal language model, trained by flipped knowledge distillation
(FlipKD, arXiv 2507.05617) with `flipkd_dist`. The adapter is merged into the weights; no PEFT is needed.

- base: `{card.base_model}`, fingerprint `{card.base_fingerprint}`
- adapter: step {card.step}, trained in {card.dtype}{form}
- merged into: {merge} (`--merge {mode}`)
- drift: {drift}
- answers: {answers}; a pair matches where p(match) reaches {card.threshold!r}
- at most {card.max_length} tokens; of a pair that is too long, the longer text is cut first

```python
{code}```
"""
CODE = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
prompt = {prompt!r}
leading, answers, max_length = {leading}, {answer_ids}, {max_length}  # token ids; tokens


def tokens(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


@torch.no_grad()
def p_match(text_a, text_b):
    before, rest = prompt.split("{{text_a}}")
    before, between, after = map(tokens, (before, *rest.split("{{text_b}}")))  # in parts: a text's tokens stay its own
    a, b = tokens(text_a.strip()), tokens(text_b.strip())
    room = max_length - len(leading + before + between + after)
    if len(a) + len(b) > room:
        short = min(len(a), len(b), room // 2)
        keep = short if len(a) <= len(b) else room - short
        a, b = a[:keep], b[: room - keep]
    logits = model(torch.tensor([leading + before + a + between + b + after])).logits[0, -1, answers]
    return torch.softmax(logits.double(), dim=0)[0].item()


print(p_match({probe[0]!r}, {probe[1]!r}) >= {threshold!r})
"""


def merged_card(title: str, card: AdapterCard, mode: str, drift: str, encoder: PairEncoder) -> str:
    """README.md of the merged folder.

    Args:
        drift: what was measured, as text.
        encoder: as for the adapter.
    """
    prompt = TEMPLATES.get(card.prompt or "faq", card.prompt)
    before = prompt.split("{text_a}")[0]
    num_before = len(encoder.tokenizer(before, add_special_tokens=False)["input_ids"]) if before else 0
    code = CODE.format(
        prompt=prompt,
        leading=encoder.prefix[: len(encoder.prefix) - num_before],
        answer_ids=encoder.answer_ids,
        max_length=card.max_length,
        probe=(card.probe.text_a, card.probe.text_b),
        threshold=card.threshold,
    )
    answers = " (match) and ".join(f"`{answer}`" for answer in card.answers)
    form = f" on {card.four_bits}" if card.load_in_4bit else ""
    return CARD.format(
        card=card, form=form, title=title, mode=mode, merge=MERGES[mode], drift=drift, answers=answers, code=code
    )
