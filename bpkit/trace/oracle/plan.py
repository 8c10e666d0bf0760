"""The best choice at every position of an output, whatever happened before: the search behind the oracles.

A step at position *t* (output tokens decided so far, 1 .. output length - 1) either does without a draft, or drafts at
a traced block size and verifies the first *v* drafted tokens. Its price depends on what happened before through one
number only, the positions that wait for the drafter, so position and waiting are the whole state of a request. Which
draft is best at a position does not depend on what waited before it, so that

    V(t, w) = min(no_draft(t) + V(t + 1, w + 1),  A(t) + catch_up(w)),   A(t) = min over size and width of
                                                                          draft + E[V(t + accepted + 1, waiting after)]

from the end of the output on, which is exact for any cost model, staircases and falling `catch_up` included.
Knowing the matches is the case where every chance is 0 or 1.

`waiting` becomes a column: column 0 is a request that has not drafted yet, whose waiting follows from its position;
column *w* one that has, with *w* positions waiting. Since decided tokens are all that can wait, *w < t* there. A
drafter that never waits (n-gram) needs column 0 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bpkit.trace.records import Ints, PromptTrace
from bpkit.types import CostModel, DraftWork

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Choice = tuple[int, int]
"""Block size and number of drafted tokens to verify; (1, 0) is a step without a draft."""


class ArrayCost(CostModel, Protocol):
    """A cost model that also prices whole arrays."""

    def array(self, phase: str, sizes: ArrayLike, context_lengths: ArrayLike) -> Float64:
        """`CostModel.seconds` for every pair of the broadcast arguments, float64."""
        ...


class CachedCost:
    """Prices arrays by a model that prices one size at a time, and remembers every answer.

    It is a cost model itself: wrap a model once and hand the wrapper to every call, and they share the answers.
    """

    def __init__(self, cost: CostModel) -> None:
        self.seconds = cache(cost.seconds)

    def array(self, phase: str, sizes: ArrayLike, context_lengths: ArrayLike) -> Float64:
        """`seconds` for every pair of the broadcast arguments, float64."""
        prices = np.vectorize(lambda size, at: self.seconds(phase, size, at), otypes=[np.float64])
        return cast(Float64, prices(sizes, context_lengths))


def array_cost(cost: CostModel) -> ArrayCost:
    """The model itself if it prices arrays, else one that asks it pair by pair."""
    return cast(ArrayCost, cost) if hasattr(cost, "array") else CachedCost(cost)


@dataclass(frozen=True)
class StepTable:
    """Every step that could be made, for one prompt.

    `rows` is the output length less one (row *t - 1* is position *t*), `columns` counts values of waiting, `width` is
    the longest draft. A *target* is a flat index into a table [rows + 1, columns] of what is still to come; its last
    row is the end of the output.

    Attributes:
        block_sizes: of axis 1, int [sizes].
        no_draft: seconds of a step without a draft, float64 [rows].
        draft: seconds of drafting at a size and verifying *v* of it, without catching up, float64
            [rows, sizes, width + 1]; infinite where that cannot be.
        catch_up: seconds that a draft takes longer for what waits, float64 [rows, columns].
        target: after *a* accepted tokens, int64 [rows, sizes, width + 1].
        room: accepted tokens that would end the output, int64 [rows].
        waits: whether positions wait while nothing is drafted.
    """

    block_sizes: Ints
    no_draft: Float64
    draft: Float64
    catch_up: Float64
    target: Int64
    room: Int64
    waits: bool


def step_table(prompt: PromptTrace, work: DraftWork, cost: CostModel, *, truncate: bool) -> StepTable:
    """The steps of a prompt.

    Args:
        truncate: whether fewer drafted tokens may be verified than there are; otherwise all are, as far as the limit
            on new tokens allows.
    """
    drafts, prices = prompt.drafts, array_cost(cost)
    rows, width = drafts.rows, int(drafts.draft_length.max(initial=0))
    position = np.arange(1, rows + 1, dtype=np.int64)
    at = prompt.prompt_length + position  # [rows]
    length = drafts.draft_length.astype(np.int64)  # [rows, sizes]
    count = np.arange(width + 1, dtype=np.int64)  # tokens verified or accepted

    # The width is capped by the limit on new tokens, not by where the output happened to end: that was not known.
    most = np.minimum(length, (prompt.max_new_tokens - position - 1)[:, None])[:, :, None]
    allowed = count <= most if truncate else count == most
    allowed &= length[:, :, None] > 0  # nothing was found: that is the step without a draft
    # A cost model may know no width that cannot occur: such widths are priced as the widest that can.
    widest = most.max(axis=1, initial=0)  # [rows, 1]
    verify = prices.array("verify", np.minimum(count, widest) + 1, at[:, None])  # [rows, width + 1]
    rest = prices.array("rest", np.ones_like(at), at)
    drafting = prices.array("draft", np.maximum(length + 1, 2), at[:, None])  # [rows, sizes]
    draft = np.where(allowed, (drafting[:, :, None] + verify[:, None, :]) + rest[:, None, None], np.inf)

    room = prompt.output_length - position - 1
    columns = rows + 1 if work.waits else 1
    # No more can wait than was decided; what cannot happen is priced as the nearest that can.
    waiting = np.minimum(np.arange(columns), np.maximum(position - 1, 1)[:, None])
    waiting[:, 0] = work.first(prompt.prompt_length) + (position - 1) * work.waits
    accepted = np.minimum(count, room[:, None])[:, None, :]  # [rows, 1, width + 1]
    column = np.minimum(_waiting_after(work, width)[length[:, :, None], accepted], columns - 1)
    row_after = position[:, None, None] + accepted
    return StepTable(
        block_sizes=drafts.block_sizes,
        no_draft=verify[:, 0] + rest,
        draft=draft,
        catch_up=prices.array("catch_up", waiting, at[:, None]),
        target=row_after * columns + column,
        room=room,
        waits=work.waits,
    )


@lru_cache(maxsize=64)
def _waiting_after(work: DraftWork, width: int) -> Int64:
    """`DraftWork.after_draft` for every draft length and number accepted, int64 [width + 1, width + 1]."""
    each = range(width + 1)
    return np.array([[work.after_draft(length, a) for a in each] for length in each], np.int64)


@dataclass(frozen=True)
class Solution:
    """The best choice in every state of one prompt, and what it leads to.

    Attributes:
        table: what it chooses from; its `rows` and `columns` are those below.
        block_size, verify_length: of the best draft at each position, int32 [rows].
        drafts: whether to make it, bool [rows, columns].
        seconds, steps: that are left under the plan, expected: float64 [rows + 1, columns].
    """

    table: StepTable
    block_size: Ints
    verify_length: Ints
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


def solve(table: StepTable, match: Float64) -> Solution:
    """The plan of least expected seconds.

    `match` is the chance that a drafted token matches if those before it did, float64 [rows, sizes, width].
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
    return Solution(table, sizes, best[:, 1].astype(np.int32), drafts, seconds, steps)


def _one_later(values: Float64, waits: bool) -> Float64:
    """What each column is worth at the next position if nothing is drafted: float64 [columns]."""
    if not waits:
        return values
    # Column 0, never drafted, stays. What comes after the last column cannot happen (more would wait than was decided)
    # and is not looked at, but must be finite.
    return np.concatenate([values[:1], values[2:], values[-1:]])
