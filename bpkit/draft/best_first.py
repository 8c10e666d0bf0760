"""The best tree over candidates: of each position, where these do not depend on each other, or of each node."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Node(NamedTuple):
    """A token of a tree.

    Attributes:
        parent: node that it follows, by its place among the nodes; -1 is the anchor.
        position: in the block, from 0, which is the depth less one. rank: among the candidates there, from 0.
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
    positions = [*chances, ()]
    return best_nodes(lambda node: positions[0 if node is None else node.position + 1], most)


def best_nodes(children: Callable[[Node | None], Sequence[float]], most: int) -> list[Node]:
    """The same where candidates depend on the path.

    Args:
        children: chances of the candidates after the anchor (None) or a node, falling. It is asked once for each node,
            in their order.
    """
    if most < 1:
        return []
    nodes: list[Node] = []
    below = [children(None)]
    # Ranks follow each other, so that of a node's children and later siblings only the best can be next.
    ahead = [(-chance, 0, 0, -1, 1.0) for chance in below[0][:1]]
    while ahead:
        reached, position, rank, parent, before = heapq.heappop(ahead)
        if not reached < 0:  # what is ruled out, and all that follows it
            break
        candidates = below[parent + 1]
        nodes.append(Node(parent, position, rank, candidates[rank]))
        if len(nodes) == most:
            break
        if rank + 1 < len(candidates):
            heapq.heappush(ahead, (-before * candidates[rank + 1], position, rank + 1, parent, before))
        below.append(children(nodes[-1]))
        if below[-1]:
            heapq.heappush(ahead, (reached * below[-1][0], position + 1, 0, len(nodes) - 1, -reached))
    return nodes
