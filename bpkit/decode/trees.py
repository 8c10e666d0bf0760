"""Trees of drafted tokens as one pass of the target reads them, and which of their nodes are verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bpkit.decode.text import to_device


@dataclass(frozen=True, slots=True)
class Tree:
    """The shape of the rows of a pass: the anchor in column 0, and node *i* of those that are verified in column i + 1.

    Attributes:
        parents: column of each node's parent, of each row, without padding.
        parent: the same, int64 [rows, width]; 0 of padding.
        depth: of each column, int64 [rows, 1 + width]; 0 of the anchor and of padding.
        above: whether a column is another or comes before it on its path, bool [rows, 1 + width, 1 + width]: of padding
            the anchor does.
        deepest: the largest depth.
    """

    parents: list[list[int]]
    parent: Tensor
    depth: Tensor
    above: Tensor
    deepest: int

    @classmethod
    def of(cls, parents: Sequence[Sequence[int]], device: torch.device) -> Tree:
        """From the parents of each row's nodes: a node before them, or -1, which is the anchor."""
        rows, width = len(parents), max(map(len, parents))
        parent = np.zeros((rows, width), np.int64)
        depth = np.zeros((rows, width + 1), np.int64)
        above = np.zeros((rows, width + 1, width + 1), bool)
        above[:, :, 0] = True
        for row, nodes in enumerate(parents):
            for column, before in enumerate(nodes, 1):
                parent[row, column - 1] = before + 1
                depth[row, column] = depth[row, before + 1] + 1
                above[row, column] |= above[row, before + 1]
                above[row, column, column] = True
        sent = [torch.from_numpy(value).to(device, non_blocking=True) for value in (parent, depth, above)]
        return cls([[before + 1 for before in nodes] for nodes in parents], sent[0], sent[1], sent[2], int(depth.max()))

    @property
    def counts(self) -> list[int]:
        """Columns of each row, its anchor among them."""
        return [len(nodes) + 1 for nodes in self.parents]

    @property
    def first(self) -> list[int]:
        """Columns of each row that were read before."""
        return [0] * len(self.parents)

    @property
    def queries(self) -> Tensor:
        """Depths of the columns that a pass reads, int64 [rows, 1 + width]."""
        return self.depth


@dataclass(frozen=True, slots=True)
class Level:
    """The newest columns of trees, all of one depth, in a pass of their own: those before them were read by others.

    Attributes:
        counts: columns of each row in the pass. first: those of each row before them, its anchor among them.
        depth: of all columns, these included, int64 [rows, columns].
        above: which of them are on the path of one of these, itself included, bool [rows, width, columns].
        deepest: depth of these.
    """

    counts: list[int]
    first: list[int]
    depth: Tensor
    above: Tensor
    deepest: int

    @property
    def queries(self) -> Tensor:
        """Depths of the columns that the pass reads, int64 [rows, width]."""
        return self.depth.new_full(self.above.shape[:2], self.deepest)

    def on(self, device: torch.device) -> Level:
        """The same on a device."""
        return replace(self, depth=self.depth.to(device), above=self.above.to(device))


