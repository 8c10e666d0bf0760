"""Lookups in the tables of a cost model: stairs by size, lines by context length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bpkit.types import PHASES


class CostError(ValueError):
    """A cost model cannot be read, or does not say what was asked; the message names the place and how to mend it."""


class Figures:
    """Figures of one phase, sorted once and asked often: stairs by size, lines by context length.

    A size between two given ones takes the next larger one's figure. Without any, everything is free. A figure is one
    number, or numbers by context length: linear in between, constant outside.

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

    def at(self, size: int, context_length: int) -> float:
        """The figure of a size, which is no larger than the largest given or in proportion to it."""
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
        found = np.asarray(np.array([curve[0][1] for curve in self.curves], np.float64)[place])  # also of one size
        for column, curve in enumerate(self.curves):
            if len(curve) > 1:
                here = place == column
                contexts, values = zip(*curve, strict=True)
                found[here] = np.interp(context_lengths[here], contexts, values)
        if self.in_proportion_above:
            found = np.where(sizes > self.sizes[-1], found * (sizes / self.sizes[-1]), found)
        return np.where(sizes < self.free_below, 0.0, found)


class PromptFigures:
    """Figures of reading prompts, by tokens of a pass: lines between those given, in proportion above the largest.

    Args:
        given: seconds by tokens; without any, prompts are free.
        passes: of the target. The lines begin at what a pass over one position costs.
    """

    def __init__(self, given: Mapping[int, float], passes: Figures) -> None:
        self.tokens, self.passes = sorted(given), passes
        self.values = [given[tokens] for tokens in self.tokens]

    def at(self, tokens: int, context_length: int) -> float:
        """The figure of a pass over so many tokens of prompts."""
        if not self.tokens or tokens < 1:
            return 0.0
        place = bisect_left(self.tokens, tokens)
        if place == len(self.tokens):
            return self.values[-1] * (tokens / self.tokens[-1])
        after, high = self.tokens[place], self.values[place]
        if after == tokens:
            return high
        before, low = (
            (self.tokens[place - 1], self.values[place - 1]) if place else (1, self.passes.at(1, context_length))
        )
        return low + (high - low) / (after - before) * (tokens - before)

    def array(self, tokens: NDArray[Any], context_lengths: NDArray[Any]) -> NDArray[np.float64]:
        """`at` of every number of tokens and context length, two arrays of one shape: float64 of that shape."""
        if not self.tokens:
            return np.zeros(tokens.shape)
        (first, *_, last), high = (self.tokens[0], *self.tokens), self.values[0]
        low = self.passes.array(np.ones_like(tokens), context_lengths)
        begins = low + (high - low) / max(first - 1, 1) * (tokens - 1)
        found = np.where(tokens < first, begins, np.interp(tokens, self.tokens, self.values))
        found = np.where(tokens > last, self.values[-1] * (tokens / last), found)
        return np.where(tokens < 1, 0.0, found)


class Tables(Protocol):
    """What steps of some number of rows cost, as it is written."""

    @property
    def draft(self) -> Mapping[int, float]: ...
    @property
    def catch_up(self) -> Mapping[int, float]: ...
    @property
    def features(self) -> Mapping[int, float]: ...
    @property
    def verify(self) -> Mapping[int, float | dict[int, float]]: ...
    @property
    def rest(self) -> float: ...


class StepFigures:
    """The figures of all phases of steps of some number of rows, sorted once.

    Args:
        tables: that hold them.
        name: of the cost model, for messages.
        rows: that run in such steps.
    """

    def __init__(self, tables: Tables, name: str, rows: int = 1) -> None:
        self.name, self.rows, self.rest = name, rows, tables.rest
        self.phases = {
            "draft": Figures(tables.draft, free_below=2),
            "catch_up": Figures(tables.catch_up, free_below=min(tables.catch_up, default=1), in_proportion_above=True),
            "features": Figures(tables.features, free_below=2),
            "verify": Figures(tables.verify, free_below=1),
        }

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        """Cost of one of `PHASES`. Raises CostError for a size above the largest that the table gives."""
        if phase == "rest":
            return self.rest
        return self._reaching(phase, size, size).at(size, context_length)

    def array(self, phase: str, sizes: NDArray[Any], context_lengths: NDArray[Any]) -> NDArray[np.float64]:
        """`seconds` of many, two arrays of one shape: float64 of that shape. Raises CostError, as `seconds`."""
        if phase == "rest" or not sizes.size:
            return np.full(sizes.shape, self.rest)
        return self._reaching(phase, int(sizes.min()), int(sizes.max())).array(sizes, context_lengths)

    def _reaching(self, phase: str, smallest: int, largest: int) -> Figures:
        """The figures of a phase. Raises CostError if there are none for sizes from the smallest to the largest."""
        figures = self.phases.get(phase)
        if figures is None:
            raise CostError(f"there is no phase {phase!r} of a step; the phases are: {', '.join(PHASES)}")
        if phase == "verify" and smallest < 1:
            raise CostError(f"a step verifies at least the anchor: there is no verify width {smallest}")
        if figures.sizes and largest > figures.sizes[-1] and not figures.in_proportion_above:
            what = "verify width" if phase == "verify" else "block size"
            of_rows, place = (
                ("", phase) if self.rows == 1 else (f" in steps of {self.rows} rows", f"rows.{self.rows}.{phase}")
            )
            raise CostError(
                f"cost model {self.name!r} has no {phase} cost for {what} {largest}{of_rows}: it gives "
                f"{', '.join(map(str, figures.sizes))}. Add a figure for {largest} or more to its {place!r}, measure "
                f"again with `bpkit calibrate --max-block-size {largest}`, or keep policies to block size "
                f"{figures.sizes[-1]}"
            )
        return figures
