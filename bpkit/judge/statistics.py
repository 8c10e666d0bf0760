"""Rates, their intervals and what they gain: ratios of sums over prompts, resampled with the same prompts for all.

Pairing cancels what makes a prompt slow under every policy. numpy alone, so that what only reads tables starts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
TOUCHES_ZERO = 1e-9
"""A gain of less than this part of the baseline is no gain but rounding."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def interval(values: Floats) -> list[float]:
    """[low, high]: the central 95% of resampled or permuted values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def trimmed_mean(values: Floats, share: float = 0.1) -> float:
    """Mean without the lowest and the highest `share` of the values, rounded down; 0 of nothing.

    So a hiccup of the machine does not count.

    >>> trimmed_mean(np.array([1.0, 2.0, 3.0, 100.0]), share=0.25)
    2.5
    """
    if len(values) == 0:
        return 0.0
    cut = int(share * len(values))
    return float(np.sort(values)[cut : len(values) - cut].mean())


def resample(count: int, seed: int) -> Ints:
    """Indices of prompts drawn with replacement: int64 [RESAMPLES, count]."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def resampled_sums(columns: Floats, seed: int) -> Floats:
    """Sums over prompts drawn with replacement, the same draw for all columns: paired.

    Its memory stays flat however many columns there are; it draws other prompts than `resample`.

    Args:
        columns: one row per prompt, [prompts, columns].
        seed: of the draw.

    Returns:
        [resamples, columns]. Divide columns for means and ratios of sums.
    """
    count = len(columns)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    sums: Floats = drawn.astype(np.float64) @ columns
    return sums


class Bootstrap:
    """Ratios of sums over the prompts of one group, resampled.

    Args:
        count: prompts of the group.
        seed: the same seed and count give the same resamples.

    Attributes:
        weights: how often each prompt was drawn, float64 [resamples, prompts].
    """

    def __init__(self, count: int, seed: int) -> None:
        flat = (resample(count, seed) + count * np.arange(RESAMPLES)[:, None]).ravel()
        self.weights = np.bincount(flat, minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)

    def ratios(self, numerator: Floats, denominator: Floats) -> Floats:
        """Ratio of sums in each resample, both arguments [prompts]: float64 [resamples]."""
        ratios: Floats = (self.weights @ numerator) / (self.weights @ denominator)
        return ratios


@dataclass(frozen=True)
class Totals:
    """Sums over the steps, or the runs, of each prompt: float64 [prompts]."""

    tokens: Floats
    steps: Floats
    seconds: Floats

    def of(self, prompts: Ints | NDArray[np.bool_]) -> Totals:
        """Some of the prompts, by index or mask."""
        return Totals(self.tokens[prompts], self.steps[prompts], self.seconds[prompts])

    @property
    def rate(self) -> float:
        """Tokens per second: a ratio of sums."""
        return float(self.tokens.sum() / self.seconds.sum())

    @property
    def acceptance_length(self) -> float:
        """Tokens over steps."""
        return float(self.tokens.sum() / self.steps.sum())

    @property
    def acceptance_length_per_prompt(self) -> float:
        """Mean over prompts of the same."""
        return float((self.tokens / self.steps).mean())

    def rates(self, bootstrap: Bootstrap) -> Floats:
        """Tokens per second in each resample: float64 [resamples]."""
        return bootstrap.ratios(self.tokens, self.seconds)


def totals_of(rows: Sequence[Sequence[float]]) -> Totals:
    """From tokens, steps and seconds of each prompt."""
    return Totals(*np.array(rows, np.float64).T)


def shares_of_gap(rates: Floats, fixed: Floats, oracle: Floats) -> Floats:
    """(rates - fixed) / (oracle - fixed) in each resample that has a gap: float64 [resamples with one]."""
    gap = oracle - fixed
    some = gap > TOUCHES_ZERO * fixed
    shares: Floats = (rates - fixed)[some] / gap[some]
    return shares
