"""How often nodes of some chance stand, counted while decoding: a calibration that needs no training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

BOUNDS = (0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99)
"""Between ranges of the drafter's chance whose nodes are counted together. A last range is of nodes without one."""
DEPTHS = (1, 3, 7)
"""Depths, from 0, at which another range of depths begins."""
SHAPE = len(DEPTHS) + 1, len(BOUNDS) + 2
"""Of the counts: ranges of depths and of chances."""
UNKNOWN = 0.7
"""Chance of a node of which the drafter says none."""
SUREST = 0.999
WEIGHT = 8.0
"""Nodes that what is known more broadly counts for."""
KEPT = 0.9995
"""Weight of what was counted after each step."""


class Paths:
    """The paths of nodes, by their parents, int64 [rows, nodes]; a parent comes first, and -1 is the anchor.

    Pointers from nodes to ancestors are doubled, so that the work goes by the logarithm of the depth.

    Attributes:
        depths: of nodes, from 0.
    """

    def __init__(self, parents: Ints) -> None:
        rows, self._nodes = parents.shape
        wide = self._nodes + 1  # of each row the anchor is behind its nodes
        above = np.full((rows, wide), self._nodes)
        above[:, :-1] = parents % wide
        depths = (above < self._nodes).astype(np.int64).ravel()
        above = (above + wide * np.arange(rows)[:, None]).ravel()
        self._jumps = [above]
        while depths.take(above).any():
            depths += depths.take(above)
            above = above.take(above)
            self._jumps.append(above)
        self.depths: Ints = depths.reshape(rows, wide)[:, :-1]

    def products(self, chances: Floats) -> Floats:
        """Chances that nodes stand with all that come before them on their paths: float64 [rows, nodes].

        Args:
            chances: that each stands if its parent does.
        """
        wide = np.ones((len(chances), self._nodes + 1))
        wide[:, :-1] = chances
        found = wide.ravel()
        for above in self._jumps:
            found *= found.take(above)
        return found.reshape(wide.shape)[:, :-1]


def told(verified: Flags, parents: Ints, path: Ints, ended: Any) -> tuple[Flags, Flags]:
    """Of which nodes a step told whether they are right, and which of all stand: bool [rows, nodes] each.

    Args:
        verified: bool [rows, nodes]. parents: int64 [rows, nodes].
        path: nodes of each row that stand, int64 [rows, width], and -1 behind them.
        ended: rows that ended, bool [rows]: what comes after their paths may not have been tested.
    """
    rows, nodes = parents.shape
    stands = np.zeros((rows, nodes + 1), bool)
    stands[np.arange(rows)[:, None], path] = True  # -1 is the place behind the last node
    stands[:, -1] = True  # and the anchor, for -1 is the parent of those that follow it
    tested = verified & np.take_along_axis(stands, parents, axis=1)
    stands = stands[:, :-1]
    return tested & (stands | ~ended[:, None]), stands


class NodeChances:
    """Chances of nodes by the drafter's, from counts.

    They are counted by range of that chance, and by it and the depth; the finer count leans on the broader, and that
    on the drafter's chance itself.

    Attributes:
        accepted, tested: nodes, float64 `SHAPE`. A node is tested where its parent stands.
    """

    def __init__(self) -> None:
        self.accepted, self.tested = np.zeros((2, *SHAPE))

    def cells(self, chances: Floats, depth: Ints) -> Ints:
        """Where nodes are counted, by their chances and depths: places in the flat counts, int64 [rows, nodes]."""
        ranges = np.searchsorted(BOUNDS, chances, side="right")
        ranges[np.isnan(chances)] = SHAPE[1] - 1
        return np.asarray(np.searchsorted(DEPTHS, depth, side="right") * SHAPE[1] + ranges)

    def calibrated(self, chances: Floats, cells: Ints) -> Floats:
        """That a node stands if its parent does, float64 [rows, nodes]."""
        ranges, chances = cells % SHAPE[1], np.where(np.isnan(chances), UNKNOWN, chances)
        broad = (self.accepted.sum(0)[ranges] + WEIGHT * chances) / (self.tested.sum(0)[ranges] + WEIGHT)
        found = (self.accepted.ravel()[cells] + WEIGHT * broad) / (self.tested.ravel()[cells] + WEIGHT)
        return np.asarray(np.minimum(found, SUREST))

    def count(self, cells: Ints, parents: Ints, path: Ints, ended: Any) -> None:
        """Count a step.

        Args:
            cells: of nodes that were verified, int64 [rows, nodes]; -1 of others.
            parents, path, ended: as of `told`.
        """
        tested, stands = told(cells >= 0, parents, path, ended)
        for counts, counted in ((self.accepted, tested & stands), (self.tested, tested)):
            counts *= KEPT
            counts += np.bincount(cells[counted], minlength=counts.size).reshape(SHAPE)
