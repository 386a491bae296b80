"""Make a small GLM of the 2022 kind with random weights, in the files that THUDM published glm-2b and glm-10b in.

    python examples/make_glm_original.py runs/glm-original-small
    flipkd run flipkd_dist/samples/demo.yaml student.model_name_or_path=runs/glm-original-small name=glm-original

About 5 million parameters and a byte-level tokenizer of the sample questions. It shows that a GLM-10B folder goes
through the same commands; a random base learns nothing worth having. The weights are safetensors, not a pickle.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from flipkd_dist.glm_original import GlmOriginalConfig, GlmOriginalForCausalLM

ADDED = (
    "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]",
)  # fmt: skip
TOKENIZER = {
    "cls_token": "[CLS]",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
    "add_prefix_space": False,
    "tokenizer_class": "GLMGPT2Tokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_glm.GLMGPT2Tokenizer", None]},
}
AUTO_MAP = {
    "AutoConfig": "configuration_glm.GLMConfig",
    "AutoModel": "modeling_glm.GLMModel",
    "AutoModelForSeq2SeqLM": "modeling_glm.GLMForConditionalGeneration",
}


def make_glm_original(folder: Path, texts: list[str], vocab_size: int, seed: int = 0, std: float = 0.02, **shape):
    """Write config.json, weights and tokenizer files under their published names and keys.

    Args:
        texts: what the tokenizer is trained on.
        vocab_size: rows of the embeddings; a few are left over, as in the published ones.
        std: of the random matrices.
        shape: further keys of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = GlmOriginalConfig(vocab_size=vocab_size, initializer_range=std, **shape)
    GlmOriginalForCausalLM(config).save_pretrained(folder)
    published = {
        **{key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"},
        "model_type": "glm",
        "block_position_encoding": True,
        "relative_encoding": False,
        "attention_scale": 1.0,
        "output_predict": True,
        "auto_map": AUTO_MAP,
    }
    save_tokenizer(folder, texts, vocab_size - 2 * len(ADDED))
    (folder / "config.json").write_text(json.dumps(published, indent=2))


def save_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> None:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    words.model.save(str(folder))  # vocab.json and merges.txt
    added = {token: words.get_vocab_size() + number for number, token in enumerate(ADDED)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))


def sample_texts() -> list[str]:
    """The sample questions, and often enough the answers that must be single tokens."""
    samples = Path(__file__).parents[1] / "flipkd_dist" / "samples"
    with next(samples.glob("*.csv")).open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    return texts + ["Same question? | = Reply: yes no Yes No"] * 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_glm_original(
        arguments.folder,
        sample_texts(),
        vocab_size=2048,
        seed=arguments.seed,
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.hidden_size // 64,
        max_sequence_length=256,
    )
    print(f"{arguments.folder}: {', '.join(sorted(path.name for path in arguments.folder.iterdir()))}")


if __name__ == "__main__":
    main()
