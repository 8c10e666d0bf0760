"""Figures by size, as stairs, and by context length, as lines between those given; sorted once, asked often."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Stairs:
    """Figures by size; a size between two given ones takes the next larger one's. Without any, everything is free.

    Args:
        free_below: smaller sizes cost nothing.
        in_proportion_above: whether larger sizes than the largest cost proportionally more; else they have no cost.
    """

    def __init__(self, given: Mapping[int, float], *, free_below: int, in_proportion_above: bool = False) -> None:
        self.sizes = sorted(given)
        self.values = [given[size] for size in self.sizes]
        self.free_below, self.in_proportion_above = free_below, in_proportion_above

    def at(self, size: int) -> float | None:
        """The figure of a size, or None if there is none."""
        if size < self.free_below or not self.sizes:
            return 0.0
        place = bisect_left(self.sizes, size)
        if place < len(self.sizes):
            return self.values[place]
        return self.values[-1] * (size / self.sizes[-1]) if self.in_proportion_above else None

    def array(self, sizes: NDArray[Any]) -> NDArray[np.float64]:
        """`at` of every size, float64; those without a figure are as the largest."""
        if not self.sizes:
            return np.zeros(sizes.shape)
        place = np.minimum(np.searchsorted(self.sizes, sizes), len(self.sizes) - 1)
        found = np.asarray(self.values, np.float64)[place]
        if self.in_proportion_above:
            found = np.where(sizes > self.sizes[-1], found * (sizes / self.sizes[-1]), found)
        return np.where(sizes < self.free_below, 0.0, found)


class Curve:
    """Figures by context length, ascending: linear in between, constant outside."""

    def __init__(self, contexts: list[int], values: list[float]) -> None:
        self.contexts, self.values = contexts, values
        self.slopes = [
            (after - before) / (later - earlier)
            for (earlier, later), (before, after) in zip(pairwise(contexts), pairwise(values), strict=True)
        ]

    def at(self, context_length: int) -> float:
        place = bisect_left(self.contexts, context_length)
        if place == 0:
            return self.values[0]
        if place == len(self.contexts):
            return self.values[-1]
        return self.values[place - 1] + self.slopes[place - 1] * (context_length - self.contexts[place - 1])

    def array(self, context_lengths: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(np.interp(context_lengths, self.contexts, self.values), np.float64)


def curve(given: float | Mapping[int, float]) -> Curve:
    by_context = given if isinstance(given, Mapping) else {0: given}
    contexts = sorted(by_context)
    return Curve(contexts, [by_context[context] for context in contexts])
