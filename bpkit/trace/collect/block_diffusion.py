"""All blocks of a block-diffusion drafter, many at once.

Blocks that begin at different positions go through one forward side by side: each sees the target's features before
its own anchor, and itself, which is the mask of drafter training. The context's keys and values are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import block_attention_mask
from bpkit.trace.collect.drafts import Drafts, Finished
from bpkit.trace.collect.pieces import pieces

NOISE_POSITIONS = 256
"""Block positions in one forward. Blocks see each other's places as masked keys, so that more is not cheaper."""


def trace_blocks(drafter: BlockDiffusionDrafter, finished: Finished) -> Drafts:
    """Draft from every position with every block size; equal to the live drafter's blocks up to rounding."""
    drafts, cache = Drafts(finished), DynamicCache()
    assert finished.features is not None
    anchor = drafter.embed(finished.ids[:, :1])  # the model insists on a block of at least one
    drafter.model(noise_embeds=anchor, context_hidden_states=finished.features, past_key_values=cache)
    cache.crop(-1)
    for column, block_size in enumerate(finished.block_sizes):
        length = block_size - 1
        for rows in pieces(finished.rows, max(1, NOISE_POSITIONS // block_size)):
            hidden = _denoised(drafter, finished, cache, rows, block_size)
            for places in pieces(length, length if finished.processors.prefix_free else 1):
                states = hidden[:, places].flatten(0, 1)
                drafts.draw((rows, slice(column, column + 1), places), drafter.score, states, states)
    return drafts


def _denoised(
    drafter: BlockDiffusionDrafter, finished: Finished, cache: DynamicCache, rows: slice, block_size: int
) -> Tensor:
    """Hidden states of the masks of each row's block: [rows, block_size - 1, hidden]."""
    device, context, count = finished.ids.device, finished.ids.shape[1] - 1, rows.stop - rows.start
    anchors = finished.prompt_length + torch.arange(rows.start, rows.stop, device=device)  # absolute positions
    tokens = torch.full((count, block_size), drafter.model.config.mask_token_id, device=device)
    tokens[:, 0] = finished.ids[0, anchors]
    assert finished.features is not None
    hidden: Tensor = drafter.model(
        noise_embeds=drafter.embed(tokens.flatten()[None]),
        context_hidden_states=finished.features[:, :0],
        position_ids=(anchors[:, None] + torch.arange(block_size, device=device)).flatten()[None],
        attention_mask=block_attention_mask(anchors[None], block_size, context),
        past_key_values=cache,
    ).last_hidden_state
    cache.crop(-count * block_size)
    return hidden.view(count, block_size, -1)[:, 1:]
