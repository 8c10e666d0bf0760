"""All blocks of a block-diffusion drafter, many at once, of several outputs.

Blocks of one size that begin at different positions go through one forward side by side: each sees the target's
features before its own anchor, and itself, which is the mask of drafter training. The context's keys and values are
computed once. Attention is computed in two parts, over the context and within each block, so that no block pays for
the places of its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import rotate_half

from bpkit.decode.products import product
from bpkit.draft.block_diffusion import BlockDiffusionDrafter
from bpkit.draft.dflash_model import DFlashAttention
from bpkit.trace.collect.drafts import Drafts, Finished
from bpkit.trace.collect.pieces import pieces

BLOCK_POSITIONS = 512
"""Block positions in one forward: enough to keep the matrix products busy, few enough to stay in the cache."""

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Segment:
    """Some rows of one of the outputs."""

    output: int
    rows: slice

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)


def trace_blocks(drafter: BlockDiffusionDrafter, finished: Sequence[Finished]) -> list[Drafts]:
    """Draft from every position with every block size; equal to the live drafter's blocks up to rounding.

    Args:
        finished: outputs with the same block sizes.
    """
    drafts = [Drafts(one) for one in finished]
    blocks = Blocks(drafter, finished)
    for column, block_size in enumerate(finished[0].block_sizes):
        length = block_size - 1
        for segments in segmented([one.rows for one in finished], max(1, BLOCK_POSITIONS // block_size)):
            hidden = blocks.denoised(segments, block_size)
            for segment, states in zip(segments, split(hidden, segments), strict=True):
                one = drafts[segment.output]
                for places in pieces(length, length if one.finished.processors.prefix_free else 1):
                    values = states[:, places].flatten(0, 1)
                    one.draw((segment.rows, slice(column, column + 1), places), drafter.score, values, values)
    return drafts


def segmented(rows: Sequence[int], at_once: int) -> Iterator[list[Segment]]:
    """Cover so many rows of each output, `at_once` rows at a time, in order.

    >>> [[(s.output, s.rows.start, s.rows.stop) for s in part] for part in segmented([3, 2], 4)]
    [[(0, 0, 3), (1, 0, 1)], [(1, 1, 2)]]
    """
    part: list[Segment] = []
    for output, count in enumerate(rows):
        first = 0
        while first < count:
            stop = min(count, first + at_once - sum(segment.count for segment in part))
            part.append(Segment(output, slice(first, stop)))
            first = stop
            if sum(segment.count for segment in part) == at_once:
                yield part
                part = []
    if part:
        yield part


def split(values: Tensor, segments: Sequence[Segment]) -> Sequence[Tensor]:
    """Rows of all segments, segment by segment."""
    return torch.split(values, [segment.count for segment in segments])


class Blocks:
    """A forward of the drafter over blocks of several outputs; their contexts are read when it is made."""

    def __init__(self, drafter: BlockDiffusionDrafter, finished: Sequence[Finished]) -> None:
        self.drafter, self.finished, self.model = drafter, finished, drafter.model
        self.context = [self._read(one.features) for one in finished]
        """Of each output and layer, keys and values [kv heads, length, dim]."""

    def _read(self, features: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        assert features is not None
        model = self.model
        place = model.hidden_norm.weight
        source = model.hidden_norm(model.fc(features.to(place)))
        rotary = model.rotary_emb(source, torch.arange(source.shape[1], device=place.device)[None])
        found = []
        for layer in model.layers:
            key, value = keys_and_values(layer.self_attn, source, rotary)
            found.append((key[0].transpose(0, 1).contiguous(), value[0].transpose(0, 1).contiguous()))
        return found

    def denoised(self, segments: Sequence[Segment], block_size: int) -> Tensor:
        """Hidden states of the masks of each row's block: [rows, block_size - 1, hidden]."""
        model = self.model
        anchors = torch.cat([self._anchors(segment) for segment in segments])
        tokens = torch.full(
            (len(anchors), block_size), model.config.mask_token_id, dtype=torch.long, device=anchors.device
        )
        tokens[:, 0] = torch.cat(
            [self.finished[s.output].ids[0, at] for s, at in zip(segments, split(anchors, segments), strict=True)]
        )
        hidden = self.drafter.embed(tokens).to(model.hidden_norm.weight)
        positions = anchors[:, None] + torch.arange(block_size, device=anchors.device)
        rotary = model.rotary_emb(hidden, positions.to(hidden.device))
        for index, layer in enumerate(model.layers):
            source = layer.input_layernorm(hidden)
            if index + 1 == len(model.layers):  # nobody asks for what the last layer makes of anchors
                hidden = hidden[:, 1:]
            query = queries(layer.self_attn, source[:, -hidden.shape[1] :], rotary)
            own = keys_and_values(layer.self_attn, source, rotary)
            seen = [
                attended(layer.self_attn, q, (k, v), self.context[segment.output][index], at)
                for segment, q, k, v, at in zip(
                    segments, *(split(part, segments) for part in (query, *own, anchors)), strict=True
                )
            ]
            hidden = hidden + layer.self_attn.o_proj(torch.cat(seen) if len(seen) > 1 else seen[0])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed: Tensor = model.norm(hidden)
        return normed

    def _anchors(self, segment: Segment) -> Tensor:
        """Absolute positions of the anchors, int64 [rows]."""
        one = self.finished[segment.output]
        return one.prompt_length + torch.arange(segment.rows.start, segment.rows.stop, device=one.ids.device)


