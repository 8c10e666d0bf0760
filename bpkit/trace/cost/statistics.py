"""Robust statistics of seconds: trimmed means with their errors, and slopes among like steps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.cost.table import Cell

Floats = NDArray[np.float64]

TRIM = 0.1
ROUNDS_OF_WEIGHING = 10
HUBER, MEDIAN_OF_NORMAL = 1.345, 0.6745
"""Standard deviations beyond which residuals are outliers, and the median of a normal one without its sign."""


def trimmed(seconds: Floats) -> tuple[float, float | None]:
    """10% trimmed mean and its standard error (Tukey & McLaughlin 1963); None for a single sample.

    >>> mean, error = trimmed(np.array([1.0] * 9 + [100.0]))
    >>> mean, error
    (1.0, 0.0)
    """
    count = len(seconds)
    cut = min(math.ceil(TRIM * count), (count - 1) // 2)
    ordered = np.sort(seconds)
    mean = float(ordered[cut : count - cut].mean())
    if count < 2:
        return mean, None
    winsorized = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    return mean, float(winsorized.std(ddof=1)) / ((1 - 2 * cut / count) * math.sqrt(count))


def cell_of(phase: str, size: int, seconds: Floats, context_length: int | None = None) -> Cell:
    """The trimmed mean of samples, with how well it is known."""
    (trimmed_mean, error), mean = trimmed(seconds), float(seconds.mean())
    low, high = np.quantile(seconds, [0.25, 0.75]).tolist()
    return Cell(
        phase=phase,
        size=size,
        context_length=context_length,
        count=len(seconds),
        seconds=trimmed_mean,
        standard_error=error,
        variation=float(seconds.std(ddof=1)) / mean if len(seconds) > 1 and mean > 0 else None,
        quartiles=(low, high),
    )


def combined(cells: list[Cell], weights: list[float]) -> float | None:
    """Standard error of a weighted sum; None if one of them is not known."""
    errors = [cell.standard_error for cell in cells]
    known = [weight * error for weight, error in zip(weights, errors, strict=True) if error is not None]
    return math.hypot(*known) if len(known) == len(cells) else None


def slope_within(groups: NDArray[np.int64], x: Floats, y: Floats, *others: Floats) -> tuple[float, float]:
    """Slope of y over x among members of one group, and its standard error: regression with an intercept per group.

    Outliers weigh less, by Huber's weights (1964) in rounds of least squares. (0, infinity) where x does not vary by
    itself.

    Args:
        groups: of each member, int64 [members]; all others have the same shape.
        others: what y may depend on besides.
    """
    _, group, count = np.unique(groups, return_inverse=True, return_counts=True)
    columns, weights = np.stack([x, *others, y], axis=1), np.ones(len(y))
    freedom = len(y) - len(count) - columns.shape[1] + 1
    slope, error = 0.0, math.inf
    for _ in range(ROUNDS_OF_WEIGHING):
        total = np.bincount(group, weights)
        means = np.stack([np.bincount(group, weights * column) / total for column in columns.T], axis=1)
        centred = columns - means[group]
        root = np.sqrt(weights)[:, None]
        dx, dy = root * centred[:, :-1], (root * centred[:, -1:])[:, 0]
        if freedom < 1 or np.linalg.matrix_rank(dx) == np.linalg.matrix_rank(dx[:, 1:]):
            return 0.0, math.inf
        slopes = np.linalg.lstsq(dx, dy)[0]
        residual = centred[:, -1] - centred[:, :-1] @ slopes
        variance = float(weights @ residual**2) / freedom
        slope, error = float(slopes[0]), math.sqrt(variance * float(np.linalg.pinv(dx.T @ dx)[0, 0]))
        scale = float(np.median(np.abs(residual))) / MEDIAN_OF_NORMAL
        if not scale:
            break
        weights = np.minimum(1.0, HUBER * scale / np.maximum(np.abs(residual), 1e-300))
    return slope, error
