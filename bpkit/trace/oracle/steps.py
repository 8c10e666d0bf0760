"""What each possible step of a prompt would cost and where it would lead: the tables that the oracles search.

A step at position *t* (output tokens decided so far, 1 .. output length - 1) either does without a draft, or drafts at
a traced block size and verifies the first *v* drafted tokens. Its price depends on what happened before through one
number only, the positions that wait for the drafter, so position and waiting are the whole state of a request.

`waiting` becomes a column: column 0 is a request that has not drafted yet, whose waiting follows from its position;
column *w* one that has, with *w* positions waiting. Since decided tokens are all that can wait, *w < t* there. A
drafter that never waits (n-gram) needs column 0 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bpkit.trace.records import PromptTrace
from bpkit.types import CostModel, DraftWork

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


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
        self.cost = cost
        self._known: dict[tuple[str, int, int], float] = {}

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        """As the model says."""
        key = (phase, size, context_length)
        if key not in self._known:
            self._known[key] = self.cost.seconds(*key)
        return self._known[key]

    def array(self, phase: str, sizes: ArrayLike, context_lengths: ArrayLike) -> Float64:
        """`seconds` for every pair of the broadcast arguments, float64."""
        size, at = np.broadcast_arrays(np.asarray(sizes, np.int64), np.asarray(context_lengths, np.int64))
        base = int(at.max(initial=0)) + 1
        unique, inverse = np.unique(size * base + at, return_inverse=True)  # one number for each pair
        prices = [self.seconds(phase, *divmod(pair, base)) for pair in unique.tolist()]
        return np.array(prices, np.float64)[inverse.reshape(size.shape)]


def array_cost(cost: CostModel) -> ArrayCost:
    """The model itself if it prices arrays, else one that asks it pair by pair."""
    return cast(ArrayCost, cost) if hasattr(cost, "array") else CachedCost(cost)


def waiting_before_drafts(work: DraftWork, prompt_length: int, position: int) -> int:
    """Positions that wait at a position that was reached without any draft."""
    return work.first(prompt_length) + (position - 1 if work.waits else 0)


def price_steps(
    prompt: PromptTrace,
    cost: CostModel,
    position: Sequence[int],
    size: Sequence[int],
    waiting: Sequence[int],
    verify_length: Sequence[int],
) -> Float64:
    """Seconds of each step of a path, as `bpkit.decode.clock.price` says: float64 [steps].

    Args:
        size: `Work.draft_size` of each step.
        waiting: positions that waited before it, whether it drafted or not.
    """
    prices = array_cost(cost)
    at = prompt.prompt_length + np.asarray(position, np.int64)
    drafted = np.asarray(size, np.int64) > 0
    seconds = np.zeros(len(at))
    if drafted.any():
        sizes, waits = (np.asarray(values, np.int64)[drafted] for values in (size, waiting))
        seconds[drafted] = prices.array("draft", sizes, at[drafted]) + prices.array("catch_up", waits, at[drafted])
    verify = prices.array("verify", np.asarray(verify_length, np.int64) + 1, at)
    return seconds + verify + prices.array("rest", np.ones_like(at), at)


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

    block_sizes: NDArray[np.int32]
    no_draft: Float64
    draft: Float64
    catch_up: Float64
    target: Int64
    room: Int64
    waits: bool


def step_table(prompt: PromptTrace, work: DraftWork, cost: CostModel, *, truncate: bool) -> StepTable:
    """The steps of a prompt.

    Args:
        work: of the drafter.
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
    before = [waiting_before_drafts(work, prompt.prompt_length, int(t)) for t in position]
    columns = rows + 1 if work.waits else 1
    # No more can wait than was decided; what cannot happen is priced as the nearest that can.
    waiting = np.minimum(np.arange(columns), np.maximum(position - 1, 1)[:, None])
    waiting[:, 0] = before
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
