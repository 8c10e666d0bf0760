"""Figures of one phase of a step: stairs by size, lines by context length. Sorted once, asked often."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Figures:
    """A size between two given ones takes the next larger one's figure. Without any, everything is free.

    A figure is one number, or numbers by context length: linear in between, constant outside.

    Args:
        free_below: smaller sizes cost nothing.
        in_proportion_above: whether larger sizes than the largest cost proportionally more; else they have no figure.
    """

    def __init__(
        self, given: Mapping[int, float | dict[int, float]], *, free_below: int, in_proportion_above: bool = False
    ) -> None:
        self.sizes = sorted(given)
        by_context = [given[size] for size in self.sizes]
        self.curves = [sorted(by.items()) if isinstance(by, dict) else [(0, by)] for by in by_context]
        self.free_below, self.in_proportion_above = free_below, in_proportion_above

    def reach(self, size: int) -> bool:
        """Whether there is a figure for a size."""
        return not self.sizes or size <= self.sizes[-1] or self.in_proportion_above

    def at(self, size: int, context_length: int) -> float:
        """The figure of a size that they reach."""
        if size < self.free_below or not self.sizes:
            return 0.0
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes):
            return self.curves[-1][0][1] * (size / self.sizes[-1])
        curve = self.curves[place]
        after = bisect_left(curve, (context_length,))
        if after == 0 or after == len(curve):
            return curve[max(after - 1, 0)][1]
        (earlier, low), (later, high) = curve[after - 1 : after + 1]
        return low + (high - low) / (later - earlier) * (context_length - earlier)

    def array(self, sizes: NDArray[Any], context_lengths: NDArray[Any]) -> NDArray[np.float64]:
        """`at` of every size and context length, two arrays of one shape: float64 of that shape."""
        if not self.sizes:
            return np.zeros(sizes.shape)
        place = np.minimum(np.searchsorted(self.sizes, sizes), len(self.sizes) - 1)
        found = np.array([curve[0][1] for curve in self.curves], np.float64)[place]
        for column, curve in enumerate(self.curves):
            if len(curve) > 1:
                here = place == column
                contexts, values = zip(*curve, strict=True)
                found[here] = np.interp(context_lengths[here], contexts, values)
        if self.in_proportion_above:
            found = np.where(sizes > self.sizes[-1], found * (sizes / self.sizes[-1]), found)
        return np.where(sizes < self.free_below, 0.0, found)
