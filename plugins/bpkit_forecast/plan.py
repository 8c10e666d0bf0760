"""From chances to decisions: what a step is expected to yield, less what its time is worth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bpkit.learn.gains import Gains
from bpkit.types import CostModel


class Plan(Gains):
    """`Gains` from the chances of every token, before the draft and after it."""

    def __init__(
        self,
        facts: dict[str, Any],
        usable: Sequence[int],
        cost: CostModel | None,
        *,
        rate: float,
        margin: float,
        decision: float,
        device: str = "cpu",
    ) -> None:
        super().__init__(facts, usable, cost, rate=rate, margin=margin, decision=decision)
        drafted = torch.arange(1, max(facts["block_sizes"]))  # counts the tokens of a draft, int64 [width]
        self.inside = (drafted < torch.tensor(self.sizes)[:, None]).float().to(device)  # [usable, width]

    def expected(self, stands: Tensor) -> Tensor:
        """Tokens expected to stand by usable size, [batch, usable].

        Args:
            stands: chance that each token and all before it stand, [batch, usable, width].
        """
        return (stands * self.inside).sum(dim=-1)

    def best_sizes(self, tokens: Tensor, context_length: Tensor) -> list[int]:
        """Block size of each row.

        Args:
            tokens: expected to stand, by usable size, [batch, usable]. context_length: int64 [batch].
        """
        rows = zip(tokens.tolist(), context_length.tolist(), strict=True)
        return [self.best_size(row, length) for row, length in rows]

    def best_length(self, stands: Sequence[float], context_length: int) -> int:
        """Drafted tokens to verify of one row; `stands` is the chance of each token and all before it."""
        verify = self.curves(context_length).verify
        gains = [
            0.0,
            *(sum_ - self.rho * (verify[k] - verify[0]) for k, sum_ in enumerate(accumulate(stands), start=1)),
        ]
        return gains.index(max(gains))
