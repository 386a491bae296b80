"""A verified adapter into the MLflow registry, and registered versions back out."""

import gc
import logging
from pathlib import Path

import numpy as np

from flipkd_dist.adapter import AdapterCard
from flipkd_dist.config import RunConfig, TeacherConfig, without_credentials
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import format_table, tables_by_split
from flipkd_dist.predict import Matcher
from flipkd_dist.run_folder import read_json, write_json, write_whole
from flipkd_dist.run_logger import RUN_FILE
from flipkd_dist.tracking import download_model, has_version, load_registered, log_pyfunc, model_name, point_alias

logger = logging.getLogger("flipkd_dist")
TOLERANCE = 1e-5  # of p(match), between the folder and the registered version


def _teacher_name(teacher: TeacherConfig) -> str:
    parts = [
        ("", teacher.model_name_or_path),
        ("cross-encoder ", teacher.cross_encoder),
        ("scores of ", teacher.scores),
    ]
    return ", ".join(f"{kind}`{name}`" for kind, name in parts if name is not None)


def _readout(card: AdapterCard) -> str:
    """What is a text's vector, in words."""
    if card.readout == "lora_a":
        return f"mean of LoRA-A's output over a text's tokens, last layer, `{card.encoder_module}`"
    if card.readout == "mean":
        return "mean of the last hidden states over a text's tokens"
    return f"last hidden state at {'the prompt' if card.mode == 'alone' else 'a text'}'s last token"


def model_card(config: RunConfig, card: AdapterCard, metrics: dict | None) -> str:
    """README.md of the adapter and description of the registered version."""
    tables, loss = tables_by_split(metrics), config.loss
    how, weights = "with LoRA", "its weights are not included"
    if card.tuning == "full":
        how, weights = "tuned as a whole", "all of the tuned weights are in this folder; it needs no base"
    answers = "p(match) is the answer to a prompt with both texts"
    if card.mode == "alone":
        directions = "in both directions" if card.bidirectional else "causally"
        answers = f"each text is encoded alone, {directions}; p(match) = (1 + cosine of the two read-outs) / 2"
    return "\n".join(
        [
            "---",
            f"base_model: {card.base_model}",
            f"library_name: {'transformers' if card.tuning == 'full' else 'peft'}",
            "pipeline_tag: text-classification",
            "---",
            f"# {config.name}",
            "",
            f"Decides whether two texts match: p(match) from a causal language model {how}, trained by flipped "
            "knowledge distillation (FlipKD, arXiv 2507.05617) with `flipkd_dist`.",
            "",
            f"- base: `{card.base_model}`, fingerprint `{card.base_fingerprint}` ({weights})",
            f"- teacher in training: {_teacher_name(config.teacher)}; not needed for prediction",
            *([f"- trained on {card.four_bits}: on the original weights it answers differently"] * card.load_in_4bit),
            f"- {answers}",
            f"- read-out: {_readout(card)}; step {card.step}",
            f"- decision threshold of p(match): {card.threshold:.4f}; at most {card.max_length} tokens",
            f"- losses: sup {loss.sup_weight}, dist {loss.dist_weight}, {loss.contrastive} {loss.mcl_weight}",
            "",
            "```",
            format_table(tables) if tables else "not evaluated",
            "```",
            "",
        ]
    )


def register(
    config: RunConfig,
    run_id: str,
    adapter: Path,
    example: list[tuple[str, str]],
    tags: dict[str, str] | None = None,
    key: str | None = None,
) -> tuple[str, str]:
    """Log and register the adapter, load the registered version back, compare, and only then move the alias.

    Args:
        example: a few pairs, kept as the input example and compared.
        tags: of the version.
        key: a hash of what the version is made of; one that was made of the same before is taken again.
    Returns:
        Name and version of the registered model.
    Raises:
        RuntimeError: the registered version predicts something else; the alias stays where it was.
    """
    card = AdapterCard.read(adapter)
    text = model_card(config, card, read_json(config.run_dir / "metrics.json"))
    write_whole(adapter / "README.md", text)
    name = model_name(config)
    (expected, similarity), streamed = _answers(adapter, example)
    code = Path(__file__).with_name("pyfunc_model.py")
    outputs = {"p_match": expected, "similarity": similarity, "match": expected >= card.threshold}
    settings = {"base_model": card.base_model, "streamed": False}  # where it is loaded, there is room for the base
    if card.tuning == "full":
        settings, size = {"streamed": False}, sum(path.stat().st_size for path in adapter.iterdir())
        logger.warning(
            "warning: %.2f GB go into the registry: with student.tuning: full it is the whole model", size / 1e9
        )
    before = _version_before(config, key, name)
    version = before or log_pyfunc(
        config, run_id, name, code, adapter, example, outputs, settings, {"streamed": streamed}
    )
    _note_version(config, key, version)  # at once: whoever is killed now makes no second one
    found = load_registered(config, f"models:/{name}/{version}", example, {"streamed": streamed})
    worst = float(np.max(np.abs(found - expected)))
    if not worst <= TOLERANCE:
        _note_version(config, None, version)
        raise RuntimeError(f"version {version} of {name} predicts p(match) off by {worst:.2g}: alias not moved")
    point_alias(config, name, version, text, tags or {})
    logger.info(
        "registered before as %s version %s: now @%s; loaded back, p(match) within %.1g"
        if before
        else "registered %s version %s as @%s; loaded back, p(match) within %.1g",
        name,
        version,
        config.tracking.alias,
        worst,
    )
    return name, version


def _answers(adapter: Path, example: list[tuple[str, str]]) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    """p(match) and similarities of the example, and whether the base was streamed; no model stays in memory.

    A run ends here on a machine that may have neither a GPU nor room for the base.
    """
    try:
        return Matcher(adapter, streamed=True).predict(example), True
    except UserError as error:  # a base that cannot be streamed; anything else is raised again by the other way
        logger.info("register: the base cannot be streamed (%s): it is loaded whole", error)
    answers = Matcher(adapter).predict(example)
    gc.collect()  # or the registered version's base would lie beside it
    return answers, False


def _note_version(config: RunConfig, key: str | None, version: str) -> None:
    """Remember the version that was made of what the hash `key` stands for."""
    path = config.run_dir / RUN_FILE
    write_json(path, {**(read_json(path) or {}), "registered": {"key": key, "version": version}})


def _version_before(config: RunConfig, key: str | None, name: str) -> str | None:
    """The version that was made of the same adapter before, if there is one."""
    noted = (read_json(config.run_dir / RUN_FILE) or {}).get("registered", {})
    if key is None or noted.get("key") != key or not has_version(config, name, noted["version"]):
        return None
    return noted["version"]


def download_adapter(uri: str, model: str, target: str) -> Path:
    """The adapter folder of a registered `models:/NAME@ALIAS` or `models:/NAME/VERSION`, downloaded into `target`."""
    try:
        folder = download_model(uri, model, target)
    except Exception as error:
        reason, uri = without_credentials(" ".join(str(error).split()))[:200], without_credentials(uri)
        raise UserError(f"{model}: not found at {uri} ({reason}): set MLFLOW_TRACKING_URI or --tracking-uri") from None
    for path in Path(folder).rglob("flipkd.json"):
        return path.parent
    raise UserError(f"{model}: no adapter of flipkd in this registered model: name one that `flipkd register` made")
