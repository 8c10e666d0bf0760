"""What a draft of each block size is worth: the tokens it is expected to bring, less what its time is worth.

In the long run tokens per second are highest if every step maximises E[tokens] - rho * seconds, rho being the speed
itself: a second spent here is rho tokens not decoded elsewhere (the average-reward criterion; Howard 1960, "Dynamic
programming and Markov processes"). rho is taken as `rate` times the speed of the best fixed size, which follows from
the cost model and the mean yields in training, so that one set of weights serves any device.

The functions are the rule. They take arrays of numpy, by which a decision of a few numbers is soonest made on the host
(`Gains`), or tensors, by which it is exported (`bpkit.learn.networks.BestSize`). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.export.curves import TYPICAL_CONTEXT, CostCurves, Curves
from bpkit.learn.config import LearnedConfig
from bpkit.types import CostModel

NEVER = -1e9
"""Gain of what must not be chosen; finite, because a score that is not would be taken for a fault."""


def going_rate(yields: Any, seconds: Any, rate: float) -> tuple[Any, Any]:
    """What a second is worth, in tokens, and the place of the best fixed size, [1].

    Args:
        yields, seconds: of a step without a draft, then of a step of each block size, [1 + sizes].
        rate: share of the best speed that a second is worth.
    """
    speeds = yields / seconds
    return rate * speeds.max(), speeds[1:].argmax(axis=0, keepdims=True) + 1


def prices(seconds: Any, rho: Any) -> Any:
    """What a draft of each size costs over a step without one, in tokens: [rows, 1 + sizes] -> [rows, sizes]."""
    return rho * (seconds[:, 1:] - seconds[:, :1])


def over_plain(arrays: Any, tokens: Any, price: Any) -> Any:
    """Tokens gained over a step without a draft, which yields one token as well: [rows, 1 + sizes], that step first.

    Args:
        arrays: `numpy` or `torch`. tokens: expected to stand, [rows, sizes]. price: as `prices` gives it.
    """
    gains = tokens - price
    return arrays.concatenate([arrays.zeros_like(gains[:, :1]), gains], 1)


def always(arrays: Any, sizes: int, floor: Any) -> Any:
    """No draft and the best fixed size, bool [1 + sizes]: what may be chosen whatever the margin."""
    place = arrays.arange(1 + sizes)
    return (place == floor) | (place == 0)


def candidates(arrays: Any, gains: Any, floor: Any, free: Any, margin: float) -> Any:
    """Gains of what is `always` free to choose, and of what is ahead of the best fixed size by more than a margin.

    Others are `NEVER`. The block size to draft is that of the largest, the first of equals.
    """
    return arrays.where((gains > gains[:, floor] + margin) | free, gains, NEVER)


def gain_of_choosing(arrays: Any, gains: Any, floor: Any) -> Any:
    """Mean gain over the best fixed size, in tokens a step, if each row of gains is acted upon."""
    return (arrays.amax(gains, 1) - gains[:, floor][:, 0]).mean()


class Gains:
    """Block sizes by what they gain, for a decoder and its costs.

    Args:
        facts: `block_sizes`; `yields`, tokens per step of each in training; `curves`, what steps cost on the
            device of training, taken where `cost` is None; `outlook`, some forecasts of training: tokens expected to
            stand, by size.
        usable: block sizes that the decoder can draft.
        config: what a second is worth, and when choosing is.

    Attributes:
        columns: places of the usable sizes among those of training.
        floor: place of the best fixed size among `usable`.
        rho: what a second is worth, in tokens.
        asks: whether choosing pays for the time that it takes.
    """

    def __init__(
        self, facts: dict[str, Any], usable: Sequence[int], cost: CostModel | None, config: LearnedConfig
    ) -> None:
        trained = facts["block_sizes"]
        self.sizes, self.margin = list(usable), config.margin
        self.columns = [trained.index(size) for size in usable]
        self.curves = CostCurves(cost, usable) if cost is not None else _of_training(facts, self.columns)
        typical = np.array(self.curves(TYPICAL_CONTEXT).steps)
        yields = np.array([1.0, *(facts["yields"][column] for column in self.columns)])
        self.rho, self._fixed = going_rate(yields, typical, config.rate)
        self.floor = int(self._fixed[0]) - 1
        worth = math.inf  # while training runs
        if facts["outlook"]:
            outlook = np.array(facts["outlook"])[:, self.columns]
            worth = gain_of_choosing(np, over_plain(np, outlook, prices(typical[None], self.rho)), self._fixed)
        self.asks = bool(worth > self.rho * config.decision)
        self._choices, self._free = np.array([1, *usable]), always(np, len(usable), self._fixed)
        self._prices: dict[int, tuple[Curves, NDArray[np.float64]]] = {}
        """By the id of curves, which are one object for many context lengths."""

    def best_sizes(self, tokens: NDArray[Any], context_lengths: Sequence[int]) -> NDArray[np.int64]:
        """Block size of each row: int64 [rows].

        Args:
            tokens: expected to stand, by block size of training, [rows, sizes].
        """
        price = [self._price(length) for length in context_lengths]
        each = price[0] if len(price) == 1 else np.array(price).reshape(-1, len(self.sizes))
        gains = over_plain(np, tokens[:, self.columns], each)
        places: NDArray[np.int64] = candidates(np, gains, self._fixed, self._free, self.margin).argmax(axis=1)
        return self._choices[places]

    def _price(self, context_length: int) -> NDArray[np.float64]:
        """`prices` at a context length, [1, sizes], each worked out once."""
        curves = self.curves(context_length)
        known = self._prices.get(id(curves))
        if known is None:
            known = self._prices[id(curves)] = curves, prices(np.array(curves.steps)[None], self.rho)
        return known[1]


def _of_training(facts: dict[str, Any], columns: Sequence[int]) -> Callable[[int], Curves]:
    """What steps took where the policy was trained, at any context length."""
    plain, *drafted = facts["curves"]["steps"]
    curves = Curves([plain, *(drafted[column] for column in columns)], facts["curves"]["verify"])
    return lambda context_length: curves
