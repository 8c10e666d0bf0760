"""How often candidates of each rank stand at each depth, counted while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit_load.node_chances import told

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FIRST, SECOND, FALL = 0.6, 0.12, 1.2
"""Chances of ranks to expect before any was counted: of rank 0, of rank 1, and how fast further ones fall."""


def expected_chances(ranks: int) -> Floats:
    """Of ranks, before any was counted: float64 [ranks]."""
    return np.array([FIRST, *(SECOND / rank**FALL for rank in range(1, ranks))])


def nodes_left(parents: Sequence[int], ranks: Sequence[int], found: Sequence[int]) -> list[int]:
    """Which nodes of a tree were drafted, if some were ruled out: of children of a node those of the highest ranks.

    Args:
        parents, ranks: of the tree's nodes. found: parents of those that were drafted, by their places among these, in
            the same order.

    >>> nodes_left([-1, 0, -1, 0, 2], [1, 1, 0, 0, 0], [-1, -1])
    [0, 2]
    >>> nodes_left([-1, 0, -1, 0, 2], [1, 1, 0, 0, 0], [-1, 0])
    [2, 4]
    """
    places, left = {-1: -1}, list[int]()
    for node, (parent, rank) in enumerate(zip(parents, ranks, strict=True)):
        if len(left) < len(found) and parent in places:
            better = sum(before == parent and other < rank for before, other in zip(parents, ranks, strict=True))
            if better < found.count(places[parent]):
                places[node] = len(left)
                left.append(node)
    return left


class RankCounts:
    """Counts by depth, from 0, and rank.

        a[d, r] = (accepted[d, r] + w a[d - 1, r]) / (tested[d, r] + w)

    A candidate is tested where the path before it stands. What was counted little leans on the depth before, and the
    first depth on `expected_chances`.

    Attributes:
        accepted, tested: candidates, float64 [depths, ranks].
    """

    def __init__(self, depths: int, ranks: int) -> None:
        self.accepted, self.tested = np.zeros((2, depths, ranks))

    @classmethod
    def of(cls, accepted: Sequence[Sequence[float]], tested: Sequence[Sequence[float]], shape: tuple[int, int]) -> Any:
        """From counts that may be of fewer or more depths and ranks."""
        made = cls(*shape)
        for own, given in ((made.accepted, accepted), (made.tested, tested)):
            known = np.array([row[: shape[1]] for row in given[: shape[0]]])
            own[: len(known), : known.shape[-1]] = known
        return made

    def chances(self, weight: float) -> Floats:
        """That a candidate stands if the path before it does: float64 [depths, ranks]."""
        found = np.zeros_like(self.tested)
        before = expected_chances(found.shape[1])
        for depth, (accepted, tested) in enumerate(zip(self.accepted, self.tested, strict=True)):
            before = found[depth] = (accepted + weight * before) / (tested + weight)
        return found

    def count(self, cells: Ints, parents: Ints, path: Ints, ended: Any, kept: float) -> None:
        """Count a step, whose nodes were all verified.

        Args:
            cells: of the nodes of each row, depth * ranks + rank, int64 [rows, nodes]; -1 where there is none.
            parents, path, ended: as of `told`.
            kept: weight of what was counted before.
        """
        tested, stands = told(cells >= 0, parents, path, ended)
        for counts, counted in ((self.accepted, tested & stands), (self.tested, tested)):
            counts *= kept
            counts += np.bincount(cells[counted], minlength=counts.size).reshape(counts.shape)
