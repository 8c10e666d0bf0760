"""Trees that grow level by level, where what may come next depends on the path.

After EAGLE-2 (Li et al. 2024, 2406.16858): of each level the nodes with the highest products of chances are read, and
of all candidates that came up the best are drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from bpkit.decode.drafter import Proposal
from bpkit.decode.host import to_host
from bpkit.decode.sampling import Draw, chances
from bpkit.decode.text import to_device
from bpkit.decode.trees import Level, TreeShape
from bpkit.draft.grown_tree import GrownTree


class ReadLevel(NamedTuple):
    """The columns that were read at a depth, and what may come after each.

    Attributes:
        chosen: which of the last level's candidates each column is, counted over all of its columns, int64 [rows,
            width]; the anchor's 0.
        scores: processed, float32 [rows, width, vocab]. hidden: the drafter's states, [rows, width, hidden].
        tokens: the best candidates after each column, int64 [rows, width, branches].
        chances: of these, float32 alike.
    """

    chosen: Tensor
    scores: Tensor
    hidden: Tensor
    tokens: Tensor
    chances: Tensor


class Growth:
    """Trees of all rows, from one level to the next, on the device: the host need not know what they hold.

    Where the drafter chooses, the `branches` candidates with the highest products of chances are read at each level.
    Of a shape those nodes are read that have children.

    Args:
        draw: that has drawn nothing yet. Candidates are ordered by score plus the noise of their output position.
        branches: candidates after each column.
        wanted: of each row its tree, or how many nodes the best one is to have.
        levels: how deep each row's tree may be; 0 of rows that do not draft.
    """

    def __init__(self, draw: Draw, branches: int, wanted: Sequence[int | TreeShape], levels: Sequence[int]) -> None:
        self.samplers, self.position = draw.samplers, draw.position
        self.branches, self.wanted, self.levels = branches, wanted, levels
        self.named = [
            columns_of(tree, depth) if isinstance(tree, TreeShape) else None
            for tree, depth in zip(wanted, levels, strict=True)
        ]
        self.counts = [[self._count(row, depth) for row in range(len(levels))] for depth in range(max(levels))]
        """Columns of each row at each depth."""
        self.read: list[ReadLevel] = []
        self.foreign = any(row.processors.rollback.foreign for row in self.samplers.rows)
        self.history = torch.empty(0)
        """Logits along the path of each of the last columns, [rows, columns, 1 + depth, vocab], if `foreign`."""

    def _count(self, row: int, depth: int) -> int:
        if depth >= self.levels[row]:
            return 0
        named = self.named[row]
        if named is not None:
            return len(named[depth])
        return self.branches if depth else 1

    def take(self, logits: Tensor, hidden: Tensor) -> None:
        """What the drafter gives after the columns of the next level, [rows, width, vocab] and [rows, width, hidden].

        The first are the anchors.
        """
        depth, counts = len(self.read), self.counts[len(self.read)]
        if depth == 0:
            self.chosen = logits.new_zeros((len(logits), 1), dtype=torch.long)
            self.reach, self.paths = torch.ones_like(self.chosen, dtype=torch.float), self.chosen[..., None][..., :0]
        if self.foreign:
            latest = logits[:, :, None]
            self.history = torch.cat([self._of_parents(self.history), latest], dim=2) if depth else latest
        scores = self._scores(logits, counts)
        noisy = self._noisy(scores, counts)
        tokens = noisy.topk(self.branches, dim=-1).indices
        of_target = chances(noisy, tokens, [row.noise is not None for row in self.samplers.rows])
        self.read.append(ReadLevel(self.chosen, scores, hidden, tokens, of_target))

    def next(self) -> tuple[Tensor, Level] | None:
        """The columns to read next, int64 [rows, width], and where they are; None after the last level."""
        depth = len(self.read)
        if depth == len(self.counts):
            return None
        last = self.read[-1]
        reach = (self.reach[..., None] * last.chances).flatten(1)
        self.chosen = self._choose(reach, depth)
        tokens, self.reach = last.tokens.flatten(1).gather(1, self.chosen), reach.gather(1, self.chosen)
        self.paths = torch.cat([self._of_parents(self.paths), tokens[..., None]], dim=2)
        return tokens, self._level(depth)

    def _choose(self, reach: Tensor, depth: int) -> Tensor:
        """Which candidates are the columns at a depth, int64 [rows, width].

        Args:
            reach: the products of chances of all candidates of the last level, float32 [rows, columns * branches].
        """
        device, width = reach.device, max(self.counts[depth])
        tables = [row[depth] if row is not None and depth < len(row) else [] for row in self.named]
        named = [[parent * self.branches + rank for parent, rank in table] for table in tables]
        given = to_device([[*row, *[0] * (width - len(row))] for row in named], device)
        if None not in self.named:
            return given
        # Columns of padding have no candidates.
        there = to_device(self.counts[depth - 1], device)[:, None] * self.branches
        reach = reach.where(torch.arange(reach.shape[1], device=device) < there, -1.0)
        best = reach.topk(min(width, reach.shape[1]), dim=1).indices
        best = torch.nn.functional.pad(best, (0, width - best.shape[1]))
        return best.where(to_device([row is None for row in self.named], device)[:, None], given)

    def _level(self, depth: int) -> Level:
        """Where the columns at a depth are, and which of those before them are on their paths."""
        counts, device = self.counts[depth], self.reach.device
        first = [sum(before) for before in zip(*self.counts[:depth], strict=True)]
        depths = [
            [at for at, of_rows in enumerate(self.counts) for _ in range(of_rows[row])] for row in range(len(counts))
        ]
        most = max(map(len, depths))
        if depth == 1:
            self.depths = to_device([[*row, *[0] * (most - len(row))] for row in depths], device)
            self.above = torch.arange(most, device=device).eq(0).expand(len(counts), 1, most)
        self.above = self._of_parents(self.above)
        own = to_device(first, device)[:, None] + torch.arange(max(counts), device=device)
        self.above.scatter_(2, own.clamp(max=most - 1)[..., None], True)
        return Level(counts, first, self.depths, self.above, depth)

    def _of_parents(self, values: Tensor) -> Tensor:
        """Of values of the last columns, [rows, columns, ...], those of the parents of the next ones."""
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, self.chosen // self.branches]

    # What may come after columns

    def _scores(self, logits: Tensor, counts: Sequence[int]) -> Tensor:
        """Processed scores after each column: float32 [rows, width, vocab]."""
        nothing = self.paths[:, 0, :0]
        if all(row.processors.prefix_free for row in self.samplers.rows):
            return self.samplers.scores(logits, nothing, nothing, counts)
        scores = logits.float().clone()
        for place, count in enumerate(counts):
            for column in range(count):
                scores[place, column] = self._after_path(logits, place, column)
        return scores

    def _after_path(self, logits: Tensor, place: int, column: int) -> Tensor:
        """The same after one column where processors look at its path: [vocab]."""
        row, path = self.samplers.rows[place], self.paths[place, column][None]
        if row.processors.rollback.foreign:
            # Asked token after token, as by plain decoding, and of no path that cannot stand.
            return row.scores(self.history[place, column][None], path[:, :0], path)[0, -1]
        return row.scores(logits[place, column][None, None], path, path[:, :0])[0, 0]

    def _noisy(self, scores: Tensor, counts: Sequence[int]) -> Tensor:
        """Scores plus the noise of their output position, which columns of a depth share."""
        if self.samplers.greedy:
            return scores
        scores, depth = scores.clone(), len(self.read)
        for place, (row, count) in enumerate(zip(self.samplers.rows, counts, strict=True)):
            if row.noise is not None and count:
                scores[place, :count] += row.noise.at(self.position[place] + depth, 1)
        return scores

    # The draft

    def draft(self, waited: int) -> tuple[Proposal, list[GrownTree]]:
        """The best nodes or the shape of each row, and what was read of its tree.

        Args:
            waited: decided positions that were read before.
        """
        chosen, scores, hidden, tokens, told = (torch.cat(parts, dim=1) for parts in zip(*self.read, strict=True))
        tokens = tokens.flatten(1)
        on_host = to_host([chosen, tokens, told.flatten(1)])
        firsts = [0, *accumulate(map(max, self.counts))][:-1]
        own_levels = [list(zip(firsts, counts, strict=True)) for counts in zip(*self.counts, strict=True)]
        read = zip(*(part.tolist() for part in on_host), own_levels, strict=True)
        trees = [GrownTree(*row, branches=self.branches) for row in read]
        nodes = [tree.order(want) for tree, want in zip(trees, self.wanted, strict=True)]
        order = _side_by_side(nodes)
        sent = order.to(tokens.device, non_blocking=True)
        proposal = Proposal(
            tokens.gather(1, sent),
            scores,
            hidden,
            [len(own) for own in nodes],
            waited,
            parents=_side_by_side([tree.parents_in(own) for tree, own in zip(trees, nodes, strict=True)]),
            chances=on_host[2].gather(1, order),
            places=sent // self.branches,
            positions=[depth + 1 for depth in self.levels],
        )
        return proposal, trees


def columns_of(shape: TreeShape, levels: int) -> list[list[tuple[int, int]]]:
    """Of a shape the nodes that have children, by depth, each as column of its parent and rank; first the anchor.

    Args:
        levels: how deep the tree may be.

    >>> columns_of(TreeShape((-1, -1, 1, 1, 3), (0, 1, 0, 2, 0)), 3)
    [[(0, 0)], [(0, 1)], [(0, 2)]]
    """
    columns: list[list[tuple[int, int]]] = [[(0, 0)], *([] for _ in range(levels - 1))]
    place, inner = {-1: 0}, set(shape.parents)
    for node, (parent, rank, depth) in enumerate(zip(shape.parents, shape.ranks, shape.depths, strict=True)):
        if node in inner and depth < levels:
            place[node] = len(columns[depth])
            columns[depth].append((place[parent], rank))
    return columns[:levels]


def _side_by_side(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [rows, longest], with zeros behind the shorter."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
