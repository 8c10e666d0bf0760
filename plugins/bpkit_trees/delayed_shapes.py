"""Delayed trees (2602.16994): which there are. Imports neither torch nor numpy."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

BRANCHES, LENGTHS = range(2, 5), range(9)
"""K of trees, and L1 and L2, as published."""


class DelayedTree(NamedTuple):
    """A trunk of the best candidates, and after it paths that begin with the best ones and go on with the best.

    Attributes:
        branches: paths; 1 of a chain, which is all trunk. trunk: its tokens. length: tokens of each path.
    """

    branches: int
    trunk: int
    length: int

    @property
    def nodes(self) -> int:
        return self.trunk + self.branches * self.length

    @property
    def deepest(self) -> int:
        """Tokens of the longest path."""
        return self.trunk + self.length


def delayed_trees(most_branches: int, deepest: int) -> list[DelayedTree]:
    """Every shape once, by nodes, that without any first: chains, and trees of two branches or more.

    Args:
        most_branches: candidates that a drafter has at each position. deepest: tokens of the longest path.

    >>> [tuple(shape) for shape in delayed_trees(2, 2)]
    [(1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 0, 1), (2, 1, 1), (2, 0, 2)]
    """
    chains = [DelayedTree(1, length, 0) for length in range(2 * LENGTHS[-1] + 1)]
    trees = [DelayedTree(*sizes) for sizes in product(BRANCHES, LENGTHS, LENGTHS[1:])]
    fitting = [one for one in chains + trees if one.branches <= most_branches and one.deepest <= deepest]
    return sorted(fitting, key=lambda one: (one.nodes, one.branches, one.deepest))
