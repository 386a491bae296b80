"""Attention over a row that holds several pairs: rearranged into one path a pair, plain causal attention there.

Linear layers see every token once. Only here are queries, keys and values laid out as if each pair stood alone, without
a mask, so the fastest causal kernel applies; a shared token's output is taken from one of its paths, where it is the
same in all. Paths that are read in both directions share no token, and have a mask where one ends before another. The
idea of rearranging inside attention alone: Prefix Grouper, arXiv 2506.05433.

Shapes: N tokens of the row, H heads of width D, p paths of at most L tokens.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flipkd_dist.errors import UserError

SHARED = "flipkd_shared"  # its name among transformers' attention implementations


def row_of_paths(device: torch.device) -> Tensor:
    """A mask [1, 1, 1, 1] for the body, which hands it on as it is: that tokens of the row see their paths alone."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    paths: tuple[Tensor, ...] = (),
    places: Tensor | None = None,
    path_masks: tuple[Tensor, ...] = (),
    **settings,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [1, heads, N, D] in, [1, N, H, D] out; without paths plain sdpa.

    Args:
        paths, places, path_masks: of a `PackedBatch`.
    Raises:
        UserError: a model that loses the paths on their way here.
    """
    if not paths:
        if attention_mask is not None and attention_mask.numel() == 1 < query.shape[2]:
            raise UserError(
                f"student.attn_implementation: {type(module).__name__} does not hand the paths of packed pairs on to "
                "its attention: set it to eager"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # [N, heads, D], values of their own D
    found = []
    for path, mask in zip(paths, path_masks or [None] * len(paths), strict=True):
        laid_out = (  # [p, heads, L, D]
            states.flatten(1).index_select(0, path.flatten()).view(*path.shape, *states.shape[1:]).transpose(1, 2)
            for states in rows
        )
        output, _ = sdpa_attention_forward(module, *laid_out, mask, **settings)
        found.append(output.flatten(0, 1))  # [p * L, H, D]
    return torch.cat(found).index_select(0, places).unsqueeze(0), None


AttentionInterface.register(SHARED, shared_attention)
AttentionMaskInterface.register(SHARED, sdpa_mask)  # for padded batches
