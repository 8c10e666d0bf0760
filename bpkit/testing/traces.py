"""Made-up traces, for tests of what reads traces: no models, any size, the same seed gives the same numbers."""

from __future__ import annotations

import numpy as np

from bpkit.trace.records import DraftTable, PromptTrace
from bpkit.types import Feature


def synthetic_prompt(
    index: int,
    *,
    output_length: int = 48,
    max_new_tokens: int = 48,
    prompt_length: int = 12,
    block_sizes: tuple[int, ...] = (2, 3, 4, 6, 8),
    hidden_size: int = 8,
    seed: int = 0,
) -> PromptTrace:
    """One prompt whose drafts are right with a chance that differs by domain, by stretch of text and by block size.

    Domains alternate. `match_probability` is the true chance, and `draft_probability` a noisy view of it.
    """
    rng = np.random.default_rng((seed, index))
    rows, width = output_length - 1, max(block_sizes) - 1
    base = 0.85 if index % 2 == 0 else 0.55
    stretch = np.clip(base + 0.3 * np.sin(np.arange(output_length + width) / 6 + rng.uniform(0, 6)), 0.05, 0.98)
    lengths = np.array([b - 1 for b in block_sizes], np.int32)
    chance = np.full((rows, len(block_sizes), width), np.nan, np.float32)
    tokens = np.full(chance.shape, -1, np.int32)
    accepted = np.zeros((rows, len(block_sizes)), np.int32)
    for row in range(rows):
        for column, length in enumerate(lengths):
            spoiled = 1 - 0.01 * column * rng.uniform(0, 1, length)
            chance[row, column, :length] = stretch[row + 1 : row + 1 + length] * spoiled
            right = rng.uniform(size=length) < chance[row, column, :length]
            tokens[row, column, :length] = np.where(right, 1, 2)
            accepted[row, column] = min(int(np.cumprod(right).sum()), output_length - (row + 1) - 1)
    seen = np.clip(chance + rng.normal(0, 0.05, chance.shape), 0.01, 0.999).astype(np.float32)
    drafts = DraftTable(
        block_sizes=np.array(block_sizes, np.int32),
        draft_length=np.broadcast_to(lengths, accepted.shape).copy(),
        num_accepted=accepted,
        tokens=tokens,
        features={Feature.DRAFT_PROBABILITY: seen, Feature.DRAFT_ENTROPY: (-np.log(seen)).astype(np.float32)},
        match_probability=chance,
    )
    hidden = rng.normal(size=hidden_size).astype(np.float32) + np.float32(base)
    return PromptTrace(
        index=index,
        id=f"synthetic-{index}",
        domain=("easy", "hard")[index % 2],
        max_new_tokens=max_new_tokens,
        prompt_tokens=np.full(prompt_length, index, np.int32),
        output_tokens=np.ones(output_length, np.int32),
        prefill_top_tokens=np.arange(64, dtype=np.int32),
        prefill_top_log_probabilities=-np.linspace(0.5, 9, 64, dtype=np.float32),
        prefill_entropy=float(2 - base),
        near_ties=np.zeros(0, np.int32),
        drafts=drafts,
        features={Feature.PREFILL_HIDDEN: hidden},
    )


def synthetic_prompts(count: int, **options: int) -> list[PromptTrace]:
    """`count` prompts of `synthetic_prompt`."""
    return [synthetic_prompt(index, **options) for index in range(count)]  # type: ignore[arg-type]
