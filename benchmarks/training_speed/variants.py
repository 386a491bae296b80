"""Who takes part. A line adds a contender or an ablation."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    script: str
    environment: str = "own"  # "own": the project's Python; else a folder that peers.sh made
    options: dict[str, Any] = field(default_factory=dict)
    headline: bool = False  # whether it runs when no names are given


BASELINE = "hf_trainer"
VARIANTS = {
    "ours": Variant("ours.py", headline=True),
    BASELINE: Variant("hf_trainer.py", headline=True),
    "flag_embedding": Variant("flag_reranker.py", "flag_embedding", headline=True),
    "sentence_transformers": Variant("st_cross_encoder.py", "sentence_transformers", headline=True),
    # Settings that a careful user of the Trainer would find.
    "hf_trainer:last_logits": Variant("hf_trainer.py", options={"logits": "last"}),
    "hf_trainer:by_length": Variant("hf_trainer.py", options={"sampling": "group_by_length"}),
    "hf_trainer:both": Variant("hf_trainer.py", options={"logits": "last", "sampling": "group_by_length"}),
    "hf_trainer:zero2": Variant("hf_trainer.py", options={"zero_stage": 2}),
    # Ours with one thing switched off, or under DeepSpeed: overrides are settings, switches stand in ours.py.
    "ours:one_pair_a_row": Variant("ours.py", options={"switches": ["one_pair_a_row"]}),
    "ours:whole_last_layer": Variant("ours.py", options={"switches": ["whole_last_layer"]}),
    "ours:data_in_line": Variant("ours.py", options={"switches": ["data_in_line"]}),
    "ours:no_teacher": Variant("ours.py", options={"overrides": ["loss.dist_weight=0.0", "loss.mcl_weight=0.0"]}),
    "ours:zero2": Variant("ours.py", options={"overrides": ['distributed.deepspeed="ds_configs/zero2.json"']}),
    "ours:zero3": Variant("ours.py", options={"overrides": ['distributed.deepspeed="ds_configs/zero3.json"']}),
}


def chosen(names: tuple[str, ...]) -> list[str]:
    """The variants asked for; none: the headline, one that ends in a colon (`ours:`): all that begin with it."""
    if not names:
        return [name for name, variant in VARIANTS.items() if variant.headline]
    found = []
    for name in names:
        matching = [known for known in VARIANTS if known == name or (name.endswith(":") and known.startswith(name))]
        if not matching:
            raise ValueError(f"{name}: no such variant: take some of {', '.join(VARIANTS)}")
        found += matching
    return list(dict.fromkeys(found))