def queries(attention: DFlashAttention, source: Tensor, rotary: Rotary) -> Tensor:
    """Of [rows, positions, hidden], the last ones that `rotary` is of: [rows, positions, heads, dim]."""
    count = source.shape[1]
    made = attention.q_norm(attention.q_proj(source).view(*source.shape[:2], -1, attention.head_dim))
    return rotated(made, (rotary[0][:, -count:], rotary[1][:, -count:]))


def keys_and_values(attention: DFlashAttention, source: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Of [rows, positions, hidden]: [rows, positions, kv heads, dim] each."""
    shape = (*source.shape[:2], -1, attention.head_dim)
    key = rotated(attention.k_norm(attention.k_proj(source).view(shape)), rotary)
    return key, attention.v_proj(source).view(shape)


def rotated(values: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of [rows, positions, heads, dim]."""
    cos, sin = (part[:, :, None] for part in rotary)
    turned: Tensor = values * cos + rotate_half(values) * sin
    return turned


def attended(
    attention: DFlashAttention,
    query: Tensor,
    own: tuple[Tensor, Tensor],
    context: tuple[Tensor, Tensor],
    anchors: Tensor,
) -> Tensor:
    """Attention of blocks to the context before their anchors and to themselves.

    Args:
        query: [rows, positions, heads, dim].
        own: keys and values of whole blocks, [rows, block, kv heads, dim] each.
        context: keys and values of one output, [kv heads, length, dim] each.
        anchors: absolute positions, int64 [rows], ascending.

    Returns:
        [rows, positions, heads * dim].
    """
    rows, positions, heads, dim = query.shape
    before = int(anchors[-1])  # nothing behind is seen by any
    keys, values = (part[:, :before] for part in context)
    own_keys, own_values = (part.permute(2, 0, 1, 3) for part in own)
    groups = len(keys)
    # [kv heads, rows, positions * heads of a group, dim]
    query = (query * attention.scaling).view(rows, positions, groups, -1, dim).permute(2, 0, 1, 3, 4)
    query = query.reshape(groups, rows, -1, dim)
    unseen = torch.arange(before, device=anchors.device) >= anchors[:, None]
    hiding = torch.zeros_like(unseen, dtype=query.dtype).masked_fill(unseen, float("-inf"))[:, None].to(query.device)
    scores = query.new_empty((*query.shape[:3], before + own_keys.shape[2]))
    for of_group, asking, asked in zip(scores, query, keys, strict=True):
        of_context = product(asking.flatten(0, 1), asked).view(rows, -1, before)
        torch.add(of_context, hiding, out=of_group[..., :before])
    scores[..., before:] = query @ own_keys.mT
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    seen = (weights[..., :before].flatten(1, 2) @ values).view(query.shape)
    seen += weights[..., before:] @ own_values
    return seen.view(groups, rows, positions, -1, dim).permute(1, 2, 0, 3, 4).reshape(rows, positions, heads * dim)
