"""What steps of several rows cost: as the cost model says of so many rows, else each row as if it ran alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bpkit.types import CostModel

COST_CONTEXT = 64
"""Costs are looked up once for so many context lengths: they change slowly, and a lookup costs a decision's time."""


def priced(cost: CostModel | None, sizes: Iterable[int]) -> list[int]:
    """The block sizes, 1 not among them, that the cost model has costs for, if there is one."""

    def has(size: int) -> bool:
        if cost is None:
            return True
        try:
            cost.seconds("draft", size, 1)
            cost.seconds("verify", size, 1)
        except ValueError:  # a table ends somewhere
            return False
        return True

    return [size for size in sizes if size > 1 and has(size)]


class StepPrices:
    """What phases of a step of some rows cost, all rows together, at about a context length.

    Where the cost model does not price so many rows, each row pays what it would alone. Without a cost model a row pays
    1 + slope (verified positions - 1) plain steps.

    Attributes:
        shared: whether the prices are the cost model's for so many rows. A size that it lacks for so many costs inf.
    """

    def __init__(self, cost: CostModel | None, slope: float, context_length: int, rows: int) -> None:
        self._cost: Any = cost
        self._slope, self.rows = slope, rows
        self._at = context_length // COST_CONTEXT * COST_CONTEXT + COST_CONTEXT // 2
        self.shared = cost is not None and rows > 1 and self._has_rows()

    def _has_rows(self) -> bool:
        try:
            self._cost.batch_seconds("verify", 1, self._at, self.rows, self.rows)
        except (AttributeError, ValueError):
            return False
        return True

    def of(self, phase: str, size: int, positions: int | None = None) -> float:
        """A phase of all rows; `positions` of them without padding, where prices are shared: else all have `size`."""
        if self._cost is None:
            return self.rows * (1 + self._slope * (size - 1)) if phase == "verify" else 0.0
        if not self.shared:
            return self.rows * float(self._cost.seconds(phase, size, self._at))
        asked = self.rows * size if positions is None else positions
        try:
            return float(self._cost.batch_seconds(phase, size, self._at, self.rows, asked))
        except ValueError:  # a table ends somewhere
            return math.inf

    def step(self, size: int) -> float:
        """A step in which all rows draft a block of this size and verify it whole."""
        drafting = self.of("draft", size) if size > 1 else 0.0
        return drafting + self.of("verify", size) + self.of("rest", 1)
