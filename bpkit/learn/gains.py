"""What a draft of each block size is worth: the tokens it is expected to bring, less what its time is worth.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bpkit.learn.curves import TYPICAL_CONTEXT, CostCurves, Curves
from bpkit.types import CostModel


class Gains:
    """Decides by E[tokens] - rho * seconds. Small sums over a dozen sizes, in plain Python: quicker than tensors.

    In the long run tokens per second are highest if every step maximises that, rho being the speed itself: a second
    spent here is rho tokens not decoded elsewhere (the average-reward criterion; Howard 1960, "Dynamic programming and
    Markov processes"). rho is taken as `rate` times the speed of the best fixed size, which follows from the cost model
    and the mean yields in training, so that one set of weights serves any device.

    Args:
        facts: `block_sizes`; `yields`, tokens per step of each in training; `curves`, what steps cost on the
            device of training, taken where `cost` is None; `outlook`, some forecasts of training: tokens expected to
            stand, by size.
        usable: block sizes that the decoder can draft.
        rate, margin, decision: as in `bpkit.learn.learned_config.LearnedConfig`.

    Attributes:
        columns: places of the usable sizes among those of training.
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
        self.curves = CostCurves(cost, usable) if cost is not None else _of_training(facts, self.columns)
        plain, *steps = self.curves(TYPICAL_CONTEXT).steps
        speeds = [facts["yields"][c] / seconds for c, seconds in zip(self.columns, steps, strict=True)]
        self.floor = speeds.index(max(speeds))
        self.rho = rate * max(*speeds, 1 / plain)
        self.asks = self._gain_of_choosing(facts["outlook"]) > self.rho * decision

    def best_size(self, tokens: Sequence[float], context_length: int) -> int:
        """Block size of one row; `tokens` are expected to stand, by usable size."""
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


def _of_training(facts: dict[str, Any], columns: Sequence[int]) -> Callable[[int], Curves]:
    """What steps took where the policy was trained, at any context length."""
    plain, *drafted = facts["curves"]["steps"]
    curves = Curves([plain, *(drafted[column] for column in columns)], facts["curves"]["verify"])
    return lambda context_length: curves
