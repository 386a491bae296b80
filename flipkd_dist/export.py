"""The verb `export`: adapter and base as one plain Hugging Face folder, complete or absent."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.base import check_base, fills_blank, load_tokenizer
from flipkd_dist.config import StudentConfig
from flipkd_dist.drift import Before, default_pairs
from flipkd_dist.errors import UserError
from flipkd_dist.fourbit import FourBit
from flipkd_dist.merge import plan_merge
from flipkd_dist.merged_card import merged_card
from flipkd_dist.predict import find_base
from flipkd_dist.predict_file import local_adapter, read_texts
from flipkd_dist.prompt import PairEncoder
from flipkd_dist.run_folder import read_json, write_json

logger = logging.getLogger("flipkd_dist")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BESIDE_WEIGHTS = 2**25  # bytes: tokenizer, configuration, card


def export(
    model: str,
    output: Path,
    merge: str | None = None,
    base_model: str | None = None,
    probes: Path | None = None,
    text_a: str = "text_a",
    text_b: str = "text_b",
    max_shard_size: str = "5GB",
    tracking_uri: str | None = None,
    probe: bool = True,
) -> None:
    """Merge the adapter of `model` into its base, measure what that changes, and write the folder `output`.

    Args:
        model: a run folder, an adapter folder or `models:/NAME@ALIAS`.
        merge: `original` or `dequantized`; None is the one that the adapter was trained on.
        probe: whether to load the models, whole and one after the other, and measure the drift of p(match).
    Raises:
        UserError: anything wrong with what was asked for; nothing is written.
    """
    check_folder(output)
    shard_size = size_in_bytes(max_shard_size)
    texts = [one.texts for one in read_texts(probes, text_a, text_b)] if probes else None
    if texts == []:
        raise UserError(f"--probes {probes}: no pairs in it: name a file that has some")
    with local_adapter(model, tracking_uri) as adapter:
        card = AdapterCard.read(adapter)
        if card.mode == "alone":
            raise UserError(
                f"{adapter}: this student encodes texts alone, and a merged folder answers pairs: use the adapter "
                "with flipkd predict, rank and embed"
            )
        if card.tuning == "full":
            raise UserError(
                f"{adapter}: tuned as a whole, so there is nothing to merge: copy it, it is a plain Hugging Face folder"
            )
        mode = merge_mode(card, merge)
        base = find_base(card, adapter, base_model)
        config = check_base(base, StudentConfig(model_name_or_path=str(base)))
        if fills_blank(config):
            raise UserError(
                f"{base}: transformers has no class for the original GLM, so there is no plain folder of it: "
                "predict with the adapter"
            )
        form = FourBit(card.bnb_4bit_quant_type, card.bnb_4bit_use_double_quant) if mode == "dequantized" else None
        plan = plan_merge(config, base, adapter, form)
        check_space(output, plan.nbytes)
        encoder = PairEncoder(load_tokenizer(adapter), card.prompt, card.answers, card.max_length)
        before = Before(adapter, base_model, texts or default_pairs(card, Path(model))) if probe else None
        with whole_folder(output) as draft:
            plan.write(draft, shard_size)
            write_companions(draft, base, encoder)
            drift = str(before.drift(draft, card)) if before else "not measured (--no-probe)"
            text = merged_card(output.name, card, mode, drift, encoder)
            (draft / "README.md").write_text(text, encoding="utf-8")
    logger.info("drift: %s", drift)
    logger.info("merged into the %s weights -> %s (%.2f GB)", mode, output, plan.nbytes / 1e9)


def merge_mode(card: AdapterCard, wanted: str | None) -> str:
    """What the adapter is merged into: what was asked for, else what it was trained on."""
    if wanted == "dequantized" and not card.load_in_4bit:
        raise UserError("--merge dequantized: this adapter was not trained on a 4-bit base: take --merge original")
    return wanted or ("dequantized" if card.load_in_4bit else "original")


def write_companions(folder: Path, base: Path, encoder: PairEncoder) -> None:
    """What stands beside the weights: configuration, generation settings if the base has some, tokenizer."""
    config = read_json(base / "config.json")
    for key in ("quantization_config", "auto_map"):  # code that is not copied must not be asked for
        config.pop(key, None)
    write_json(folder / "config.json", config)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    encoder.tokenizer.save_pretrained(folder)


def size_in_bytes(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `1GiB`, `4096`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(|[KMG]I?B)", text.strip(), re.IGNORECASE)
    size = int(float(match.group(1)) * UNITS[match.group(2).upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: not a size: write it as 5GB or 500MB")
    return size


def check_folder(output: Path) -> None:
    """Find out before the work whether the folder can be written at the end of it."""
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output}: this folder is not empty: name another or remove it")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: this is a file: name a folder")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {parent}: create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: the folder {parent} is not writable: name another")


def check_space(output: Path, nbytes: int) -> None:
    """Refuse when the file system cannot hold the weights; a draft that a kill left there is removed first."""
    shutil.rmtree(_draft(output), ignore_errors=True)
    parent = output.absolute().parent
    free, needed = shutil.disk_usage(parent).free, nbytes + BESIDE_WEIGHTS
    if free < needed:
        raise UserError(
            f"--output {output}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free in {parent}: "
            "make room or name a folder elsewhere"
        )


def _draft(output: Path) -> Path:
    return output.absolute().parent / f".{output.absolute().name}.tmp"


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A draft that becomes `output` at the end, and is removed if that is not reached."""
    draft = _draft(output)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
