"""The folder of a student all of whose weights were tuned: plain transformers opens it and answers the same."""

import re
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from flipkd_dist.base import output_module, output_names
from flipkd_dist.student import ANSWERS
from flipkd_dist.weight_files import WeightFiles, Weights, stored_name

SHARD = "5GB"  # the most of one file


def write_tuned(
    folder: Path,
    base_config: PreTrainedConfig,
    state: dict[str, Tensor],
    answers: list[int],
    base: Weights,
    bidirectional: bool = False,
) -> None:
    """Write weights and config.json.

    The output matrix is the base's with the trained rows in place of the two answers', a matrix of its own even where
    the base has only its embedding.

    Args:
        state: whole trained tensors by the student's names; all are written in the type of the first one.
        answers: token ids of the matching and the other answer.
        base: the base's tensors.
        bidirectional: whether tokens see those behind them, which `is_causal` of config.json then says.
    """
    from huggingface_hub import save_torch_state_dict

    config, model = deepcopy(base_config), _empty(base_config)
    config.tie_word_embeddings, config.dtype = False, next(iter(state.values())).dtype
    config.architectures = [type(model).__name__]
    if bidirectional:
        config.is_causal = False
    weights = {name: value for name, value in state.items() if name not in ANSWERS}
    stored, head = output_names(model, base, str(folder)), output_module(model)
    for name, source, own in zip(("weight", "bias"), stored, ANSWERS, strict=True):
        if source is not None:
            matrix = base.read(source).to(config.dtype, copy=True)
            if own in state:
                matrix[answers] = state[own]
            weights[f"{head}.{name}"] = matrix
    save_torch_state_dict(weights, folder, max_shard_size=SHARD)
    config.save_pretrained(folder)


def verify_tuned(folder: Path, base_config: PreTrainedConfig, base: Weights) -> None:
    """Reopen the weights: all tensors of the model with their shapes, finite, and something of each layer moved.

    Raises:
        RuntimeError: one line that says what is wrong.
    """
    model, written, moved = _empty(base_config, tied=False), WeightFiles(folder), {}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if name := min(shapes.keys() ^ written.files.keys(), default=None):
        raise RuntimeError(f"{folder}: {name} is missing or unexpected: nothing was exported")
    for name, shape in shapes.items():
        value = written.read(name)
        if value.shape != shape:
            raise RuntimeError(
                f"{folder}: {name} has shape {list(value.shape)}, not {list(shape)}: nothing was exported"
            )
        if not torch.isfinite(value).all():
            raise RuntimeError(f"{folder}: {name} is not finite: lower train.learning_rate")
        before = stored_name(base, [name], model.base_model_prefix)
        layer = re.search(r"\.(\d+)\.", name)
        if layer and before:  # a base may store a layer under other names, which transformers maps
            number = int(layer.group(1))
            moved[number] = moved.get(number, False) or not torch.equal(value, base.read(before).to(value.dtype))
    if still := [number for number, has_moved in moved.items() if not has_moved]:
        raise RuntimeError(
            f"{folder}: layer {min(still)} is the base's own, nothing was learnt there: train longer, or raise "
            "train.learning_rate"
        )


def _empty(config: PreTrainedConfig, tied: bool | None = None) -> nn.Module:
    """The model of a configuration without weights."""
    config = deepcopy(config)
    if tied is not None:
        config.tie_word_embeddings = tied
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
