"""The base of the student: whether it can be one, its tokenizer, its attention projections, two rows of its output."""

import inspect
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError
from flipkd_dist.glm_original import GlmOriginalConfig  # its import registers the classes with transformers
from flipkd_dist.glm_original_config import is_published_glm
from flipkd_dist.glm_tokenizer import has_published_tokenizer, load_published_tokenizer
from flipkd_dist.model_files import one_line
from flipkd_dist.weight_files import Weights, stored_name

FUSED_PROJECTIONS = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")
SPLIT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TESTED_ATTENTION = ("sdpa", "eager")
# Settings that change the logits beyond a product with the output matrix.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")


def check_base(folder: Path, settings: StudentConfig):
    """The base's configuration, or a UserError that says why it cannot be a student; loads no weights."""
    name = settings.model_name_or_path
    try:
        config = _read_config(folder)
    except Exception as error:  # transformers raises nearly anything here
        if "trust_remote_code" in str(error):
            raise UserError(
                f"student.model_name_or_path: {name} brings its own code (trust_remote_code), which is never run: take "
                "its edition for transformers' own classes, often named -hf"
            ) from None
        raise UserError(
            f"student.model_name_or_path: {name}: config.json cannot be used ({one_line(error)}): take another"
        ) from None
    text_only = config.get_text_config() is config
    if not text_only or config.is_encoder_decoder or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(
            f"student.model_name_or_path: {name} ({config.model_type}) is not a causal LM of text: take one"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"student.model_name_or_path: {name} is quantised already: take the original weights, and "
            "student.load_in_4bit to train on four bits"
        )
    if settings.tuning == "full" and fills_blank(config):
        raise UserError(
            f"student.tuning: {name} is an original GLM: transformers has no class for it, so nothing would open the "
            "folder of its tuned weights: take lora"
        )
    for key in LOGIT_TRANSFORMS:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"student.model_name_or_path: {name} sets {key}, which two-row logits leave out: take another"
            )
    return config


def _read_config(folder: Path) -> PreTrainedConfig:
    values, _ = PreTrainedConfig.get_config_dict(folder)
    if is_published_glm(values):
        return GlmOriginalConfig.from_dict({**values, "name_or_path": str(folder)})
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def fills_blank(config: PreTrainedConfig) -> bool:
    """Whether the base reads prompt and texts in both directions and answers in a blank behind them: docs/glm.md."""
    return isinstance(config, GlmOriginalConfig)


def attention_implementation(settings: StudentConfig) -> str:
    """sdpa unless named; eager takes one pair a row, and others are refused."""
    if settings.attn_implementation == "auto":
        return "sdpa"
    if settings.attn_implementation not in TESTED_ATTENTION:
        raise UserError(
            f"student.attn_implementation: {settings.attn_implementation} is not "
            f"supported: take one of auto, {', '.join(TESTED_ATTENTION)}"
        )
    return settings.attn_implementation


def check_parts(model: nn.Module, name: str) -> None:
    """Two-row logits and shared rows need a body that takes positions, and nothing behind it but the output matrix."""
    known = {model.base_model, model.get_output_embeddings()}
    if set(model.children()) - known or "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise UserError(
            f"student.model_name_or_path: {name} ({type(model).__name__}) takes no position_ids or has layers between "
            "its body and its output matrix: take another"
        )


def check_positions(base_config: PreTrainedConfig, max_length: int) -> None:
    """A learnt table of positions ends; rotary ones beyond those of the pretraining are no better."""
    positions = getattr(base_config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length: {max_length} tokens, but the student's base has {positions} positions: lower it"
        )


def shares_prefix(config, max_length: int) -> bool:
    """Whether packed rows are exact: causal attention alone, no biases by distance in the row, no window that cuts."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    other_layers = set(kinds) - {"full_attention", "sliding_attention", "attention"}
    if other_layers or getattr(config, "alibi", False) or fills_blank(config):
        return False
    window = getattr(config, "sliding_window", None)
    uses_window = getattr(config, "use_sliding_window", window is not None)
    return not (uses_window and window and window < max_length)


def check_mode(config: PreTrainedConfig, settings: StudentConfig, max_length: int) -> None:
    """Refuse texts alone where the base reads them as nothing else does, and both directions where it cannot."""
    name = settings.model_name_or_path
    if settings.mode == "alone" and fills_blank(config):
        raise UserError(
            f"student.mode: alone is not supported for {name}, an original GLM, which fills blanks: set it to pair"
        )
    if settings.bidirectional and not shares_prefix(config, max_length):
        raise UserError(
            f"student.bidirectional: {name} has layers without full attention over data.max_length {max_length}: set "
            "it to false or take another base"
        )


def load_tokenizer(folder: Path, key: str = "student.model_name_or_path"):
    if has_published_tokenizer(folder):
        return load_published_tokenizer(folder, key)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise nearly anything here
        raise UserError(
            f"{key}: the tokenizer in {folder} cannot be loaded ({one_line(error)}): save it beside the weights"
        ) from None


def attention_targets(model: nn.Module) -> list[str]:
    """The attention projections that get LoRA: the fused one, or q, k, v and o."""
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for fused in FUSED_PROJECTIONS:
        if fused in leaves:
            return [fused]
    if set(SPLIT_PROJECTIONS) <= leaves:
        return list(SPLIT_PROJECTIONS)
    raise UserError(
        f"student.lora_target_modules: neither {', '.join(SPLIT_PROJECTIONS)} nor a fused projection found in "
        f"{type(model).__name__}: name the attention's modules"
    )


def output_rows(model: nn.Module, weights: Weights, rows: list[int], name: str) -> tuple[Tensor, Tensor | None]:
    """Rows [2, hidden] and bias [2] of the output matrix, read from the files: its parameter may be partitioned."""
    matrix, bias = output_names(model, weights, name)
    return weights.rows(matrix, rows), None if bias is None else weights.rows(bias, rows)


def output_names(model: nn.Module, weights: Weights, name: str) -> tuple[str, str | None]:
    """What the files call the output matrix, which may be the embedding, and its bias if there is one."""
    head = model.get_output_embeddings()
    # A tied matrix has several names, of which the files hold one.
    names = [name for name, value in model.named_parameters(remove_duplicate=False) if value is head.weight]
    if model.config.tie_word_embeddings:
        names += [f"{path}.weight" for path, module in model.named_modules() if module is model.get_input_embeddings()]
    head_name = output_module(model)
    # Some files keep a name of old (GPT-NeoX), which transformers maps.
    names += ["embed_out.weight"] if head_name == "lm_head" else []
    stored = stored_name(weights, names, model.base_model_prefix)
    if stored is None:
        raise UserError(f"student.model_name_or_path: {name} has no tensor {' or '.join(names)}: not supported")
    return stored, None if getattr(head, "bias", None) is None else f"{head_name}.bias"


def output_module(model: nn.Module) -> str:
    """The name of the module that holds the output matrix."""
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def drop_output_matrix(model: nn.Module) -> None:
    """Free the output matrix, of which two rows are all that is multiplied; `logits` are the hidden states then."""
    model.set_submodule(output_module(model), nn.Identity())
