"""What a Sentence-Transformers folder says of its encoder: modules, pooling, prompts. Nothing is loaded here."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flipkd_dist.errors import UserError
from flipkd_dist.model_files import fingerprint, one_line

CONFIGS = (
    "config.json",
    "*/config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
KNOWN = ("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "WeightedLayerPooling", "CNN", "LSTM")
MODULE = re.compile(rf"sentence_transformers\.(?:\w+\.)*({'|'.join(KNOWN)})", re.ASCII)
OURS = {  # modes of the library that `teacher.pooled` has too; the two means differ in length alone
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean",
    "cls": "cls",
    "max": "max",
    "lasttoken": "lasttoken",
}
OLD_MODES = {  # as folders were written before `pooling_mode`, in the order of concatenation
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
PLAIN = {  # what a Transformer module may say of itself and still be nothing but the model's last hidden states
    "max_seq_length": None,  # teacher.max_length decides
    "do_lower_case": False,
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


@dataclass(frozen=True)
class SentenceFolder:
    """The encoder that a folder describes."""

    pooling: str  # a mode of the library, or several of them joined by +
    include_prompt: bool  # whether the prompt's tokens are pooled too
    prompt: str  # the default one
    other_prompts: tuple[str, ...]  # names of prompts that are there, where none is the default
    width: int | None  # of the vectors; None: the model's hidden size
    needs_library: bool  # there is more than Transformer, Pooling and Normalize
    files: tuple[str, ...]  # besides those of the model, what a vector depends on, relative to the folder

    def fingerprint(self, folder: Path) -> str:
        """32 hex digits that stand for model, tokenizer, modules and their weights; prompts are not among them."""
        return fingerprint(folder, self.files)


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else kind()
        if not isinstance(value, kind):
            raise ValueError(f"not a JSON {'list' if kind is list else 'object'}")
    except (OSError, ValueError) as error:
        raise UserError(f"teacher {path}: is damaged ({one_line(error)}): get the model again") from None
    return value


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(class, path relative to the folder) of the modules; all of them the library's own."""
    found = []
    for module in _json(folder / "modules.json", list):
        kind = module.get("type") if isinstance(module, dict) else None
        match, path = MODULE.fullmatch(str(kind)), str(module.get("path", "")) if isinstance(module, dict) else ""
        if not match:
            raise UserError(
                f"teacher {folder}: modules.json names {kind}, which is not one of the library's modules for one text "
                f"({', '.join(KNOWN)}), and code of a model is never run: name another model"
            )
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"teacher {folder}: modules.json names {path}, outside the folder: name another model")
        found.append((match[1], path))
    names = [name for name, _ in found]
    if names[:1] != ["Transformer"] or names.count("Transformer") != 1 or names.count("Pooling") != 1:
        raise UserError(
            f"teacher {folder}: modules.json must name a Transformer first and one Pooling: name another model"
        )
    return found


def _pooling(config: dict[str, Any]) -> list[str]:
    modes = config.get("pooling_mode") or [mode for key, mode in OLD_MODES.items() if config.get(key)] or "mean"
    return [modes] if isinstance(modes, str) else list(modes)


def _prompts(folder: Path, config: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """(the default prompt, names of the prompts where none is the default)."""
    prompts, name = config.get("prompts") or {}, config.get("default_prompt_name")
    if name is None:
        return "", tuple(key for key, prompt in prompts.items() if prompt)
    if name not in prompts and name not in ("query", "document"):  # the library knows these two, empty
        raise UserError(
            f"teacher {folder}: its default prompt {name} is not among its prompts: set teacher.prompt to a text"
        )
    return prompts.get(name) or "", ()


def _check_files(folder: Path, name: str, path: str, config: dict[str, Any], weights: bool) -> None:
    where = folder / path
    pickled = any(file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt") for file in where.glob("*"))
    if weights and path and (pickled or name == "Dense") and not (where / "model.safetensors").is_file():
        raise UserError(
            f"teacher {where}: has no model.safetensors, and pickled weights are never loaded: "
            "load and save the model with sentence-transformers once"
        )
    activation = config.get("activation_function", "torch.nn.")
    if name == "Dense" and not str(activation).startswith("torch.nn."):  # the library would put another in its place
        raise UserError(f"teacher {where}: its activation {activation} is not one of torch.nn: name another model")


def _named(folder: Path, paths: Iterable[Path]) -> list[str]:
    """The configuration and weight files among the paths, relative to the folder."""
    return sorted(str(path.relative_to(folder)) for path in paths if path.suffix in (".json", ".safetensors", ".txt"))


def read_sentence_folder(folder: Path, weights: bool = True) -> SentenceFolder | None:
    """What the folder says of its encoder; None for a plain folder of transformers.

    Args:
        weights: refuse a folder that lacks them; False where configurations are enough.
    Raises:
        UserError: its files are damaged or cut short, or it takes more than the library's own modules and safetensors.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules, config = _modules(folder), _json(folder / "config_sentence_transformers.json", dict)
    if (kind := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise UserError(f"teacher {folder}: a {kind} gives no vector of a single text: name a SentenceTransformer")
    width, pooling, files = None, {}, []
    more = bool(modules[0][1])  # a model in a folder of its own
    for name, path in modules:
        settings = _json(folder / path / "config.json", dict) if path else {}
        _check_files(folder, name, path, settings, weights)
        if name == "Pooling":
            pooling = settings
            size = settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
            width = size * len(_pooling(settings)) if isinstance(size, int) else None
        elif name == "Dense":
            width = settings.get("out_features")
        more |= name not in ("Transformer", "Pooling", "Normalize")
        if path:
            files += _named(folder, (folder / path).glob("*"))
    for path in sorted(folder.glob("sentence_*_config.json")):
        settings = _json(path, dict)
        if "tokenizer_name_or_path" in settings:
            raise UserError(f"teacher {path}: takes a tokenizer from elsewhere: save it beside the weights")
        more |= any(value != PLAIN.get(key) for key, value in settings.items() if key != "max_seq_length")
        files.append(path.name)
    modes, include_prompt = _pooling(pooling), bool(pooling.get("include_prompt", True))
    prompt, others = _prompts(folder, config)
    if config.get("truncate_dim") is not None:
        more, width = True, min(width or config["truncate_dim"], config["truncate_dim"])  # the library cuts vectors
        files.append("config_sentence_transformers.json")
    more |= len(modes) > 1 or modes[0] not in OURS
    named = "+".join(modes) if more else OURS[modes[0]]
    width = width if more else None
    return SentenceFolder(named, include_prompt, prompt, others, width, more, ("modules.json", *files))
