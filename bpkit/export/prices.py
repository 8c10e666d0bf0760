"""What steps of several rows cost: as the cost model says of so many rows, else each row as if it ran alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bpkit.types import CostModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POINTS = 5
"""Numbers of positions at which a pass of one size is priced."""


def priced(cost: CostModel | None, sizes: Iterable[int]) -> list[int]:
    """The block sizes, 1 not among them, that the cost model has costs for, if there is one."""
    return [size for size in sizes if size > 1 and has_price(cost, size, size)]


def has_price(cost: CostModel | None, draft: int, verify: int) -> bool:
    """Whether the cost model, if there is one, has costs for a draft and for a pass of such sizes."""
    if cost is None:
        return True
    try:
        if draft > 1:
            cost.seconds("draft", draft, 1)
        cost.seconds("verify", verify, 1)
    except ValueError:  # a table ends somewhere
        return False
    return True


class StepPrices:
    """What phases of a step of some rows cost, all rows together, at a context length.

    Where the cost model does not price so many rows, each row pays what it would alone. Without a cost model a row pays
    1 + slope (verified positions - 1) plain steps.

    Attributes:
        shared: whether the prices are the cost model's for so many rows. A size that it lacks for so many costs inf.
    """

    def __init__(self, cost: CostModel | None, slope: float, at: int, rows: int) -> None:
        self._cost: Any = cost
        self._slope, self._at, self.rows = slope, at, rows
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


class PassPrices:
    """What one phase of a step costs by the size of the widest row and the positions of all rows without padding.

    It is looked up at a few numbers of positions of each size, and is a line in between. Where rows pay what they would
    alone, it is the price at their mean size, whatever the widest.
    """

    def __init__(self, prices: StepPrices, phase: str, smallest: int, largest: int) -> None:
        import numpy as np  # here, so that options can be listed without it

        sizes, rows = np.arange(smallest, largest + 1), prices.rows
        fewest, most = (sizes if phase == "draft" else sizes + rows - 1), sizes * rows
        mean = [] if prices.shared else [prices.of(phase, size) for size in sizes.tolist()]
        tables = []
        for size, low, high in zip(sizes.tolist(), fewest.tolist(), most.tolist(), strict=True):
            asked, known, found = range(low, high + 1), most, mean
            if prices.shared:
                known = np.unique(np.linspace(low, high, POINTS).astype(int))
                found = [prices.of(phase, size, positions) for positions in known.tolist()]
            tables.append(np.interp(asked, known, found) if math.inf not in found else np.full(len(asked), math.inf))
        self._table = np.concatenate(tables)
        lengths = [len(table) for table in tables]
        self._start = np.zeros(largest + 1, np.int64)  # of each size's table, less its fewest positions
        self._start[smallest:] = np.cumsum([0, *lengths[:-1]]) - fewest

    def of(self, sizes: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """The prices of several passes: float64 [passes]."""
        found: NDArray[np.float64] = self._table[self._start[sizes] + positions]
        return found
