"""What steps cost by block size, for policies that weigh tokens against time. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bpkit.types import CostModel

CONTEXT_STEP, TYPICAL_CONTEXT = 64, 256
"""Costs are looked up for context lengths rounded up to the first; a typical step is one at the second."""


@dataclass(frozen=True)
class Curves:
    """Seconds at one context length.

    Attributes:
        steps: of a step without a draft, and of a step of each block size, the draft verified whole.
        verify: of target passes over 1, 2, ... positions, up to the largest block size.
        draft: where drafts are trees, of all but the target's pass: of a step without a draft, then of one whose
            longest path has 2, 3, ... positions, anchor included.
    """

    steps: list[float]
    verify: list[float]
    draft: list[float] = field(default_factory=list)


class CostCurves:
    """Curves of a cost model for some block sizes, each context length worked out once.

    Args:
        block_sizes: ascending, without 1.
        longest_draft: where drafts are trees, the most positions of a path; larger drafts cost as much.
    """

    def __init__(self, cost: CostModel, block_sizes: Sequence[int], *, longest_draft: int | None = None) -> None:
        self.cost, self.block_sizes, self.longest_draft = cost, list(block_sizes), longest_draft
        self._known: dict[int, Curves] = {}

    def __call__(self, context_length: int) -> Curves:
        """At a context length, rounded up to a multiple of `CONTEXT_STEP`; the same object for the same multiple."""
        at = -(-context_length // CONTEXT_STEP) * CONTEXT_STEP
        if at not in self._known:
            seconds = self.cost.seconds
            verify = [seconds("verify", width, at) for width in range(1, max(self.block_sizes) + 1)]
            rest, longest = seconds("rest", 1, at), self.longest_draft or max(self.block_sizes)
            drafted = {size: seconds("draft", size, at) for size in {min(size, longest) for size in self.block_sizes}}
            steps = [drafted[min(size, longest)] + verify[size - 1] + rest for size in self.block_sizes]
            draft = [seconds("draft", size, at) for size in range(2, (self.longest_draft or 0) + 1)]
            self._known[at] = Curves(
                [verify[0] + rest, *steps], verify, [rest + more for more in (0.0, *draft)] if draft else []
            )
        return self._known[at]
