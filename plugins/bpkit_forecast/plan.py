"""From chances to decisions: what a step is expected to yield, less what its time is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bpkit.curves import TYPICAL_CONTEXT, CostCurves, Curves
from bpkit.types import CostModel


class Plan:
    """Decides by E[tokens] - rho * seconds. Small sums over a dozen sizes, in plain Python: quicker than tensors.

    Args:
        facts: `block_sizes`; `yields`, tokens per step of each in training; `curves`, what steps cost on the
            device of training, taken where `cost` is None; `outlook`, some forecasts of training: tokens expected to
            stand, by size.
        usable: block sizes that the decoder can draft.
        rate, margin, decision: as in `ForecastConfig`.

    Attributes:
        floor: place of the best fixed size among `usable`.
        rho: what a second is worth, in tokens.
        asks: whether choosing pays for the time that it takes.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        usable: Sequence[int],
        cost: CostModel | None,
        *,
        rate: float,
        margin: float,
        decision: float,
    ) -> None:
        trained = facts["block_sizes"]
        self.sizes, self.margin = list(usable), margin
        self.columns = [trained.index(size) for size in usable]
        drafted = torch.arange(1, max(trained))  # counts the tokens of a draft, int64 [width]
        self.inside = (drafted < torch.tensor(self.sizes)[:, None]).float()  # [usable, width]
        self.curves = CostCurves(cost, usable) if cost is not None else _of_training(facts, self.columns)
        plain, *steps = self.curves(TYPICAL_CONTEXT).steps
        speeds = [facts["yields"][c] / seconds for c, seconds in zip(self.columns, steps, strict=True)]
        self.floor = speeds.index(max(speeds))
        self.rho = rate * max(*speeds, 1 / plain)
        self.asks = self._gain_of_choosing(facts["outlook"]) > self.rho * decision

    def best_sizes(self, stands: Tensor, context_length: Tensor) -> list[int]:
        """Block size of each row.

        Args:
            stands: chance that each token and all before it stand, [batch, usable, width].
            context_length: int64 [batch].
        """
        tokens: list[list[float]] = (stands * self.inside.to(stands.device)).sum(dim=-1).tolist()
        return [self._best_size(row, length) for row, length in zip(tokens, context_length.tolist(), strict=True)]

    def _best_size(self, tokens: Sequence[float], context_length: int) -> int:
        """`tokens`: expected to stand, by usable size."""
        gains = self._gains(tokens, context_length)
        place = gains.index(max(gains))
        if gains[place] <= gains[self.floor] + self.margin:
            place = self.floor
        return self.sizes[place] if gains[place] > 0 else 1

    def _gains(self, tokens: Sequence[float], context_length: int) -> list[float]:
        """What each size gains over a step without a draft, which yields one token as well."""
        plain, *drafted = self.curves(context_length).steps
        return [expected - self.rho * (seconds - plain) for expected, seconds in zip(tokens, drafted, strict=True)]

    def _gain_of_choosing(self, outlook: Sequence[Sequence[float]]) -> float:
        """Mean gain over the best fixed size, in tokens a step, if each forecast of the outlook is acted upon."""
        if not outlook:  # while training runs
            return math.inf
        gain = 0.0
        for row in outlook:
            gains = self._gains([row[column] for column in self.columns], TYPICAL_CONTEXT)
            gain += max(0.0, *gains) - gains[self.floor]
        return gain / len(outlook)

    def best_length(self, stands: Sequence[float], context_length: int) -> int:
        """Drafted tokens to verify of one row; `stands` is the chance of each token and all before it."""
        verify = self.curves(context_length).verify
        gains = [
            0.0,
            *(sum_ - self.rho * (verify[k] - verify[0]) for k, sum_ in enumerate(accumulate(stands), start=1)),
        ]
        return gains.index(max(gains))


def _of_training(facts: dict[str, Any], columns: Sequence[int]) -> Callable[[int], Curves]:
    """What steps took where the policy was trained, at any context length."""
    plain, *drafted = facts["curves"]["steps"]
    curves = Curves([plain, *(drafted[column] for column in columns)], facts["curves"]["verify"])
    return lambda context_length: curves
