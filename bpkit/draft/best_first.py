"""The best tree over candidates of each position, where these do not depend on each other."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Node(NamedTuple):
    """A token of a tree.

    Attributes:
        parent: node that it follows, by its place among the nodes; -1 is the anchor.
        position: in the block, from 0, which is the depth less one. rank: among that position's candidates, from 0.
        chance: of that candidate.
    """

    parent: int
    position: int
    rank: int
    chance: float


def best_first(chances: Sequence[Sequence[float]], most: int) -> list[Node]:
    """The beginnings with the highest products of chances, the best first; no node comes before its parent.

    Args:
        chances: of the candidates at each position, falling. most: nodes.

    >>> [(node.parent, node.position, node.rank) for node in best_first([[0.6, 0.3], [0.9, 0.1]], 4)]
    [(-1, 0, 0), (0, 1, 0), (-1, 0, 1), (2, 1, 0)]
    """
    nodes: list[Node] = []
    # Ranks follow each other, so that of a node's children and later siblings only the best can be next.
    ahead = [(-chances[0][0], 0, 0, -1, 1.0)] if chances else []
    while ahead and len(nodes) < most:
        reached, position, rank, parent, before = heapq.heappop(ahead)
        if not reached < 0:  # what is ruled out, and all that follows it
            break
        candidates = chances[position]
        nodes.append(Node(parent, position, rank, candidates[rank]))
        if rank + 1 < len(candidates):
            heapq.heappush(ahead, (-before * candidates[rank + 1], position, rank + 1, parent, before))
        if position + 1 < len(chances):
            heapq.heappush(ahead, (reached * chances[position + 1][0], position + 1, 0, len(nodes) - 1, -reached))
    return nodes
