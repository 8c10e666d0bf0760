"""All blocks of a block-diffusion drafter, many at once.

Blocks that begin at different positions go through one forward side by side: each sees the target's features before
its own anchor, and itself, which is the mask of drafter training. The context's keys and values are computed once.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.blocks import block_attention_mask
from bpkit.trace.collect.drafting import Drafts, Finished
from bpkit.trace.collect.pieces import pieces, positions_at_once
from bpkit.trace.collect.reader import Drafted

NOISE_POSITIONS = 256
"""Block positions in one forward. Blocks see each other's places as masked keys, so that more is not cheaper."""


def trace_blocks(drafter: BlockDiffusionDrafter, finished: Finished) -> Drafts:
    """Draft from every position with every block size; equal to the live drafter's blocks up to rounding."""
    drafts = Drafts(finished)
    if finished.rows == 0:
        return drafts
    cache = DynamicCache()
    _read_context(drafter, finished, cache)
    for column, block_size in enumerate(finished.block_sizes):
        count = max(1, NOISE_POSITIONS // block_size)
        for first in range(0, finished.rows, count):
            rows = torch.arange(first, min(first + count, finished.rows), device=finished.ids.device)
            hidden = _denoised(drafter, finished, cache, rows, block_size)
            drafted = _read(drafter, finished, hidden, rows)
            drafts.put(rows.cpu(), column, drafted, hidden.flatten(0, 1) if finished.keep_hidden else None)
    return drafts


def _read_context(drafter: BlockDiffusionDrafter, finished: Finished, cache: DynamicCache) -> None:
    """Put keys and values of all features into the cache."""
    assert finished.features is not None
    nothing = drafter.embed(finished.ids[:, :1])
    drafter.model(noise_embeds=nothing, context_hidden_states=finished.features, past_key_values=cache)
    cache.crop(-1)  # the block of one that the model insists on


def _denoised(
    drafter: BlockDiffusionDrafter, finished: Finished, cache: DynamicCache, rows: Tensor, block_size: int
) -> Tensor:
    """Hidden states of the masks of each row's block: [rows, block_size - 1, hidden]."""
    context = finished.ids.shape[1] - 1
    anchors = finished.prompt_length + rows  # absolute positions
    places = (anchors[:, None] + torch.arange(block_size, device=rows.device)).flatten()[None]
    tokens = torch.full((len(rows), block_size), drafter.model.config.mask_token_id, device=rows.device)
    tokens[:, 0] = finished.ids[0, anchors]
    assert finished.features is not None
    hidden: Tensor = drafter.model(
        noise_embeds=drafter.embed(tokens.flatten()[None]),
        context_hidden_states=finished.features[:, :0],
        position_ids=places,
        attention_mask=block_attention_mask(anchors[None], block_size, context),
        past_key_values=cache,
    ).last_hidden_state
    cache.crop(-len(rows) * block_size)
    return hidden.view(len(rows), block_size, -1)[:, 1:]


def _read(drafter: BlockDiffusionDrafter, finished: Finished, hidden: Tensor, rows: Tensor) -> Drafted:
    """Draw the tokens of blocks: states are [rows, length, hidden]; returns [rows * length], draft after draft."""
    length, reader = hidden.shape[1], finished.reader
    index = rows[:, None] + torch.arange(1, length + 1, device=rows.device)  # int64 [rows, length]
    if reader.processors.prefix_free:
        states = hidden.flatten(0, 1)
        return reader.read(lambda piece: drafter.score(states[piece]), index.flatten(), lambda i: finished.ids)
    parts = [
        _place_after_place(finished, drafter.score(hidden[piece]), rows[piece], index[piece])
        for piece in pieces(len(rows), max(1, positions_at_once(reader.vocab_size) // length))
    ]
    return Drafted.joined(parts)


def _place_after_place(finished: Finished, logits: Tensor, rows: Tensor, index: Tensor) -> Drafted:
    """The same for processors that may look at the tokens drafted before in the same block.

    Args:
        logits: [rows, length, vocab].
        index: output positions that they stand for, int64 [rows, length].
    """
    drawn = rows.new_empty((len(rows), 0))
    places: list[Drafted] = []
    for k in range(logits.shape[1]):
        prefix = partial(_prefix, finished, rows, drawn)
        places.append(finished.reader.read(logits[:, k].__getitem__, index[:, k], prefix))
        drawn = torch.cat([drawn, places[-1].tokens[:, None]], dim=1)
    return Drafted.joined(places).rearranged(logits.shape[1])


def _prefix(finished: Finished, rows: Tensor, drawn: Tensor, i: int) -> Tensor:
    """Tokens before the one that row `rows[i]` draws next: int64 [1, length]."""
    return torch.cat([finished.before(int(rows[i])), drawn[i : i + 1]], dim=1)
