"""What a decision is measured against: a prefill and a step of the pair, under the best fixed block size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.progress import NoProgress, Progress
from bpkit.prompts import Prompt
from bpkit.types import Prefill

CANDIDATES = (2, 3, 4, 6, 8, 10, 12, 16)
"""Block sizes among which the fastest is sought, as far as the drafter can draft them."""


@dataclass
class Spent:
    """Of one block size: wall-clock seconds of each step, and the tokens that all of them yielded."""

    steps: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second of steps."""
        return self.tokens / sum(self.steps) if self.steps else 0.0


def measure_pair(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    block_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode the prompts greedily with each candidate in turn.

    Args:
        block_size: the only candidate.

    Returns:
        `block_size`, the one with the most tokens per second; `tokens_per_second` by size; `prefill_ms` and `step_ms`,
        each with `p50`, `p99` and `count`: prefills of all runs, steps of the best size.
    """
    ticker = progress or NoProgress()
    sizes = [block_size] if block_size else [s for s in CANDIDATES if s <= decoder.spec.max_block_size]
    decoders = {size: decoder.with_policy(f"fixed:{size}") for size in sizes}
    ticker.start("prefill and steps of the pair", len(prompts) * len(sizes))
    prefills: list[float] = []
    spent = {size: Spent() for size in sizes}
    decoders[sizes[0]].run(prompts[0].text, max_new_tokens=max_new_tokens, temperature=0.0).finish()  # allocates
    for index, prompt in enumerate(prompts):
        for size in sizes if index % 2 == 0 else sizes[::-1]:
            for record in decoders[size].run(prompt.text, max_new_tokens=max_new_tokens, temperature=0.0):
                if isinstance(record, Prefill):
                    prefills.append(record.seconds.total)
                else:
                    spent[size].steps.append(record.seconds.total)
                    spent[size].tokens += record.tokens.shape[1]
            ticker.tick()
    if not any(each.steps for each in spent.values()):
        raise ValueError("no prompt was decoded beyond its first token: name other prompts, or more --max-new-tokens")
    best = max(sizes, key=lambda size: spent[size].rate)
    return {
        "block_size": best,
        "tokens_per_second": {str(size): each.rate for size, each in spent.items()},
        "prefill_ms": in_milliseconds(prefills),
        "step_ms": in_milliseconds(spent[best].steps),
    }


def in_milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p99 and how many."""
    low, high = np.percentile(seconds, [50, 99])
    return {"p50": 1e3 * float(low), "p99": 1e3 * float(high), "count": len(seconds)}
