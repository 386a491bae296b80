"""A causal base that reads in both directions, and how to find one that will not."""

from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flipkd_dist.base import attention_implementation
from flipkd_dist.base_loader import empty_model
from flipkd_dist.config import StudentConfig
from flipkd_dist.errors import UserError


def read_both_ways(model: nn.Module) -> None:
    """Let every token see those behind it: in masks that transformers makes, and in sdpa where there is none.

    Some classes hand the configuration's word on to their attention, some ask the attention itself.
    """
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


@torch.no_grad()
def check_both_ways(config: PreTrainedConfig, settings: StudentConfig) -> None:
    """Refuse a base whose attention stays causal after `read_both_ways`: a second token must move a first one.

    Raises:
        UserError
    """
    if not settings.bidirectional:
        return
    name, random = settings.model_name_or_path, torch.Generator().manual_seed(0)
    model = empty_model(deepcopy(config), attention_implementation(settings), torch.float32, name)
    _make_up_first_layer(model, random)
    read_both_ways(model)
    first, *others = torch.randn(3, 1, model.get_input_embeddings().embedding_dim, generator=random)
    rows = torch.stack([torch.cat([first, other]) for other in others])  # [2, 2, width], unlike in their last tokens
    places = torch.arange(2).expand(2, 2)
    moved = model.base_model(inputs_embeds=rows, position_ids=places, use_cache=False).last_hidden_state[:, 0]
    if torch.allclose(*moved, rtol=0, atol=1e-5):
        raise UserError(
            f"student.bidirectional: {name} ({config.model_type}) reads causally whatever it is told: set it to false "
            "or take another base"
        )


def _make_up_first_layer(model: PreTrainedModel, random: torch.Generator) -> None:
    """Cut an empty model to its first layer, with weights that take no memory: entry [i, j] depends on i + j."""
    body, count = model.base_model, model.config.num_hidden_layers
    lists = [path for path, one in body.named_modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    if lists:
        body.set_submodule(lists[0], body.get_submodule(lists[0])[:1])
    for path, old in list(body.named_parameters()):
        if old.dim() > 1:
            values = 0.1 * torch.randn(sum(old.shape), generator=random)
            values = values.as_strided(old.shape, [1] * old.dim())
        else:
            values = torch.ones(old.shape)
        owner, _, attribute = path.rpartition(".")
        setattr(body.get_submodule(owner), attribute, nn.Parameter(values, requires_grad=False))
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the others want weights that lie in memory as they are read
