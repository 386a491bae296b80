"""What the planner knows of a student: the sizes of its real modules, built on the meta device without weights."""

import re
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from flipkd_dist.base import attention_implementation, attention_targets, check_base, check_parts, check_positions
from flipkd_dist.base_loader import check_packable
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import one_line, resolve_config
from flipkd_dist.teacher import teacher_hidden_size
from flipkd_dist.teacher_source import largest_hidden_size

IN_LAYER = re.compile(r"\.\d+\.")
# Projections whose input is not the layer's own, in the families that transformers has.
BEHIND_ATTENTION = (
    "o_proj", "out_proj", "c_proj", "dense", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "fc1", "fc2",
    "dense_h_to_4h", "dense_4h_to_h",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A projection with LoRA."""

    inputs: int
    outputs: int
    reads_hidden: bool  # its input is the layer's (q, k, v), so that nothing before it needs a gradient in layer 1


@dataclass(frozen=True)
class Shape:
    """Sizes of a student; counts are numbers of weights, widths numbers per token and layer."""

    model_type: str
    num_layers: int
    hidden: int
    num_heads: int
    query_width: int
    key_width: int
    intermediate: int
    gated: bool
    eager: bool
    sdpa_repeats_keys: bool  # under a mask transformers repeats grouped keys and values for every query head
    linear: int  # frozen matrices of linear layers in decoder layers, all layers
    largest_linear: int
    embedding: int
    output_matrix: int  # 0 where it is the embedding
    others: dict[int, int] = field(default_factory=dict)  # size -> how many: norms, biases and whatever else there is
    norm_width: int = 0  # inputs of a layer's norms
    norm_in_fp32: bool = True
    rotary_width: int = 0  # angles that every layer keeps for itself; 0: one set for all
    copies_attention: bool = False  # the attention's output is laid out anew before the output projection
    lora_r: int = 0
    targets: tuple[Target, ...] = ()  # of one layer

    @property
    def other(self) -> int:
        return sum(size * count for size, count in self.others.items())

    @property
    def kept(self) -> int:
        """Frozen weights that stay: of an output matrix of its own there remain two rows, not counted here."""
        return self.linear + self.embedding + self.other

    @property
    def lora_sizes(self) -> list[int]:
        """Of one layer's LoRA tensors."""
        return [size for one in self.targets for size in (self.lora_r * one.inputs, one.outputs * self.lora_r)]

    @property
    def lora(self) -> int:
        return self.num_layers * sum(self.lora_sizes)

    @property
    def largest_lora(self) -> int:
        return max(self.lora_sizes)


def student_shape(config: RunConfig) -> Shape:
    """The shape of the configured student, from the `config.json` of student and teacher alone.

    Raises:
        UserError: a base that cannot be a student, or targets that it lacks.
    """
    settings = config.student
    if settings.tuning == "full":
        raise UserError(
            "student.tuning: full: memory and traffic are known for LoRA alone: try one step of the run "
            "(train.max_steps=1), or set it to lora to plan that"
        )
    folder = resolve_config(settings.model_name_or_path, "student.model_name_or_path")
    rank = settings.lora_r
    if rank is None:
        # A bi-encoder's size goes before a cross-encoder's, as in `preflight.Inputs.lora_rank`.
        key = "model_name_or_path" if config.teacher.model_name_or_path is not None else "cross_encoder"
        if getattr(config.teacher, key) is None:
            raise UserError("student.lora_r and teacher.model_name_or_path are both missing: name one of them")
        if key == "model_name_or_path":
            rank = largest_hidden_size(config)
        else:
            rank = teacher_hidden_size(resolve_config(config.teacher.cross_encoder, "teacher.cross_encoder"))
    check_positions(check_base(folder, settings), config.data.max_length)
    return shape_of(folder, settings, rank)


def shape_of(folder: Path, settings, rank: int) -> Shape:
    """Counts the modules of the model that `folder/config.json` describes, with LoRA of `rank` on it."""
    base_config = check_base(folder, settings)
    name = settings.model_name_or_path
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        try:
            attention = attention_implementation(settings)
            model = AutoModelForCausalLM.from_config(deepcopy(base_config), attn_implementation=attention)
        except UserError:
            raise
        except Exception as error:  # transformers raises nearly anything here
            raise UserError(
                f"student.model_name_or_path: {name}: config.json cannot be used ({one_line(error)}): take another"
            ) from None
        check_parts(model, name)
        if settings.load_in_4bit:
            check_packable(model, name)
        frozen = _count_frozen(model, base_config)
        targets = settings.lora_target_modules or attention_targets(model)
        try:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
        except ValueError as error:
            raise UserError(
                f"student.lora_target_modules: {targets} do not fit ({one_line(error)}): name linear layers"
            ) from None
    found = [(name, one) for name, one in model.named_modules() if isinstance(one, LoraLayer)]
    per_layer = found[: max(1, len(found) // base_config.num_hidden_layers)]
    lora = tuple(
        Target(one.in_features, one.out_features, name.rsplit(".", 1)[-1] not in BEHIND_ATTENTION)
        for name, one in per_layer
    )
    return Shape(**frozen, eager=attention == "eager", lora_r=rank, targets=lora)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _count_frozen(model: nn.Module, config) -> dict:
    """The fields of Shape that do not depend on LoRA."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    matrices = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and IN_LAYER.search(f"{name}.")
    }
    counted = {id(module.weight) for module in matrices.values()} | {id(embedding), id(head.weight)}
    sizes = {name: module.weight.numel() for name, module in matrices.items()}
    first = re.escape(min(matrices, key=len).split(".0.")[0])
    in_first = {name.split(".0.", 1)[1]: m for name, m in matrices.items() if re.match(rf"{first}\.0\.", name)}
    norms = [
        module
        for name, module in model.named_modules()
        if re.match(rf"{first}\.0\.", name) and "norm" in type(module).__name__.lower() and hasattr(module, "weight")
    ]
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    head_norms = [norm for norm in norms if norm.weight.numel() == head_dim != hidden]
    widths = (len(norms) - len(head_norms)) * hidden
    if head_norms:  # of every query head and of every key head
        widths += heads * head_dim + key_width
    intermediate, gated = _mlp(in_first, config)
    partial = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    interleaved = config.model_type in ("glm", "glm4")  # they stretch the angles in every layer anew
    return dict(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden=hidden,
        num_heads=heads,
        query_width=heads * head_dim,
        key_width=key_width,
        intermediate=intermediate,
        gated=gated,
        sdpa_repeats_keys=key_width < heads * head_dim,
        linear=sum(sizes.values()),
        largest_linear=max(sizes.values()),
        embedding=embedding.numel(),
        output_matrix=0 if head.weight is embedding else head.weight.numel(),
        others=dict(Counter(p.numel() for p in model.parameters() if id(p) not in counted)),
        norm_width=widths,
        norm_in_fp32=any("rms" in type(norm).__name__.lower() for norm in norms),
        rotary_width=2 * int(head_dim * partial) if interleaved else 0,
        copies_attention=interleaved,  # concatenated queries are laid out by heads, and the output as they are
    )


def _mlp(in_first: dict[str, nn.Module], config) -> tuple[int, bool]:
    """Width of the MLP's inner state and whether a gate multiplies it, from the first layer's matrices."""
    fused_gate = any("gate_up" in name for name in in_first)
    gated = fused_gate or any("gate" in name.rsplit(".", 1)[-1] for name in in_first)
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size, gated
