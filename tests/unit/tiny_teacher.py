"""A BERT of a few hundred weights with a WordPiece tokenizer of its own, saved as a model folder: no download."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

TEXTS = [
    "how do i open an account ?",
    "card",
    "what is the weather today ?",
    "lost my card",
    "what is the rate tomorrow and what is the fee for an account with money ?",
    "money",
]
WORDS = sorted({word for text in TEXTS for word in text.split()})


def save_tiny_teacher(folder: Path, seed: int = 0, **config) -> Path:
    """Write the model to `folder`; another seed gives other weights."""
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    settings = dict(vocab_size=len(vocabulary), max_position_embeddings=32, initializer_range=0.5) | sizes | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(BertConfig(**settings)).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder
