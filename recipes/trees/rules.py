"""Rules that choose a tree of so many nodes for every step, each with choices to be tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpkit.decode.trees import TreeShape
from bpkit.draft.static_trees import StaticTree, best_counted, best_static
from bpkit.trace.oracle import budgets
from bpkit.trace.records import Ints
from recipes.trees.drafts import MOST, KeptDrafts

CHAIN = "chain"
LONGEST, BRANCHES = 8, (2, 3, 4)
"""Of delayed trees (2602.16994): tokens of the trunk and of each branch, and how many of these."""
Choice = Any
"""What a rule leaves open, as a plain JSON value."""


@dataclass(frozen=True)
class NodeRule:
    """Chooses trees of so many nodes at most.

    Attributes:
        choices: what may be chosen for a number of nodes.
        accepted: tokens accepted at each position of a prompt, by choice and nodes, int32 [rows].
    """

    choices: Callable[[int], Sequence[Choice]]
    accepted: Callable[[KeptDrafts, Choice, int], Ints]


def rules_of(drafts: Sequence[KeptDrafts], branches: int) -> dict[str, NodeRule]:
    """All rules; static trees are learned from the drafts, which are those of validation prompts.

    `chain` is the best candidates, drafted at any block size and cut. `best_first` are the nodes of the highest
    products of the drafter's chances, as EAGLE-2 takes them, and as `fixed` does. `sequoia` is the best static tree by
    how often ranks are right at depths, `counted` the one by how often whole paths are, and `delayed` a trunk with
    branches at its end.
    """
    sizes, largest = list(drafts[0].sizes), drafts[0].sizes[-1]
    by_rank: dict[int, StaticTree] = {}
    by_path: dict[int, StaticTree] = {}
    for column, size in enumerate(sizes):
        known = np.concatenate([_known(each, column)[:, : size - 1] for each in drafts])
        by_rank[size] = best_static(budgets.rank_chances(known, branches), MOST)
        by_path[size] = best_counted(np.where(known < branches, known, -1), MOST)
    return {
        CHAIN: NodeRule(lambda nodes: sizes, _of_chains),
        # A tree of fewer nodes than the block has tokens may be cut from one of a larger block, but not the other way.
        "best_first": NodeRule(lambda nodes: [s for s in sizes if s >= min(nodes + 1, largest)], _of_best_first),
        "sequoia": _static(by_rank, sizes),
        "counted": _static(by_path, sizes),
        "delayed": NodeRule(lambda nodes: _delayed(nodes, sizes, branches), _of_delayed),
    }


def best_nodes(drafts: KeptDrafts, nodes: int, branches: int) -> Ints:
    """Tokens accepted where the best nodes of the best block size are known: int32 [rows]."""
    reached = [
        budgets.accepted(budgets.of_paths(drafts.ranks[:, column], branches), nodes, drafts.room)
        for column in range(len(drafts.sizes))
    ]
    return np.asarray(np.max(reached, axis=0))


def _known(drafts: KeptDrafts, column: int) -> Ints:
    """As `budgets.known_ranks`."""
    ranks = drafts.ranks[:, column]
    return np.where(np.arange(ranks.shape[1]) <= drafts.room[:, None], ranks, -1)


def _of_chains(drafts: KeptDrafts, size: int, nodes: int) -> Ints:
    return budgets.accepted(budgets.of_chains(drafts.ranks[:, drafts.column(size)]), nodes, drafts.room)


def _of_best_first(drafts: KeptDrafts, size: int, nodes: int) -> Ints:
    return budgets.accepted(drafts.best_first[:, drafts.column(size)], nodes, drafts.room)


def _static(trees: dict[int, StaticTree], sizes: Sequence[int]) -> NodeRule:
    """The best trees of blocks of each size; a tree is drafted by a block that is no larger than it is deep."""

    def accepted(drafts: KeptDrafts, size: int, nodes: int) -> Ints:
        return _of_tree(drafts, trees[size].first(nodes))

    return NodeRule(lambda nodes: sizes, accepted)


def _of_tree(drafts: KeptDrafts, tree: StaticTree) -> Ints:
    """Drafted by the smallest traced block that is as deep."""
    size = min(size for size in drafts.sizes if size >= int(tree.depths.max(initial=0)) + 2)
    ranks = drafts.ranks[:, drafts.column(size)]
    return budgets.accepted(budgets.of_static(tree, ranks), len(tree.parents), drafts.room)


def _delayed(nodes: int, sizes: Sequence[int], branches: int) -> list[list[int]]:
    """Branches, and tokens of the trunk and of each branch, of delayed trees of at most so many nodes."""
    return [
        [count, trunk, length]
        for count in BRANCHES
        if count <= branches
        for trunk in range(LONGEST + 1)
        for length in range(1, LONGEST + 1)
        if trunk + count * length <= nodes and trunk + length < sizes[-1]
    ]


def _of_delayed(drafts: KeptDrafts, shape: Sequence[int], nodes: int) -> Ints:
    count, trunk, length = shape
    tree = TreeShape.delayed(count, trunk, length)
    parents, ranks, depths = (np.array(values) for values in (tree.parents, tree.ranks, tree.depths))
    return _of_tree(drafts, StaticTree(parents, ranks, depths - 1, np.zeros(len(ranks))))
