"""Grouped-query attention without copies, for verifying several tokens at once on a CPU.

transformers' `sdpa` repeats keys and values for every query group whenever there is a mask, which on a CPU costs a
copy of the whole cache in every layer of every verify. torch's own kernel takes the groups as they are. A single
query keeps transformers' way, which packs it without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "bpkit_sdpa"


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
    if query.shape[2] == 1 or attention_mask is None or query.shape[1] == key.shape[1]:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return output
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2), None


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Switch a CPU model that runs `sdpa` to `grouped_sdpa`; leave any other as it is."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
