"""A tree that was grown level by level, as the host knows it: what is drafted of it, and what stands."""

from __future__ import annotations

from collections.abc import Sequence

from bpkit.decode.trees import TreeShape


def were_read(parents: Sequence[int], branches: int, levels: int) -> list[bool]:
    """Of the nodes of a draft, best first, those that were read: of each level but the deepest the first `branches`.

    Args:
        parents: of each node, by its place; -1 is the anchor. levels: how deep the tree might be.

    >>> were_read([-1, 0, -1, -1, 1, 0], branches=2, levels=3)
    [True, True, True, False, False, True]
    """
    depths, there, found = {-1: 0}, [0] * (levels + 1), list[bool]()
    for node, parent in enumerate(parents):
        depths[node] = depth = depths[parent] + 1
        there[depth] += 1
        found.append(depth < levels and there[depth] <= branches)
    return found


class GrownTree:
    """What was read of one row's tree, on the host.

    Candidates are numbered through all columns of all levels: those of column *c* are `c * branches` and the next ones.

    Args:
        chosen: of each column the candidate that it is, counted from the first of the level before.
        tokens, chances: of each candidate.
        levels: of each the first column and how many are the row's own; the others are padding.

    Attributes:
        columns: candidates that were read, in their order in the cache; -1, the anchor, is the first.
        parents: of each candidate the one that it follows. products: of the chances of its path.
    """

    def __init__(
        self,
        chosen: Sequence[int],
        tokens: Sequence[int],
        chances: Sequence[float],
        levels: Sequence[tuple[int, int]],
        *,
        branches: int,
    ) -> None:
        self.tokens, self.branches = tokens, branches
        self.columns: list[int] = []
        self.parents: dict[int, int] = {}
        self.products, self._column = {-1: 1.0}, dict[int, int]()
        before = 0
        for first, count in levels:
            for column in range(first, first + count):
                own = before * branches + chosen[column] if self.columns else -1
                self.columns.append(own)
                self._column[own] = column
                for candidate in range(column * branches, (column + 1) * branches):
                    self.parents[candidate] = own
                    self.products[candidate] = self.products[own] * chances[candidate]
            before = first

    def order(self, wanted: int | TreeShape) -> list[int]:
        """The candidates to draft, none before its parent: so many of the best, or a shape's as far as it goes."""
        if isinstance(wanted, TreeShape):
            return self._shaped(wanted)
        there = [candidate for candidate in self.parents if self.products[candidate] > 0]
        return sorted(there, key=lambda candidate: -self.products[candidate])[:wanted]

    def _shaped(self, shape: TreeShape) -> list[int]:
        found = {-1: -1}
        for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
            column = self._column.get(found[parent]) if parent in found else None
            candidate = -1 if column is None else column * self.branches + rank
            if column is not None and self.products[candidate] > 0:
                found[node] = candidate
        return list(found.values())[1:]

    def parents_in(self, order: Sequence[int]) -> list[int]:
        """Of drafted candidates the parents, by their places in the draft."""
        places = {-1: -1} | {candidate: place for place, candidate in enumerate(order)}
        return [places[self.parents[candidate]] for candidate in order]

    def path(self, tokens: Sequence[int]) -> list[int]:
        """Where in the cache, after the anchor, those of these tokens are that were read one after the other."""
        children = {(self.parents[own], self.tokens[own]): place for place, own in enumerate(self.columns) if place}
        found, last = list[int](), -1
        for token in tokens:
            if (last, token) not in children:
                break
            found.append(children[last, token])
            last = self.columns[found[-1]]
        return found
