"""Several blocks of a block-diffusion drafter side by side: what each may see. Training and traces use it."""

from __future__ import annotations

import torch
from torch import Tensor


def block_attention_mask(anchors: Tensor, block_size: int, context: int) -> Tensor:
    """Which keys each block position sees: context before its anchor, and its own block.

    Args:
        anchors: int64 [batch, blocks].

    Returns:
        bool [batch, 1, blocks * block_size, context + blocks * block_size].
    """
    batch, blocks = anchors.shape
    anchor = anchors.repeat_interleave(block_size, dim=1)
    before = torch.arange(context, device=anchors.device) < anchor[..., None]
    owner = torch.arange(blocks, device=anchors.device).repeat_interleave(block_size)
    same = (owner[:, None] == owner).expand(batch, -1, -1)
    return torch.cat([before, same], dim=-1)[:, None]
