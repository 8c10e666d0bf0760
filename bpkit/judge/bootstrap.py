"""Paired bootstrap over prompts: every contestant is resampled with the same prompts, so that what makes all of them
slow on a prompt cancels out of their ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.resampling import RESAMPLES, central

Array = NDArray[np.float64]

TOUCHES_ZERO = 1e-9
"""A gain of less than this part of the baseline is no gain but rounding."""


class Bootstrap:
    """Resampled sums over the prompts of one group.

    Args:
        count: prompts of the group.
        seed: the same seed and count give the same resamples.

    Attributes:
        weights: how often each prompt was drawn, float64 [resamples, prompts].
    """

    def __init__(self, count: int, seed: int) -> None:
        picks = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
        flat = (picks + count * np.arange(RESAMPLES)[:, None]).ravel()
        self.weights = np.bincount(flat, minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)

    def sums(self, values: Array) -> Array:
        """Sum of `values` [prompts] in each resample: float64 [resamples]."""
        sums: Array = self.weights @ values
        return sums

    def ratios(self, numerator: Array, denominator: Array) -> Array:
        """Ratio of sums in each resample, both arguments [prompts]: float64 [resamples]."""
        ratios: Array = self.sums(numerator) / self.sums(denominator)
        return ratios


@dataclass(frozen=True)
class Gap:
    """Tokens per second from the best fixed size up to the oracle, and which part of it somebody takes.

    Attributes:
        fixed, oracle: tokens per second on all prompts.
        fixed_resampled, oracle_resampled: in each resample, float64 [resamples].
    """

    fixed: float
    oracle: float
    fixed_resampled: Array
    oracle_resampled: Array

    @property
    def interval(self) -> list[float]:
        """Of the gap, in tokens per second."""
        return central(self.oracle_resampled - self.fixed_resampled)

    @property
    def touches_zero(self) -> bool:
        """Whether there may be nothing to take: a share of nothing has no meaning."""
        return self.interval[0] <= TOUCHES_ZERO * self.fixed

    def share(self, rate: float) -> float:
        """Share of the gap that a speed of `rate` takes; below 0 if it is slower than the best fixed size."""
        return (rate - self.fixed) / (self.oracle - self.fixed)

    def shares(self, rates: Array) -> Array:
        """The share in each resample that has a gap; `rates` is float64 [resamples]."""
        gap = self.oracle_resampled - self.fixed_resampled
        some = gap > TOUCHES_ZERO * self.fixed_resampled
        shares: Array = (rates - self.fixed_resampled)[some] / gap[some]
        return shares
