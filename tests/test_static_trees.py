"""The best static trees: against every tree there is, against Sequoia's recursion, and against what is counted."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bpkit.draft.static_trees import StaticTree, accepted_by_depth, best_counted, best_static

Path = tuple[int, ...]


def paths(tree: StaticTree) -> list[Path]:
    """Ranks from the anchor to each node; no two nodes are the same."""
    found: list[Path] = []
    for node, (parent, rank) in enumerate(zip(tree.parents.tolist(), tree.ranks.tolist(), strict=True)):
        assert parent < node
        found.append((*(found[parent] if parent >= 0 else ()), rank))
        assert tree.depths[node] == len(found[-1]) - 1
    assert len(set(found)) == len(found)
    return found


def every_path(depths: int, ranks: int) -> list[Path]:
    return [path for depth in range(depths) for path in itertools.product(range(ranks), repeat=depth + 1)]


def every_tree(depths: int, ranks: int, nodes: int) -> list[set[Path]]:
    chosen = (set(some) for some in itertools.combinations(every_path(depths, ranks), nodes))
    return [tree for tree in chosen if all(len(path) == 1 or path[:-1] in tree for path in tree)]


def product(chances: NDArray[np.float64], path: Path) -> float:
    return float(np.prod([chances[depth, rank] for depth, rank in enumerate(path)]))


def tables(depths: int, ranks: int, least: float = 0.01) -> Any:
    rows = st.lists(st.floats(least, 1.0), min_size=ranks, max_size=ranks)
    return st.lists(rows, min_size=depths, max_size=depths).map(np.array)


@settings(max_examples=30, deadline=None)
@given(chances=tables(3, 2), nodes=st.integers(0, 5))
def test_no_tree_of_as_many_nodes_is_worth_more(chances: NDArray[np.float64], nodes: int) -> None:
    """Chances need not fall with the rank, and one row of chances may sum to anything."""
    best = max(sum(product(chances, path) for path in tree) for tree in every_tree(3, 2, nodes))
    made = best_static(chances, nodes)
    assert sum(product(chances, path) for path in paths(made)) == pytest.approx(best)
    assert made.reached.sum() == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(chances=tables(5, 4), most=st.integers(1, 40))
def test_all_sizes_are_those_of_sequoias_recursion(chances: NDArray[np.float64], most: int) -> None:
    """The best forest of n nodes after a node: its first child with some, the later children with the others."""

    @cache
    def forest(depth: int, rank: int, nodes: int) -> float:
        if nodes == 0:
            return 0.0
        if depth == 5 or rank == 4:
            return -np.inf
        with_child = (
            float(chances[depth, rank]) * (1 + forest(depth + 1, 0, under)) + forest(depth, rank + 1, nodes - 1 - under)
            for under in range(nodes)
        )
        return max(forest(depth, rank + 1, nodes), *with_child)

    made = best_static(chances, most)
    wanted = [forest(0, 0, nodes) for nodes in range(1, most + 1)]
    assert np.cumsum(made.reached) == pytest.approx(wanted)


@settings(max_examples=40, deadline=None)
@given(chances=tables(4, 3, 0.0), most=st.integers(0, 12))
def test_trees_of_all_sizes_and_depths_are_the_best_of_each(chances: NDArray[np.float64], most: int) -> None:
    found = accepted_by_depth(chances, most)
    for depth, count in itertools.product(range(4), range(most + 1)):
        assert found[depth, count] == pytest.approx(best_static(chances[: depth + 1], count).reached.sum())


def test_what_is_expected_is_what_is_drawn() -> None:
    """Tokens of independent depths, drawn: as many stand on average as the tree says."""
    chances = np.array([[0.5, 0.2, 0.1], [0.3, 0.4, 0.1], [0.6, 0.1, 0.0]])
    tree = best_static(chances, 9)
    found = paths(tree)
    assert (1,) in found
    assert (0, 1) in found
    drawn = np.random.default_rng(0).random((3, 40000))
    ranks = np.stack([np.searchsorted(np.cumsum(own), row) for own, row in zip(chances, drawn, strict=True)], axis=1)
    accepted = np.zeros(len(ranks))
    for path in found:
        accepted += (ranks[:, : len(path)] == path).all(axis=1)
    assert accepted.mean() == pytest.approx(tree.reached.sum(), abs=0.01)


def test_chains_and_what_cannot_stand() -> None:
    chain = best_static(np.full((6, 1), 0.5), 4)
    assert chain.parents.tolist() == [-1, 0, 1, 2]
    assert chain.ranks.tolist() == [0, 0, 0, 0]
    assert chain.reached.tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert best_static(np.full((2, 1), 0.5), 9).parents.tolist() == [-1, 0]
    assert best_static(np.array([[0.0, 0.5], [0.0, 0.0]]), 9).ranks.tolist() == [1]
    assert best_static(np.zeros((0, 3)), 4).parents.tolist() == []
    for wrong in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            best_static(np.array([[0.5, wrong]]), 3)


def test_trees_of_64_nodes_over_16_candidates() -> None:
    chances = 0.6 * 0.95 ** np.arange(15)[:, None] * 0.35 ** np.arange(16)
    tree = best_static(chances, 64)
    assert len(paths(tree)) == 64
    every = [np.prod(c) for depth in range(1, 8) for c in itertools.product(*chances[:depth, :4])]
    assert tree.reached[:20] == pytest.approx(sorted(every, reverse=True)[:20])


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.lists(st.integers(-1, 1), min_size=3, max_size=3), min_size=1, max_size=9),
    nodes=st.integers(0, 5),
)
def test_no_tree_would_have_had_more_accepted(ranks: list[list[int]], nodes: int) -> None:
    def standing(tree: set[Path]) -> int:
        return sum(tuple(row[: len(path)]) == path for row in ranks for path in tree)

    made = best_counted(np.array(ranks), nodes)
    best = max(map(standing, every_tree(3, 2, nodes)))
    assert standing(set(paths(made))) == best
    assert made.reached.sum() * len(ranks) == pytest.approx(best)
    assert all(value > 0 for value in made.reached)


def test_counted_trees_know_what_depends_on_what() -> None:
    """After the second candidate the second is right, after the first the first: chances by depth cannot say so."""
    ranks = np.array([[0, 0], [1, 1]] * 5)
    assert paths(best_counted(ranks, 4)) == [(0,), (1,), (0, 0), (1, 1)]
    assert best_counted(ranks, 4).reached.tolist() == [0.5] * 4
    by_depth = best_static(np.full((2, 2), 0.5), 4)
    assert by_depth.reached.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert best_counted(np.zeros((4, 0), np.int64), 3).parents.tolist() == []
