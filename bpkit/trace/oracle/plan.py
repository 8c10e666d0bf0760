"""The best choice at every position of an output, whatever happened before: the search behind the oracles.

A step at position *t* (output tokens decided so far, 1 .. output length - 1) either does without a draft, or drafts
from a source at a traced block size and verifies the first *v* drafted tokens. Sources that read nothing of decided
positions (stores) never wait. If at most one source waits, the price of a step depends on what happened before through
one number only, the positions that wait for that source, so that position and waiting are the whole state of a request:

    V(t, w) = min(no_draft(t) + V(t + 1, w + 1),
                  min over size and width of the source that waits   of draft + catch_up(w) + E[V(t', waiting after)],
                  min over sizes and widths of all other sources     of draft + catch_up(0) + E[V(t', w + t' - t)])

with t' = t + accepted + 1, from the end of the output on, which is exact for any cost model, staircases and falling
`catch_up` included. Knowing the matches is the case where every chance is 0 or 1.

`waiting` becomes a column: column 0 is a request for which that source has not drafted yet, whose waiting follows from
its position; column *w* one for which it has, with *w* positions waiting. Since decided tokens are all that can wait,
*w < t* there. Where no source waits there is column 0 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bpkit.trace.records import DraftTable, Ints, PromptTrace
from bpkit.types import CostModel, DraftWork, of_source

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Works = DraftWork | Sequence[DraftWork]
"""What each source of drafts does for a draft, in their order; one alone is that of the first."""


class StepChoice(NamedTuple):
    """Of a step.

    Attributes:
        source: that drafts; 0 where nothing is drafted.
        block_size: 1 is a step without a draft.
        verify_length: drafted tokens to verify.
    """

    source: int
    block_size: int
    verify_length: int


NO_DRAFT = StepChoice(0, 1, 0)


def works_of(work: Works) -> tuple[DraftWork, ...]:
    """The works of all sources."""
    return (work,) if isinstance(work, DraftWork) else tuple(work)


def waiting_source(work: Works) -> int | None:
    """The source that waits, None if none does.

    Raises:
        ValueError: several do.
    """
    waits = [source for source, each in enumerate(works_of(work)) if each.waits]
    if len(waits) > 1:
        raise ValueError(
            f"sources {' and '.join(map(str, waits))} all read what was decided while they did not draft, and the best "
            "choices are searched for where at most one does: leave one of them out"
        )
    return waits[0] if waits else None


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
        self.of_source = cache(lambda source: CachedCost(of_source(cost, source)) if source else self)

    def array(self, phase: str, sizes: ArrayLike, context_lengths: ArrayLike) -> Float64:
        """`seconds` for every pair of the broadcast arguments, float64."""
        prices = np.vectorize(lambda size, at: self.seconds(phase, size, at), otypes=[np.float64])
        return cast(Float64, prices(sizes, context_lengths))


def array_cost(cost: CostModel) -> ArrayCost:
    """The model itself if it prices arrays, else one that asks it pair by pair."""
    return cast(ArrayCost, cost) if hasattr(cost, "array") else CachedCost(cost)


@dataclass(frozen=True)
class DraftSteps:
    """The steps of one prompt that draft from one source.

    `rows` is the output length less one (row *t - 1* is position *t*), `columns` counts values of waiting, `width` is
    the longest draft.

    Attributes:
        block_sizes: of axis 1, int [sizes].
        draft: seconds of drafting at a size and verifying *v* of it, without catching up, float64
            [rows, sizes, width + 1]; infinite where that cannot be.
        catch_up: seconds that a draft takes longer for what waits, float64 [rows, columns]; [rows, 1] if nothing does.
        accepted: how many stand of *a* that match: fewer where the output ends, int64 [rows, width + 1].
        any: whether something can be drafted, bool [rows].
        column: of what waits after *a* accepted tokens, int64 [rows, sizes, width + 1]; None if this source never
            waits, so that what waits for the other one grows by what the step yields.
    """

    block_sizes: Ints
    draft: Float64
    catch_up: Float64
    accepted: Int64
    any: NDArray[np.bool_]
    column: Int64 | None

    def later(self, row: int, values: Float64) -> Float64:
        """What `values` [rows + 1, columns] hold for after *a* accepted tokens: float64 [sizes, width + 1, columns].

        The first axis is 1 if it does not depend on the size, and the last if it does not depend on what waited.
        """
        accepted = self.accepted[row]
        if self.column is not None:
            found = values[row + 1 + accepted, self.column[row]][:, :, None]
        else:
            found = values[row + 1 + accepted[:, None], waited_on(values.shape[1], accepted[:, None] + 1)][None]
        return cast(Float64, found)


def waited_on(columns: int, yielded: int | Int64) -> Int64:
    """The column after each column if the source that waits does not draft: [columns], or as `yielded` broadcasts."""
    column = np.arange(columns)
    # Column 0, never drafted, stays. What comes after the last column cannot happen (more would wait than was decided)
    # and is not looked at, but must be finite.
    return np.where(column > 0, np.minimum(column + yielded, columns - 1), 0)


@dataclass(frozen=True)
class StepTable:
    """Every step that could be made, for one prompt.

    Attributes:
        no_draft: seconds of a step without a draft, float64 [rows].
        sources: the steps that draft, by source.
        room: accepted tokens that would end the output, int64 [rows].
        columns: values of waiting that are told apart.
        waiting: the source that waits; None if none does.
    """

    no_draft: Float64
    sources: tuple[DraftSteps, ...]
    room: Int64
    columns: int
    waiting: int | None


def step_table(prompt: PromptTrace, work: Works, cost: CostModel, *, truncate: bool) -> StepTable:
    """The steps of a prompt.

    Args:
        work: of the sources that may be drafted from.
        truncate: whether fewer drafted tokens may be verified than there are; otherwise all are, as far as the limit
            on new tokens allows.

    Raises:
        ValueError: more than one of the sources waits.
    """
    works, prices, waits = works_of(work), array_cost(cost), waiting_source(work)
    rows = prompt.drafts.rows
    columns = 1 if waits is None else rows + 1
    at = prompt.prompt_length + np.arange(1, rows + 1, dtype=np.int64)
    rest = prices.array("rest", np.ones_like(at), at)
    drafts = zip(prompt.sources, works, strict=False)
    sources = [
        _draft_steps(prompt, table, each, prices, source, rest, columns, truncate=truncate)
        for source, (table, each) in enumerate(drafts)
    ]
    return StepTable(
        no_draft=prices.array("verify", np.ones_like(at), at) + rest,
        sources=tuple(sources),
        room=prompt.output_length - 1 - np.arange(1, rows + 1, dtype=np.int64),
        columns=columns,
        waiting=waits,
    )


def _draft_steps(
    prompt: PromptTrace,
    drafts: DraftTable,
    work: DraftWork,
    prices: ArrayCost,
    source: int,
    rest: Float64,
    columns: int,
    *,
    truncate: bool,
) -> DraftSteps:
    rows, width = drafts.rows, int(drafts.draft_length.max(initial=0))
    own = array_cost(of_source(prices, source))
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
    drafting = own.array("draft", np.maximum(length + 1, 2), at[:, None])  # [rows, sizes]
    draft = np.where(allowed, (drafting[:, :, None] + verify[:, None, :]) + rest[:, None, None], np.inf)

    accepted = np.minimum(count, (prompt.output_length - position - 1)[:, None])  # [rows, width + 1]
    column, waiting = None, np.zeros((rows, 1), np.int64)
    if work.waits:
        # No more can wait than was decided; what cannot happen is priced as the nearest that can.
        waiting = np.minimum(np.arange(columns), np.maximum(position - 1, 1)[:, None])
        waiting[:, 0] = work.first(prompt.prompt_length) + position - 1
        after = _waiting_after(work, width)[length[:, :, None], accepted[:, None, :]]
        column = np.minimum(after, columns - 1)
    catch_up = own.array("catch_up", waiting, at[:, None])
    return DraftSteps(drafts.block_sizes, draft, catch_up, accepted, np.any(allowed, axis=(1, 2)), column)


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
        source, block_size, verify_length: what is chosen, as in `StepChoice`: int32 [rows, columns].
        seconds, steps: that are left under the plan, expected: float64 [rows + 1, columns].
    """

    table: StepTable
    source: Ints
    block_size: Ints
    verify_length: Ints
    seconds: Float64
    steps: Float64

    def choose(self, position: int, waiting: Sequence[int]) -> StepChoice:
        """What to do at a position (1 .. rows) with so many positions waiting for each source."""
        waits = 0 if self.table.waiting is None else waiting[self.table.waiting]
        # More waits than was decided only before the first draft.
        at = position - 1, waits if waits < position else 0
        return StepChoice(int(self.source[at]), int(self.block_size[at]), int(self.verify_length[at]))


