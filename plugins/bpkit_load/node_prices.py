"""What steps cost whose drafts are trees, the nodes that are worth their price, and how many to draft."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.types import CostModel, SourceSpec
from bpkit_load.positions import PositionPrices

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

OF_THE_DRAFT = frozenset({"draft", "features"})


class PassCosts:
    """A cost model whose phases of a draft go by its nodes and cost what the positions that are computed do.

    Args:
        source: that drafts.
    """

    def __init__(self, cost: CostModel, source: SourceSpec) -> None:
        self._cost: Any = cost
        self._deepest = source.draft_size(source.max_block_size)
        if hasattr(cost, "array"):
            self.array = self._array

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        if phase in OF_THE_DRAFT:
            size = min(size, self._deepest)
        return float(self._cost.seconds(phase, size, context_length))

    def batch_seconds(self, phase: str, size: int, context_length: int, rows: int, positions: int) -> float:
        if phase in OF_THE_DRAFT:
            size, positions = min(size, self._deepest), min(positions, rows * self._deepest)
        return float(self._cost.batch_seconds(phase, size, context_length, rows, positions))

    def _array(self, phase: str, sizes: Ints, at: int, rows: int, positions: Ints) -> Floats:
        if phase in OF_THE_DRAFT:
            sizes, positions = np.minimum(sizes, self._deepest), np.minimum(positions, rows * self._deepest)
        return np.asarray(self._cost.array(phase, sizes, at, rows, positions))


class NodePrices(PositionPrices):
    """What steps of so many rows cost that verify the best nodes of their drafts; arguments as of `PositionCosts`."""

    least = 0.0

    @cached_property
    def nodes(self) -> Floats:
        """Seconds of a pass and the rest of a step where all rows verify 0, 1, ... nodes: float64 [1 + most]."""
        counts = np.arange(int(self.widths[-1]))
        return np.asarray(self.verify[np.searchsorted(self.widths, counts + 1), self.rows * counts])

    @cached_property
    def drafts(self) -> Floats:
        """Seconds of drafting 0, 1, ... nodes for every row: float64 [1 + most]."""
        sizes = np.arange(2, int(self.widths[-1]) + 1)
        phases = ("draft", "features") if self.features else ("draft",)
        seconds = sum(self._seconds(phase, sizes, self.rows * sizes[-1:])[:, 0] for phase in phases)
        return np.append(0.0, seconds)

    def draft_length(self, survival: Floats, before: float, sizes: Sequence[int]) -> int:
        """Nodes to draft for every row, all verified, with the most tokens for their time; the fewest of equals.

        Args:
            survival: chance that the best, second best, ... node of a draft stands, in the mean: falling, [most].
            before: seconds that a draft takes beside its price. sizes: block sizes to choose from, beside 1.
        """
        most = min(len(survival), len(self.nodes) - 1)
        lengths = np.array([0, *(size - 1 for size in sizes if size <= most + 1)])
        tokens = 1 + np.append(0.0, np.cumsum(survival[:most]))
        seconds = (self.nodes + self.drafts)[: most + 1]
        seconds[1:] += before
        return int(lengths[(tokens / seconds)[lengths].argmax()])
