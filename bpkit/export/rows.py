"""The rows of a trace as batches of contexts and drafts: every position of an output is one row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bpkit.trace.records import PromptTrace
from bpkit.types import OF_THE_DRAFT, Context, DecoderSpec, Draft, Feature

PREFILL = (Feature.PREFILL_HIDDEN, Feature.PREFILL_LOGITS)


def at_begin(prompts: Sequence[PromptTrace], spec: DecoderSpec, wants: frozenset[Feature]) -> Context:
    """The contexts of `begin`, a row for each prompt."""
    features = {
        name: _stacked([p.features[name] if name in PREFILL else p.features[name][0] for p in prompts])
        for name in wants - OF_THE_DRAFT
    }
    lengths = torch.tensor([prompt.prompt_length for prompt in prompts])
    limits = torch.tensor([prompt.max_new_tokens for prompt in prompts])
    return Context(spec, torch.zeros_like(lengths), limits, lengths, torch.Generator(), features)


def at_select(prompt: PromptTrace, spec: DecoderSpec, wants: frozenset[Feature]) -> Context:
    """The contexts of `select`, a row for each position at which a draft may begin."""
    rows = prompt.drafts.rows
    features = {name: torch.tensor(prompt.features[name][:rows]) for name in wants - OF_THE_DRAFT - {*PREFILL}}
    position = torch.arange(1, rows + 1)
    return Context(
        spec,
        position,
        prompt.max_new_tokens - position,
        prompt.prompt_length + position,
        torch.Generator(),
        features,
    )


def at_truncate(prompt: PromptTrace, context: Context, block_size: int, wants: frozenset[Feature]) -> Draft:
    """The drafts of one block size, a row for each position."""
    drafts, width = prompt.drafts, block_size - 1
    column = drafts.column(block_size)
    features = {
        name: torch.tensor(np.nan_to_num(drafts.features[name][:, column, :width]))
        for name in wants & OF_THE_DRAFT
        if name in drafts.features
    }
    tokens = torch.tensor(drafts.tokens[:, column, :width]).long().clamp(min=0)
    if Feature.DRAFT_TOKENS in wants:
        features[Feature.DRAFT_TOKENS] = tokens
    length = torch.tensor(drafts.draft_length[:, column]).long()
    return Draft(context, context.full(block_size), length, tokens, features=features)


def _stacked(values: Sequence[np.ndarray]) -> Tensor:
    return torch.tensor(np.stack(values))
