"""How much of delayed trees stands, what outputs take with each, and which is chosen. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bpkit_trees.delayed_shapes import DelayedTree

Floats = NDArray[np.float32]
ELSEWHERE = 0.05
"""What the best static tree of training may lose, in steps of the best one, before costs are thought to be others."""


def accepted_of(
    ranks: NDArray[np.int32], block_sizes: Sequence[int], shapes: Sequence[DelayedTree]
) -> NDArray[np.int16]:
    """Drafted tokens that stand of each shape at every position: int16 [rows, shapes].

    Args:
        ranks: of the output's own token among the candidates, as in `CandidateTable`, [rows, sizes, width].
        block_sizes: of the columns; the draft of a shape is that of its depth.
    """
    rows = len(ranks)
    left = np.arange(rows - 1, -1, -1)  # no step accepts the last token of the output
    found = np.zeros((rows, len(shapes)), np.int16)
    columns = {size: column for column, size in enumerate(block_sizes)}
    for place, (branches, trunk, length) in enumerate(shapes):
        if not trunk + length:
            continue
        own = ranks[:, columns[trunk + length + 1]]
        stands = _leading_zeros(own[:, :trunk])
        if length:
            fork = own[:, trunk]
            path = 1 + _leading_zeros(own[:, trunk + 1 : trunk + length])
            stands = stands + np.where((stands == trunk) & (fork >= 0) & (fork < branches), path, 0)
        found[:, place] = np.minimum(stands, left)
    return found


def seconds_left(accepted: NDArray[np.int16], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the rest of an output takes from each position, and from its end, if one tree is kept: [rows + 1, shapes].

    Args:
        accepted: as `accepted_of` gives it. seconds: of a step at each position, [rows, shapes].
    """
    rows, shapes = seconds.shape
    found, every = np.zeros((rows + 1, shapes)), np.arange(shapes)
    for row in range(rows - 1, -1, -1):
        found[row] = seconds[row] + found[row + 1 + accepted[row], every]
    return found


def best_places(scores: Floats, static: Floats, margin: float, home: int) -> NDArray[np.int64]:
    """The tree of each row with the highest score, if that is above the best static tree's by more than a margin.

    Args:
        scores: [rows, trees]. static: scores without the network, 0 of the best static tree, alike.
        home: the best static tree in training. Where that loses more than `ELSEWHERE`, costs are too different.
    """
    rows, floor, best = np.arange(len(scores)), static.argmax(axis=1), scores.argmax(axis=1)
    ahead = (scores[rows, best] > scores[rows, floor] + margin) & (static[:, home] > -ELSEWHERE)
    found: NDArray[np.int64] = np.where(ahead, best, floor)
    return found


def _leading_zeros(ranks: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many of the best candidates in a row stand: [rows, width] -> [rows]."""
    zeros: NDArray[np.int64] = np.cumprod(ranks == 0, axis=1).sum(axis=1)
    return zeros
