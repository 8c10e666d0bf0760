"""From timed steps to the figures of a cost table, each with its spread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.cost.figures import CostError
from bpkit.trace.cost.statistics import cell_of, combined, slope_within, trimmed
from bpkit.trace.cost.table import Cell, CostTable, Padding, RowsTable
from bpkit.trace.cost.timed import Mask, TimedPrompts, TimedSteps
from bpkit.types import DraftWork

FEWEST = 40
"""Samples that a range of context lengths must have; one with fewer is merged with the next."""
FEWEST_CATCHING_UP = 8
ROUNDS_OF_FITTING = 50
SURE = 3.0
"""Standard errors that padding must save something by."""
CHEAP = 0.01
"""A figure below this share of a plain step is not waited for: its spread hardly moves a step's."""
FEWEST_PROMPTS = 4
"""Passes over prompts that a range of their tokens must have; one with fewer is merged with the next."""
_WAITING_LITTLE = 8
_WAITING: tuple[int, ...] = (
    *range(2, _WAITING_LITTLE + 1),
    *sorted(end * 2**power for power in range(20) for end in (12, 16)),
)
"""Waiting positions: one by one at first, then ranges that end here."""


def estimate(
    steps: TimedSteps,
    largest: int,
    work: DraftWork,
    batch_sizes: Sequence[int] = (1,),
    prompts: Sequence[TimedPrompts] = (),
) -> CostTable:
    """The figures for block sizes and verify widths up to `largest`, at one row and at each of `batch_sizes`.

    Steps of other numbers of rows are not looked at.

    Args:
        prompts: passes that read them; without any, reading prompts has no price.

    Raises:
        CostError: too little was measured to say what the largest block or a plain step costs.
    """
    reading, tables = prefill_cells(prompts), _tables(steps.of_rows(1), largest, work)
    return CostTable(
        name="measured",
        **{**tables, "spread": (*tables["spread"], *reading)},
        prefill=_figures(reading),
        rows={rows: _of_rows(steps.of_rows(rows), largest, work) for rows in sorted(batch_sizes) if rows > 1},
    )


def _of_rows(steps: TimedSteps, largest: int, work: DraftWork) -> RowsTable:
    """The figures of steps of one number of rows: those that they would have had without padding."""
    padding = Padding(draft=_saved_by_padding(steps, "draft"), verify=_saved_by_padding(steps, "verify"))
    filled = replace(
        steps,
        draft=steps.draft + padding.draft * steps.draft_padding,
        verify=steps.verify + padding.verify * steps.verify_padding,
    )
    return RowsTable(**_tables(filled, largest, work), padding=padding)


def _saved_by_padding(steps: TimedSteps, phase: Literal["draft", "verify"]) -> float:
    """Seconds that a padded position takes less than another, among passes of one size; 0 if that is not sure."""
    if phase == "draft":
        steps = steps.part(steps.drafted)
        size, padding, other, seconds = steps.draft_size, steps.draft_padding, steps.waiting, steps.draft
    else:
        size, padding, other, seconds = steps.width, steps.verify_padding, steps.context_length, steps.verify
    slope, error = slope_within(size, padding.astype(np.float64), seconds, other.astype(np.float64))
    return _rounded(-slope) if -slope > SURE * error else 0.0


def _tables(steps: TimedSteps, largest: int, work: DraftWork) -> dict[str, Any]:
    """The tables of steps that have one number of rows, with their spread."""
    known = (steps.width == 1).any()
    drafts, catch_up = draft_cells(steps)
    # Of trees more nodes are verified than positions are drafted, which are no more in a larger one.
    trees = bool((steps.width > steps.draft_size)[steps.drafted].any())
    if (trees or work.passes == "none") and drafts and drafts[-1].size < largest:
        # Of stores: they may never have found as much, and what they do is next to free.
        drafts.append(drafts[-1].model_copy(update={"size": largest}))
    widths, contexts = verify_cells(steps) if known else ([], [])
    if largest not in {cell.size for cell in drafts} or not {1, largest} <= {cell.size for cell in widths}:
        of_rows = f" of {rows} rows" if (rows := steps.rows.max(initial=1)) > 1 else ""
        raise CostError(
            f"{len(steps)} measured steps{of_rows} are too few to tell the costs up to block size {largest}: give more "
            "prompts, more new tokens or more time, or a smaller largest block size"
        )
    features = list(feature_cells(steps))
    rest = cell_of("rest", 1, steps.rest_of_plain)
    verify: dict[int, float | dict[int, float]] = {
        width.size: {c.context_length or 0: _rounded(c.seconds) for c in contexts if c.size == width.size}
        for width in widths
    }
    return {
        "draft": _figures(drafts),
        "catch_up": _figures(catch_up),
        "features": _figures(features),
        "verify": verify,
        "rest": _rounded(rest.seconds),
        "spread": (*drafts, *catch_up, *features, *widths, *contexts, rest),
    }


def worst_cell(steps: TimedSteps, largest: int) -> Cell | None:
    """The figure that is known least, of drafts by block size and target passes by width, at one number of rows.

    None while something has not been measured at all, but for what drafters that may draft less did not do.
    """
    if not (steps.width == 1).any():
        return None
    widths, drafts = verify_cells(steps)[0], draft_cells(steps)[0]
    if not drafts or not {1, largest} <= {cell.size for cell in widths}:
        return None
    cheap = CHEAP * widths[0].seconds
    return max((c for c in (*widths, *drafts) if c.seconds > cheap), key=lambda c: c.spread)


# Phases. Cells are in the order of their sizes.


