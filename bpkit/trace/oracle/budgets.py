"""Trees of so many nodes, chosen by several rules, over drafts that were traced with their candidates.

A rule puts the nodes of a draft in an order, and a tree of n nodes is its first n. Of the nodes only those of the
output's own path matter: `places` are theirs in that order, by depth. So many tokens are accepted of a tree of n nodes
as leading places are below n, whatever n is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bpkit.draft.best_first import best_first
from bpkit.draft.static_trees import StaticTree
from bpkit.trace.records import CandidateTable, Ints

NEVER = np.iinfo(np.int32).max
"""Place of a node that is not drafted."""


def accepted(places: Ints, nodes: int, most: Ints) -> Ints:
    """Tokens accepted of trees of so many nodes, int32 [rows].

    Args:
        places: of the path's nodes by depth, int32 [rows, width]. most: of each row, int32 [rows].
    """
    leading = np.logical_and.accumulate(places < nodes, axis=1).sum(axis=1)
    return np.asarray(np.minimum(leading, most), np.int32)


def of_paths(ranks: Ints, branches: int) -> Ints:
    """The best order in hindsight: the path itself. int32 [rows, width].

    Args:
        ranks: of one size, as in `CandidateTable`, int32 [rows, width].
    """
    return _leading((ranks >= 0) & (ranks < branches))


def of_chains(ranks: Ints) -> Ints:
    """The chain of the best candidates."""
    return _leading(ranks == 0)


def of_static(tree: StaticTree, ranks: Ints) -> Ints:
    """The nodes of a static tree in their order."""
    nodes, branches = len(tree.parents), int(max(ranks.max(initial=0), tree.ranks.max(initial=0))) + 1
    children = np.full((nodes + 2, branches), nodes)  # of each node, then of none, which is followed by none, and last
    children[tree.parents, tree.ranks] = np.arange(nodes)  # of the anchor, where -1 looks
    found, at = np.full(ranks.shape, NEVER, np.int32), np.full(len(ranks), -1)
    for depth in range(ranks.shape[1]):
        at = np.where(ranks[:, depth] < 0, nodes, children[at, ranks[:, depth]])
        found[:, depth] = np.where(at == nodes, NEVER, at)
    return found


def of_best_first(
    candidates: CandidateTable, column: int, most: int, branches: int
) -> tuple[Ints, NDArray[np.float64]]:
    """By falling products of the drafter's chances, up to so many nodes: what EAGLE-2 and `best_first` take.

    Returns:
        Also these products, 0 where there are no more nodes: float64 [rows, most].
    """
    ranks = candidates.ranks[:, column]
    found, reached = np.full(ranks.shape, NEVER, np.int32), np.zeros((len(ranks), most))
    width = (ranks >= 0).sum(axis=1).tolist()
    for row, (count, own) in enumerate(zip(width, ranks.tolist(), strict=True)):
        chances = candidates.chances[row, column, :count, :branches].astype(np.float64).tolist()
        at, depth, products = -1, 0, list[float]()
        for place, node in enumerate(best_first(chances, most)):
            products.append(node.chance * (products[node.parent] if node.parent >= 0 else 1.0))
            if node.parent == at and node.rank == own[node.position]:
                found[row, depth] = place
                at, depth = place, depth + 1
        reached[row, : len(products)] = products
    return found, reached


def known_ranks(candidates: CandidateTable, column: int, most: Ints) -> Ints:
    """Ranks of one size that are of a token of the output, -1 behind its end: int32 [rows, width]."""
    ranks = candidates.ranks[:, column]
    return np.where(np.arange(ranks.shape[1]) <= most[:, None], ranks, -1).astype(np.int32)


def rank_chances(ranks: Ints, branches: int) -> NDArray[np.float64]:
    """How often the output's own token had a rank at a depth, where all before it were among the candidates.

    Args:
        ranks: `known_ranks` of the drafts to count, int32 [drafts, width].

    Returns:
        float64 [width, branches]; 0 at depths that no path came to.
    """
    there = (ranks >= 0) & (ranks < branches)
    drafted = (ranks >= 0) & np.concatenate([np.ones_like(there[:, :1]), _all(there)[:, :-1]], axis=1)
    counts = np.stack([(drafted & (ranks == rank)).sum(axis=0) for rank in range(branches)], axis=1)
    return np.asarray(counts / np.maximum(drafted.sum(axis=0), 1)[:, None], np.float64)


def _all(there: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(np.logical_and.accumulate(there, axis=1))


def _leading(there: NDArray[np.bool_]) -> Ints:
    """Depths while all are there, `NEVER` from then on."""
    return np.where(_all(there), np.arange(there.shape[1]), NEVER).astype(np.int32)
