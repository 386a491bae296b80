"""The original GLM's tokenizers out of their published files, as fast tokenizers and without remote code.

glm-2b and glm-10b publish vocab.json and merges.txt of GPT-2, glm-10b-chinese cog-pretrain.model of SentencePiece, both
with added_tokens.json (the blank's tokens and their ids) and tokenizer_config.json (their roles).

Sources: github.com/THUDM/GLM, examples/squad/model_gen/tokenization_glm.py at dec03b98f1d51e1aa9f4523ee4f3fefe7bf17f7e
(classes, [CLS] in front of a text and <|endoftext|> behind it); roles that a configuration leaves open:
github.com/PaddlePaddle/PaddleNLP, paddlenlp/transformers/glm/tokenizer.py at d8e1cafd2ec250c93acc2ee07485e762536acbe2.
"""

import json
from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line

CLASSES = ("GLMGPT2Tokenizer", "GLMChineseTokenizer")
ROLES = {
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "sep_token": "[SEP]",
    "unk_token": "[UNK]",
}


def has_published_tokenizer(folder: Path) -> bool:
    """Whether the folder has one of the original GLM's tokenizers as published; a saved fast one goes before."""
    config = _read(folder / "tokenizer_config.json")
    return config.get("tokenizer_class") in CLASSES and not (folder / "tokenizer.json").is_file()


def load_published_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerFast:
    """
    Args:
        key: the dotted key that names the folder, for errors.
    Raises:
        UserError: a file is missing, or has other tokens than the published ones.
    """
    config, added = _read(folder / "tokenizer_config.json"), _read(folder / "added_tokens.json")
    try:
        roles = {role: _text(config.get(role)) or default for role, default in ROLES.items()}
        if config["tokenizer_class"] == "GLMChineseTokenizer":
            tokenizer, roles["unk_token"] = _chinese(folder)
        else:
            tokenizer = _gpt2(folder)
        _add(tokenizer, added)
        ids = {token: tokenizer.token_to_id(token) for token in roles.values() if token}
        first, last = roles["cls_token"], roles["eos_token"]
        if None in (ids[first], ids[last], ids[roles["mask_token"]]):
            raise ValueError(f"no {first}, {last} or {roles['mask_token']} in added_tokens.json or the vocabulary")
    except Exception as error:  # missing or damaged files; tokenizers raises nearly anything
        raise UserError(
            f"{key}: the tokenizer in {folder} cannot be loaded ({one_line(error)}): get it again"
        ) from None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(token, ids[token]) for token in (first, last)]
    )
    known = {role: token for role, token in roles.items() if token and ids[token] is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)


def _gpt2(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _chinese(folder: Path) -> tuple[Tokenizer, str]:
    """Also what stands for an unknown text. SentencePiece's file is read by protobuf, which ray and mlflow bring."""
    converter = SpmConverter(SimpleNamespace(vocab_file=str(folder / "cog-pretrain.model")))
    return converter.converted(), converter.proto.trainer_spec.unk_piece


def _add(tokenizer: Tokenizer, added: dict[str, int]) -> None:
    """The added tokens at their ids; ids between them that nothing has are filled, as ids are given out in order."""
    tokens = {number: token for token, number in added.items()}
    for number in range(tokenizer.get_vocab_size(), max(tokens, default=-1) + 1):
        tokens.setdefault(number, f"[UNUSED{number}]")
    for number, token in sorted(tokens.items()):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(
                f"added_tokens.json gives {token} the id {number}, the vocabulary {tokenizer.token_to_id(token)}"
            )


def _text(token: str | dict | None) -> str | None:
    """A token of tokenizer_config.json, which may stand there with its settings."""
    return token["content"] if isinstance(token, dict) else token


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
