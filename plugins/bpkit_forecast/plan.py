"""From chances to decisions: what a step is expected to yield, less what its time is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bpkit.types import CostModel

CONTEXT_STEP, TYPICAL_CONTEXT = 64, 256
"""Costs are looked up for context lengths rounded up to the first; the best fixed size is the one at the second."""


@dataclass(frozen=True)
class Price:
    """Seconds at one context length.

    Attributes:
        plain: of a step without a draft. steps: of a step of each usable block size, the draft verified whole.
        verify: of target passes over 1, 2, ... positions.
    """

    plain: float
    steps: list[float]
    verify: list[float]


class Plan:
    """Decides by E[tokens] - rho * seconds. Small sums over a dozen sizes, in plain Python: quicker than tensors.

    Args:
        facts: `block_sizes`; `yields`, the mean tokens of a step of each in training; `costs`, seconds of a step
            without a draft and of each on the device of training, and `verify_costs`, taken where `cost` is None.
        usable: block sizes that the decoder can draft.
        rate, margin: as in `ForecastConfig`.

    Attributes:
        floor: place of the best fixed size among `usable`.
        rho: what a second is worth, in tokens.
    """

    def __init__(
        self, facts: dict[str, Any], usable: Sequence[int], cost: CostModel | None, *, rate: float, margin: float
    ) -> None:
        trained = facts["block_sizes"]
        self.sizes, self.margin = list(usable), margin
        self.columns = [trained.index(size) for size in usable]
        drafted = torch.arange(1, max(trained))  # counts the tokens of a draft, int64 [width]
        self.inside = (drafted < torch.tensor(trained)[:, None]).float()  # [sizes of training, width]
        self.price = _prices(facts, tuple(usable), cost)
        typical = self.price(TYPICAL_CONTEXT)
        speeds = [facts["yields"][c] / seconds for c, seconds in zip(self.columns, typical.steps, strict=True)]
        self.floor = speeds.index(max(speeds))
        self.rho = rate * max(*speeds, 1 / typical.plain)

    def best_sizes(self, stands: Tensor, context_length: Tensor) -> list[int]:
        """Block size of each row.

        Args:
            stands: chance that each token and all before it stand, [batch, sizes of training, width].
            context_length: int64 [batch].
        """
        tokens: list[list[float]] = (stands * self.inside.to(stands.device)).sum(dim=-1).tolist()
        return [self._best_size(row, length) for row, length in zip(tokens, context_length.tolist(), strict=True)]

    def _best_size(self, tokens: Sequence[float], context_length: int) -> int:
        """`tokens`: expected to stand, by size of training."""
        price = self.price(context_length)
        # Above a step without a draft, which yields one token as well.
        gains = [
            tokens[column] - self.rho * (seconds - price.plain)
            for column, seconds in zip(self.columns, price.steps, strict=True)
        ]
        place = gains.index(max(gains))
        if gains[place] <= gains[self.floor] + self.margin:
            place = self.floor
        return self.sizes[place] if gains[place] > 0 else 1

    def best_lengths(self, stands: Tensor, context_length: Tensor) -> list[int]:
        """Drafted tokens to verify, of each row; `stands` is [batch, draft_length]."""
        rows: list[list[float]] = stands.tolist()
        return [self._best_length(row, length) for row, length in zip(rows, context_length.tolist(), strict=True)]

    def _best_length(self, stands: Sequence[float], context_length: int) -> int:
        verify = self.price(context_length).verify
        gains = [
            0.0,
            *(sum_ - self.rho * (verify[k] - verify[0]) for k, sum_ in enumerate(accumulate(stands), start=1)),
        ]
        return gains.index(max(gains))


def _prices(facts: dict[str, Any], usable: tuple[int, ...], cost: CostModel | None) -> Callable[[int], Price]:
    """Prices by the cost model, or by what steps took on the device of training."""
    if cost is None:
        by_size = dict(zip(facts["block_sizes"], facts["costs"][1:], strict=True))
        trained = Price(facts["costs"][0], [by_size[size] for size in usable], facts["verify_costs"])
        return lambda context_length: trained
    model = cost

    @cache
    def at(context_length: int) -> Price:
        verify = [model.seconds("verify", width, context_length) for width in range(1, max(usable) + 1)]
        rest = model.seconds("rest", 1, context_length)
        steps = [model.seconds("draft", size, context_length) + verify[size - 1] + rest for size in usable]
        return Price(verify[0] + rest, steps, verify)

    return lambda context_length: at(-(-context_length // CONTEXT_STEP) * CONTEXT_STEP)