@dataclass(frozen=True, slots=True)
class VerifiedNodes:
    """Which nodes of drafted trees are verified.

    Attributes:
        places: in the draft, of each row, ascending.
        tree: their shape; None where the nodes of every row are a chain, which is verified like any other.
    """

    places: list[list[int]]
    tree: Tree | None

    @classmethod
    def of(
        cls,
        parents: Sequence[Sequence[int]],
        kept: Sequence[Sequence[int]],
        deepest: Sequence[int],
        device: torch.device,
    ) -> VerifiedNodes:
        """The kept nodes of each row down to its largest depth.

        Args:
            parents: of all drafted nodes. kept: ascending, each node's parent among them.
        """
        places, left = [], []
        for before, nodes, most in zip(parents, kept, deepest, strict=True):
            column, depth, own = {-1: -1}, {-1: 0}, list[int]()
            for node in nodes:
                depth[node] = depth[before[node]] + 1
                if depth[node] <= most:
                    column[node] = len(own)
                    own.append(node)
            places.append(own)
            left.append([column[before[node]] for node in own])
        if all(nodes == list(range(-1, len(nodes) - 1)) for nodes in left):
            return cls(places, None)
        return cls(places, Tree.of(left, device))

    def tokens(self, drafted: Tensor) -> Tensor:
        """Of drafted tokens, int64 [rows, nodes], those that are verified: [rows, width], with padding behind them."""
        width = max(map(len, self.places))
        at = [[*row, *[0] * (width - len(row))] for row in self.places]
        return drafted.gather(1, to_device(at, drafted.device)) if width else drafted[:, :0]


@dataclass(frozen=True, slots=True)
class TreeShape:
    """A tree that a drafter is to draft for one row, instead of the one that it would choose.

    Attributes:
        parents: of each node the one that it follows, which is before it; -1 is the anchor.
        ranks: which of the candidates after its parent each node is, 0 the best.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> list[int]:
        """Of each node, 1 after the anchor."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent + 1] + 1)
        return depths[1:]

    @property
    def deepest(self) -> int:
        """The largest depth; 0 of no nodes."""
        return max(self.depths, default=0)

    @classmethod
    def chain(cls, length: int) -> TreeShape:
        """The best candidate after the best candidate."""
        return cls(tuple(range(-1, length - 1)), (0,) * length)

    @classmethod
    def delayed(cls, branches: int, trunk: int, length: int) -> TreeShape:
        """A path of `trunk` tokens, and so many further ones of `length` tokens after its end; the best comes first.

        Delayed tree expansion (2602.16994). What begins with the candidates of rank 0, 1, ... goes on with the best.

        >>> TreeShape.delayed(2, trunk=1, length=2)
        TreeShape(parents=(-1, 0, 1, 0, 3), ranks=(0, 0, 0, 1, 0))
        """
        parents, ranks = list(range(-1, trunk - 1)), [0] * trunk
        for rank in range(branches if length else 0):
            first = len(parents)
            parents += [trunk - 1, *range(first, first + length - 1)]
            ranks += [rank] + [0] * (length - 1)
        return cls(tuple(parents), tuple(ranks))


Shapes = Sequence[TreeShape | None]
"""Of each row the tree to draft, or None where that is the drafter's choice."""


def wanted_trees(
    block_size: Sequence[int], shapes: Shapes | None, largest: int
) -> tuple[list[int | TreeShape], list[int]]:
    """Of each row the tree to draft, or how many nodes; and the block that is as deep.

    Args:
        largest: block of a tree that the drafter chooses.

    >>> wanted_trees([9, 4], [None, TreeShape.delayed(2, trunk=1, length=1)], largest=4)
    ([8, TreeShape(parents=(-1, 0, 0), ranks=(0, 0, 1))], [4, 3])
    """
    wanted = [shape or size - 1 for shape, size in zip(shapes or [None] * len(block_size), block_size, strict=True)]
    return wanted, [tree.deepest + 1 if isinstance(tree, TreeShape) else min(tree + 1, largest) for tree in wanted]


def chain(width: int, rows: int) -> Tensor:
    """The parents of drafts without branches, int64 [rows, width]."""
    return torch.arange(-1, width - 1).expand(rows, width)


def closed(kept: Sequence[bool], parents: Sequence[int]) -> list[int]:
    """Of the kept nodes of a row those whose ancestors are all kept.

    >>> closed([True, False, True, True], [-1, 0, 1, 0])
    [0, 3]
    """
    inside: set[int] = {-1}
    for node, (keeps, before) in enumerate(zip(kept, parents, strict=False)):
        if keeps and before in inside:
            inside.add(node)
    return sorted(inside - {-1})
