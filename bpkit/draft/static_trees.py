"""The best trees that are the same in every step: which ranks to draft at which depths, from how often they are right.

Sequoia (2402.12374) finds them by dynamic programming over nodes and depths. What a node is worth, the chance that its
path stands, is a product here, so that no node is worth more than its parent: the n nodes of the largest products are a
tree, no other tree of n is worth more, and it holds the best ones of fewer nodes.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bpkit.draft.best_first import best_first

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class StaticTree(NamedTuple):
    """A tree whose first n nodes are the best tree of n nodes, for every n.

    Attributes:
        parents: node that each follows, which is before it; -1 is the anchor. ranks: of the candidates after that one,
            0 the best. depths: from 0. All int64 [nodes].
        reached: chance that each stands with all before it on its path, falling, float64 [nodes]. The first n sum to
            the tokens that the best tree of n nodes is expected to have accepted.
    """

    parents: Ints
    ranks: Ints
    depths: Ints
    reached: Floats

    def first(self, nodes: int) -> StaticTree:
        """The best tree of at most so many nodes."""
        return StaticTree(self.parents[:nodes], self.ranks[:nodes], self.depths[:nodes], self.reached[:nodes])


def best_static(chances: Floats, most: int) -> StaticTree:
    """The tree of the most accepted tokens, expected, where depths do not depend on each other.

    Args:
        chances: that the target's token is the candidate of a rank at a depth, provided that the path before it stands,
            float64 [depths, ranks], in any order of ranks. A tree is at most so deep and has at most so many children
            of a node.
        most: nodes; there are fewer where no more can stand.

    Raises:
        ValueError: a chance is not between 0 and 1.

    >>> best_static(np.array([[0.6, 0.3], [0.1, 0.9]]), 4).ranks.tolist()
    [0, 1, 1, 1]
    """
    if not ((chances >= 0) & (chances <= 1)).all():
        raise ValueError("chances of ranks by depth must be between 0 and 1")
    order = np.argsort(-chances, axis=1, kind="stable")
    nodes = best_first(np.take_along_axis(chances, order, axis=1).tolist(), most)
    reached: list[float] = []
    for node in nodes:
        reached.append(node.chance * (reached[node.parent] if node.parent >= 0 else 1.0))
    parents, depths, places = np.array([node[:3] for node in nodes], np.int64).reshape(-1, 3).T
    return StaticTree(parents, order[depths, places], depths, np.array(reached))


def accepted_by_depth(chances: Floats, most: int) -> Floats:
    """Accepted tokens, expected, of the best trees that are at most 1, 2, ... deep: float64 [depths, most + 1].

    Args:
        chances: as of `best_static`.

    Returns:
        By the largest depth, and by nodes from 0 on; where there are no more nodes, as of all.

    >>> accepted_by_depth(np.array([[0.5, 0.25], [0.5, 0.25]]), 3).tolist()
    [[0.0, 0.5, 0.75, 0.75], [0.0, 0.5, 0.75, 1.0]]
    """
    found = np.zeros((len(chances), most + 1))
    level, best = np.ones(1), np.zeros(0)
    for depth, own in enumerate(chances):
        # Of a level no more than `most` nodes are in a tree, nor is what follows the others.
        level = _largest(np.outer(level, own).ravel(), most)
        best = _largest(np.concatenate([best, level]), most)
        found[depth, 1 : len(best) + 1] = best.cumsum()
        found[depth, len(best) + 1 :] = best.sum()
    return found


def _largest(values: Floats, most: int) -> Floats:
    """Falling."""
    return -np.sort(-values)[:most]


def best_counted(ranks: Ints, most: int) -> StaticTree:
    """The tree that would have had the most tokens accepted over drafts that were made, whatever depends on what.

    Args:
        ranks: of the output's own token among the candidates at each depth, int64 [drafts, depths]; -1, and anything
            behind it, where it is none that may be drafted.
        most: nodes; there are fewer where no more would ever have stood.

    >>> best_counted(np.array([[0, 0], [0, 1], [1, 1], [1, 1], [-1, 0]]), 3).reached.tolist()
    [0.4, 0.4, 0.4]
    """
    drafts, deepest = ranks.shape
    nodes: list[tuple[int, int, int]] = []
    reached: list[float] = []
    # By falling numbers of drafts that a node would stand in: those numbers, an order of equals, and the node.
    ahead: list[tuple[int, int, int, int, int, Ints]] = []

    def push(parent: int, depth: int, inside: Ints) -> None:
        own = ranks[inside, depth]
        for rank in np.unique(own[own >= 0]).tolist():
            standing = inside[own == rank]
            heapq.heappush(ahead, (-len(standing), depth, parent, rank, len(nodes), standing))

    if deepest:
        push(-1, 0, np.arange(drafts))
    while ahead and len(nodes) < most:
        _, depth, parent, rank, _, standing = heapq.heappop(ahead)
        nodes.append((parent, rank, depth))
        reached.append(len(standing) / drafts)
        if depth + 1 < deepest:
            push(len(nodes) - 1, depth + 1, standing)
    parents, own_ranks, depths = np.array(nodes, np.int64).reshape(-1, 3).T
    return StaticTree(parents, own_ranks, depths, np.array(reached))