def solve(table: StepTable, match: Sequence[Float64]) -> Solution:
    """The plan of least expected seconds. Of equals no draft, then the first source, size and width.

    Args:
        match: of each source, the chance that a drafted token matches if those before it did, float64
            [rows, sizes, width].
    """
    rows, columns = len(table.no_draft), table.columns
    chances = [chances_of(each) for each in match]
    seconds, steps = np.zeros((rows + 1, columns)), np.zeros((rows + 1, columns))
    source, size, width = (np.full((rows, columns), value, np.int32) for value in NO_DRAFT)
    one_later = waited_on(columns, 1)
    for row in range(rows - 1, -1, -1):
        seconds[row] = table.no_draft[row] + seconds[row + 1, one_later]
        steps[row] = 1 + steps[row + 1, one_later]
        for place, (drafts, (reach, stop)) in enumerate(zip(table.sources, chances, strict=True)):
            if not drafts.any[row]:
                continue
            chance = _outcomes(reach[row], stop[row])
            total = chance @ drafts.later(row, seconds) + drafts.draft[row][:, :, None]
            flat = total.reshape(-1, total.shape[2])
            best = flat.argmin(axis=0)  # the first of equals
            spent = flat[best, np.arange(len(best))] + drafts.catch_up[row]
            faster = spent < seconds[row]
            if not faster.any():
                continue
            at, verified = np.divmod(best, total.shape[1])
            for values, new in (
                (source, place),
                (size, drafts.block_sizes[at]),
                (width, verified),
                (seconds, spent),
                (steps, 1 + _expected(drafts.later(row, steps), chance[at, verified], at)),
            ):
                values[row] = np.where(faster, new, values[row])
    return Solution(table, source, size, width, seconds, steps)


def chances_of(match: Float64) -> tuple[Float64, Float64]:
    """Chance that the first v tokens all match, [rows, sizes, width + 1], and that just v do, of the same shape."""
    reach = np.ones((*match.shape[:2], match.shape[2] + 1))
    np.cumprod(match, axis=2, out=reach[:, :, 1:])
    stop = np.zeros_like(reach)
    stop[:, :, :-1] = reach[:, :, :-1] * (1 - match)
    return reach, stop


def _outcomes(reach: Float64, stop: Float64) -> Float64:
    """Chance that *a* tokens stand if *v* are verified: float64 [sizes, v, a]."""
    count = np.arange(reach.shape[1])
    chance = np.where(count < count[:, None], stop[:, None, :], 0.0)
    chance[:, count, count] = reach
    return chance


def _expected(later: Float64, chance: Float64, size: Int64) -> Float64:
    """The mean of `later` by the chances [columns, a] of a size of each of its columns: float64 [columns]."""
    values = later[size if len(later) > 1 else np.zeros_like(size), :, np.arange(len(size))]
    return np.asarray((chance * values).sum(axis=1), np.float64)
