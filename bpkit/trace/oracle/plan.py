"""The best choice at every position of an output, whatever happened before: the search behind the oracles.

Dynamic programming from the end of the output over position *t* and waiting *w* (`bpkit.trace.oracle.steps`). Which
draft is best at a position does not depend on what waited before it, so that

    V(t, w) = min(no_draft(t) + V(t + 1, w + 1),  A(t) + catch_up(w)),   A(t) = min over size and width of
                                                                          draft + E[V(t + accepted + 1, waiting after)]

which is exact for any cost model, staircases and falling `catch_up` included.
Knowing the matches is the case where every chance is 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.oracle.steps import Float64, StepTable

Choice = tuple[int, int]
"""Block size and number of drafted tokens to verify; (1, 0) is a step without a draft."""


@dataclass(frozen=True)
class Plan:
    """The best choice in every state of one prompt, and what it leads to.

    `rows` and `columns` are those of `bpkit.trace.oracle.steps`.

    Attributes:
        block_size, verify_length: of the best draft at each position, int32 [rows].
        drafts: whether to make it, bool [rows, columns].
        seconds, steps: that are left under the plan, expected: float64 [rows + 1, columns].
    """

    block_size: NDArray[np.int32]
    verify_length: NDArray[np.int32]
    drafts: NDArray[np.bool_]
    seconds: Float64
    steps: Float64

    def choose(self, position: int, waiting: int) -> Choice:
        """Block size and verified tokens at a position (1 .. rows) with so many positions waiting."""
        # More waits than was decided only before the first draft.
        column = waiting if waiting < position else 0
        if not self.drafts[position - 1, column]:
            return 1, 0
        return int(self.block_size[position - 1]), int(self.verify_length[position - 1])


def solve(table: StepTable, match: Float64) -> Plan:
    """The plan of least expected seconds.

    Args:
        match: chance that a drafted token matches if those before it did, float64 [rows, sizes, width].
    """
    rows, columns = table.catch_up.shape
    reach = np.ones(table.draft.shape)  # the first v tokens all match
    np.cumprod(match, axis=2, out=reach[:, :, 1:])
    stop = reach[:, :, :-1] * (1 - match)  # exactly a match
    seconds, steps = np.zeros((rows + 1, columns)), np.zeros((rows + 1, columns))
    drafts = np.zeros((rows, columns), np.bool_)
    best = np.zeros((rows, 2), np.int64)
    for row in range(rows - 1, -1, -1):
        later = seconds.ravel()[table.target[row]]  # [sizes, width + 1]
        total = reach[row] * later
        total[:, 1:] += np.cumsum(stop[row] * later[:, :-1], axis=1)
        total += table.draft[row]
        size, verified = best[row] = divmod(int(total.argmin()), total.shape[1])  # the first of equals

        drafted = total[size, verified] + table.catch_up[row]  # [columns]
        waited = table.no_draft[row] + _one_later(seconds[row + 1], table.waits)
        drafts[row] = drafted < waited
        seconds[row] = np.where(drafts[row], drafted, waited)

        to = steps.ravel()[table.target[row, size, : verified + 1]]
        chances = np.append(stop[row, size, :verified], reach[row, size, verified])
        steps[row] = 1 + np.where(drafts[row], chances @ to, _one_later(steps[row + 1], table.waits))
    sizes = table.block_sizes[best[:, 0]]
    return Plan(sizes, best[:, 1].astype(np.int32), drafts, seconds, steps)


def _one_later(values: Float64, waits: bool) -> Float64:
    """What each column is worth at the next position if nothing is drafted: float64 [columns]."""
    if not waits:
        return values
    # Column 0, never drafted, stays. What comes after the last column cannot happen (more would wait than was decided)
    # and is not looked at, but must be finite.
    return np.concatenate([values[:1], values[2:], values[-1:]])
