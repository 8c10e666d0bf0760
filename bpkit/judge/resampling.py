"""Bootstrap over prompts, without models: numpy alone, so that what only reads tables starts at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95

Floats = NDArray[np.float64]


def central(values: Floats) -> list[float]:
    """[low, high]: the central 95% of resampled or permuted values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def resampled_sums(columns: Floats, seed: int) -> Floats:
    """Sums over prompts drawn with replacement, the same draw for all columns: paired.

    Args:
        columns: one row per prompt, [prompts, columns].
        seed: of the draw.

    Returns:
        [resamples, columns]. Divide columns for means and ratios of sums.
    """
    count = len(columns)
    # How often each prompt is drawn, rather than which are: the memory stays flat however many columns there are.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    sums: Floats = drawn.astype(np.float64) @ columns
    return sums
