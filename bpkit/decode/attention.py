"""Grouped-query attention without copies, for rows with masks on a CPU.

transformers' `sdpa` repeats keys and values for every query group whenever there is a mask and more than one query,
which on a CPU costs a copy of the whole cache in every layer of every verify. Here the queries of a group go beside
each other as if they were more positions, with the mask of a query repeated for its group, or torch's own kernel takes
the groups as they are, which is faster for many queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "bpkit_sdpa"
SPECIAL = ("position_bias", "softcap", "cache")
"""Options that `sdpa` of transformers takes into account, or refuses."""
FOLDED = 8
"""Queries of a row up to which they are folded; measured with 3 queries a group."""


def grouped_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query: [batch, heads, width, dim]; key, value: [batch, key/value heads, length, dim]."""
    (batch, heads, width, _), kept = query.shape, key.shape[1]
    # Without a mask, several queries are causal, which is for transformers to say.
    shared = width == 1 if attention_mask is None else attention_mask.shape[1] == 1
    if heads == kept or not shared or any(options.get(name) is not None for name in SPECIAL):
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return output
    attend = torch.nn.functional.scaled_dot_product_attention
    if width > FOLDED:
        attended = attend(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2), None
    groups = heads // kept
    if width > 1 and attention_mask is not None:
        attention_mask = attention_mask.expand(batch, groups, width, -1).reshape(batch, 1, groups * width, -1)
    folded = query.reshape(batch, kept, groups * width, -1)
    attended = attend(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(batch, heads, width, -1).transpose(1, 2), None


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Switch a CPU model that runs `sdpa` to `grouped_sdpa`; leave any other as it is."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