def draft_cells(steps: TimedSteps) -> tuple[list[Cell], list[Cell]]:
    """What drafts take by block size, and catching up by waiting positions: a draft's time is the sum of its two.

    Both are fitted to all drafts in turn (backfitting), with nothing to catch up at one waiting position. Of several
    rows one hardly ever waits so little, as the one that waits most counts: there it is the tenth of the drafts that
    waited least. A cell of catching up has the largest number of waiting positions of its samples as its size.
    """
    drafted = steps.drafted
    sizes, waiting, seconds = steps.draft_size[drafted], steps.waiting[drafted], steps.draft[drafted]
    least, little = 1, _WAITING_LITTLE
    if len(waiting) and steps.rows.max() > 1:
        least, little = max(1, int(np.quantile(waiting, 0.1))), max(little, int(np.quantile(waiting, 0.9)))
    near = waiting <= least
    if not near.any():
        return [], []
    by_size = list(_each(sizes, waiting <= little))
    places = np.flatnonzero(~near)
    by_waiting = [places[part] for part in merged_ranges(waiting[places], waiting_range, FEWEST_CATCHING_UP)]
    own, longer = np.zeros(len(seconds)), np.zeros(len(seconds))
    for _ in range(ROUNDS_OF_FITTING):
        for size, here in by_size:
            own[sizes == size] = trimmed((seconds - longer)[here])[0]
        for there in by_waiting:
            longer[there] = trimmed((seconds - own)[there])[0]
    anchor = cell_of("", 1, (seconds - own)[near])  # how well the level that all sizes share is known
    cells = [cell_of("draft", size, (seconds - longer)[here]) for size, here in by_size]
    return (
        [cell.model_copy(update={"standard_error": combined([cell, anchor], [1.0, 1.0])}) for cell in cells],
        [cell_of("catch_up", int(waiting[there].max()), (seconds - own)[there]) for there in by_waiting],
    )


def feature_cells(steps: TimedSteps) -> Iterator[Cell]:
    """What computing features took, by block size: policy time with, less policy time without."""
    for size, here in _each(steps.draft_size, steps.drafted):
        with_them, without = here & steps.features, here & ~steps.features
        if with_them.any() and without.any():
            more, less = cell_of("features", size, steps.policy[with_them]), cell_of("", size, steps.policy[without])
            yield Cell(
                phase="features",
                size=size,
                count=more.count + less.count,
                seconds=more.seconds - less.seconds,
                standard_error=combined([more, less], [1.0, 1.0]),
            )


def verify_cells(steps: TimedSteps) -> tuple[list[Cell], list[Cell]]:
    """Target passes by width, and by width and context length, this in ranges of powers of two.

    By width alone it is the mean over context lengths as they came, each range with its own spread.
    """
    widths: list[Cell] = []
    contexts: list[Cell] = []
    for width, here in _each(steps.width, steps.width > 0):
        at, seconds = steps.context_length[here], steps.verified[here]
        parts = [
            cell_of("verify", width, seconds[part], context_length=round(float(at[part].mean())))
            for part in merged_ranges(at, lambda c: c.bit_length(), FEWEST)
        ]
        shares = [part.count / len(seconds) for part in parts]
        mean = sum(share * part.seconds for share, part in zip(shares, parts, strict=True))
        pooled = {"seconds": mean, "standard_error": combined(parts, shares)}
        widths.append(cell_of("verify", width, seconds).model_copy(update=pooled))
        contexts += parts
    return widths, contexts


def prefill_cells(prompts: Sequence[TimedPrompts]) -> list[Cell]:
    """What reading prompts takes, in ranges of tokens that double; the size of a cell is the mean of its samples'."""
    timed = [prompt for prompt in prompts if prompt.seconds > 0]  # a cost clock charges nothing for prompts
    tokens = np.array([prompt.tokens for prompt in timed], np.int64)
    seconds = np.array([prompt.seconds for prompt in timed], np.float64)
    ranges = merged_ranges(tokens, lambda n: n.bit_length(), FEWEST_PROMPTS) if timed else ()
    return [cell_of("prefill", round(float(tokens[part].mean())), seconds[part]) for part in ranges]


# Ranges


def waiting_range(waiting: int) -> int:
    """Upper end of the range that a number of waiting positions belongs to: 2, 3, .. 8, 12, 16, 24, 32, 48, ...

    >>> [waiting_range(n) for n in (2, 8, 9, 13, 17, 25, 100)]
    [2, 8, 12, 16, 24, 32, 128]
    """
    return _WAITING[min(bisect_left(_WAITING, waiting), len(_WAITING) - 1)]


def merged_ranges(numbers: NDArray[np.int64], range_of: Callable[[int], int], fewest: int) -> Iterator[Mask]:
    """Group numbers by range, ascending. Ranges with fewer than `fewest` go with the next, the last with those before.

    Yields masks, bool [numbers]; together they hold every number once.
    """
    ranges, range_at, members = np.unique(
        np.array([range_of(number) for number in numbers.tolist()], np.int64), return_inverse=True, return_counts=True
    )
    groups, count = np.zeros(len(ranges), np.int64), 0
    group = 0
    for place, more in enumerate(members.tolist()):
        groups[place], count = group, count + more
        if count >= fewest:
            group, count = group + 1, 0
    if count:  # too few are left at the end
        groups = np.minimum(groups, max(group - 1, 0))
    for group in np.unique(groups).tolist():
        yield groups[range_at] == group


def _each(sizes: NDArray[np.int64], among: Mask) -> Iterator[tuple[int, Mask]]:
    for size in np.unique(sizes[among]).tolist():
        yield size, among & (sizes == size)


def _figures(cells: list[Cell]) -> dict[int, float]:
    return {cell.size: _rounded(max(cell.seconds, 0.0)) for cell in cells}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
