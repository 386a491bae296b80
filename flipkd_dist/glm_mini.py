"""The packaged student `glm-mini`: a GLM as wide as MiniLM whose token embeddings are MiniLM's.

The blocks ship with the package; tokenizer and embeddings are taken from the teacher's package at first use. It exists
so that a demonstration can show p(match) without a download: model card in `samples/glm_mini/README.md`.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM

PROMPT = "same question? {text_a} | {text_b} ="
EMBEDDING_STD = 0.5
FINAL_NORM = (
    0.1  # the answers' rows are long: at 1 the untrained logits are in the tens and training takes 5 times as long
)
BLOCKS = Path(__file__).parent / "samples" / "glm_mini" / "blocks.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def glm_mini_config(vocab_size: int) -> GlmConfig:
    return GlmConfig(
        vocab_size=vocab_size,
        hidden_size=384,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=64,
        partial_rotary_factor=0.5,
        attention_bias=False,
        attention_dropout=0.0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=102,
        bos_token_id=101,
    )


def untrained(teacher: Path) -> GlmForCausalLM:
    """The model with MiniLM's word embeddings at a standard deviation of 0.5 and random blocks."""
    with safe_open(teacher / "model.safetensors", framework="pt") as tensors:
        embeddings = tensors.get_tensor("embeddings.word_embeddings.weight").float()
    model = GlmForCausalLM(glm_mini_config(len(embeddings)))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embeddings * (EMBEDDING_STD / embeddings.std()))
        model.model.norm.weight.fill_(FINAL_NORM)
        for layer in model.model.layers:  # a layer starts as the identity, so that the embeddings' meaning stays
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.tie_weights()
    return model


def blocks_of(model: GlmForCausalLM) -> dict[str, torch.Tensor]:
    """What ships: everything but the embeddings, fp16."""
    shipped = {name: value for name, value in model.state_dict().items() if "embed_tokens" not in name}
    shipped.pop("lm_head.weight", None)
    return {name: value.half().contiguous() for name, value in shipped.items()}


def materialise(teacher: Path, folder: Path) -> Path:
    """Write the complete model and its tokenizer to `folder` unless it is there; atomic, safe to race."""
    if (folder / "config.json").exists():
        return folder
    model = untrained(teacher)
    missing = model.load_state_dict({k: v.float() for k, v in load_file(BLOCKS).items()}, strict=False).missing_keys
    assert all("embed_tokens" in name or "lm_head" in name for name in missing), missing
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(draft)
    try:
        os.replace(draft, folder)
    except OSError:  # another process was first
        shutil.rmtree(draft)
    return folder
