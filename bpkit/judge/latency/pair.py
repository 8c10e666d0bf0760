"""What a decision is measured against: a prefill and a step of the pair, under the best fixed block size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.progress import Progress
from bpkit.prompts import Prompt
from bpkit.types import Prefill

CANDIDATES = (2, 3, 4, 6, 8, 10, 12, 16)
"""Block sizes among which the fastest is sought, as far as the drafter can draft them."""


def measure_pair(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    block_size: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Decode the prompts greedily with each candidate in turn.

    Args:
        block_size: the only candidate.

    Returns:
        `block_size`, the one with the most tokens per second; `tokens_per_second` by size; `prefill_ms` and `step_ms`,
        each with `p50`, `p99` and `count`: prefills of all runs, steps of the best size.
    """
    sizes = [block_size] if block_size else [s for s in CANDIDATES if s <= decoder.spec.max_block_size]
    decoders = {size: decoder.with_policy(f"fixed:{size}") for size in sizes}
    progress.start("prefill and steps of the pair", len(prompts) * len(sizes))
    prefills: list[float] = []
    steps: dict[int, list[float]] = {size: [] for size in sizes}
    tokens = dict.fromkeys(sizes, 0)
    decoders[sizes[0]].run(prompts[0].text, max_new_tokens=max_new_tokens, temperature=0.0).finish()  # allocates
    for index, prompt in enumerate(prompts):
        for size in sizes if index % 2 == 0 else sizes[::-1]:
            for record in decoders[size].run(prompt.text, max_new_tokens=max_new_tokens, temperature=0.0):
                if isinstance(record, Prefill):
                    prefills.append(record.seconds.total)
                else:
                    steps[size].append(record.seconds.total)
                    tokens[size] += record.tokens.shape[1]
            progress.tick()
    if not any(steps.values()):
        raise ValueError("no prompt was decoded beyond its first token: name other prompts, or more --max-new-tokens")
    rates = {size: tokens[size] / sum(steps[size]) if steps[size] else 0.0 for size in sizes}
    best = max(sizes, key=rates.__getitem__)
    return {
        "block_size": best,
        "tokens_per_second": {str(size): rate for size, rate in rates.items()},
        "prefill_ms": in_milliseconds(prefills),
        "step_ms": in_milliseconds(steps[best]),
    }


def in_milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and how many."""
    low, high = np.percentile(seconds, [50, 99])
    return {"p50": 1e3 * float(low), "p99": 1e3 * float(high), "count": len(seconds)}
