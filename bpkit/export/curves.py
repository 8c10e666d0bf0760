"""What steps cost by block size, for policies that weigh tokens against time. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bpkit.types import CostModel

CONTEXT_STEP, TYPICAL_CONTEXT = 64, 256
"""Costs are looked up for context lengths rounded up to the first; a typical step is one at the second."""


@dataclass(frozen=True)
class Curves:
    """Seconds at one context length.

    Attributes:
        steps: of a step without a draft, and of a step of each block size, the draft verified whole.
        verify: of target passes over 1, 2, ... positions, up to the largest block size.
    """

    steps: list[float]
    verify: list[float]


class CostCurves:
    """Curves of a cost model for some block sizes, each context length worked out once.

    Args:
        block_sizes: ascending, without 1.
    """

    def __init__(self, cost: CostModel, block_sizes: Sequence[int]) -> None:
        self.cost, self.block_sizes = cost, list(block_sizes)
        self._known: dict[int, Curves] = {}

    def __call__(self, context_length: int) -> Curves:
        """At a context length, rounded up to a multiple of `CONTEXT_STEP`; the same object for the same multiple."""
        at = -(-context_length // CONTEXT_STEP) * CONTEXT_STEP
        if at not in self._known:
            seconds = self.cost.seconds
            verify = [seconds("verify", width, at) for width in range(1, max(self.block_sizes) + 1)]
            rest = seconds("rest", 1, at)
            drafted = [seconds("draft", size, at) + verify[size - 1] + rest for size in self.block_sizes]
            self._known[at] = Curves([verify[0] + rest, *drafted], verify)
        return self._known[at]
