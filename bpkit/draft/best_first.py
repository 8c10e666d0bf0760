"""Trees over candidates, the best one or a given one: of each position, where they are independent, or of each node."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from bpkit.decode.trees import TreeShape


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


Children = Callable[[int, Node | None], Sequence[float]]
"""Chances of the candidates after a node, falling. It is told by its place among the nodes; after -1, None the anchor's
are."""


def best_first(chances: Sequence[Sequence[float]], most: int) -> list[Node]:
    """The beginnings with the highest products of chances, the best first; no node comes before its parent.

    Args:
        chances: of the candidates at each position, falling. most: nodes.

    >>> [(node.parent, node.position, node.rank) for node in best_first([[0.6, 0.3], [0.9, 0.1]], 4)]
    [(-1, 0, 0), (0, 1, 0), (-1, 0, 1), (2, 1, 0)]
    """
    positions = [*chances, ()]
    return list(islice(best_nodes(lambda place, node: positions[0 if node is None else node.position + 1]), most))


def best_nodes(children: Children) -> Iterator[Node]:
    """All of them, one by one, where candidates depend on the path.

    Args:
        children: is asked once for each node, in their order, when the next one is wanted.
    """
    below = [children(-1, None)]
    # Ranks follow each other, so that of a node's children and later siblings only the best can be next.
    ahead = [(-chance, 0, 0, -1, 1.0) for chance in below[0][:1]]
    while ahead:
        reached, position, rank, parent, before = heapq.heappop(ahead)
        if not reached < 0:  # what is ruled out, and all that follows it
            break
        candidates = below[parent + 1]
        node = Node(parent, position, rank, candidates[rank])
        yield node
        if rank + 1 < len(candidates):
            heapq.heappush(ahead, (-before * candidates[rank + 1], position, rank + 1, parent, before))
        place = len(below) - 1
        below.append(children(place, node))
        if below[-1]:
            heapq.heappush(ahead, (reached * below[-1][0], position + 1, 0, place, -reached))


def shaped(chances: Sequence[Sequence[float]], shape: TreeShape) -> list[Node]:
    """The nodes of a tree in its order, without those that are ruled out or not there, and all that follow them.

    >>> tree = shaped([[0.6, 0.3], [1.0, 0.0]], TreeShape((-1, 0, 0, -1, 3), (0, 1, 0, 1, 0)))
    >>> [(node.parent, node.rank, node.chance) for node in tree]
    [(-1, 0, 0.6), (0, 0, 1.0), (-1, 1, 0.3), (2, 0, 1.0)]
    """
    positions = [*chances, ()]
    return shaped_nodes(lambda place, node: positions[0 if node is None else node.position + 1], shape)


def shaped_nodes(children: Children, shape: TreeShape) -> list[Node]:
    """The same where candidates depend on the path, of nodes that have children in the shape."""
    nodes: list[Node] = []
    places, below = {-1: -1}, dict[int, Sequence[float]]()
    for place, (parent, rank, depth) in enumerate(zip(shape.parents, shape.ranks, shape.depths, strict=True)):
        if parent not in places:
            continue
        if parent not in below:
            at = places[parent]
            below[parent] = children(at, None if at < 0 else nodes[at])
        if rank < len(below[parent]) and below[parent][rank] > 0:
            places[place] = len(nodes)
            nodes.append(Node(places[parent], depth - 1, rank, below[parent][rank]))
    return nodes
