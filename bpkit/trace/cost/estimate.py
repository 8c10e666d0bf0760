"""From timed steps to the figures of a cost table, each with its spread."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bpkit.decode.reread import commits
from bpkit.trace.cost.table import Cell, CostError, CostTable
from bpkit.types import DraftWork, Seconds, Work

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

TRIM = 0.1
FEWEST = 40
"""Samples that a range of context lengths must have; one with fewer is merged with the next."""
FEWEST_CATCHING_UP = 8
ROUNDS_OF_FITTING = 50
CHEAP = 0.01
"""A figure below this share of a plain step is not waited for: its spread hardly moves a step's."""
_WAITING_LITTLE = 8
_WAITING: tuple[int, ...] = (
    *range(2, _WAITING_LITTLE + 1),
    *sorted(end * 2**power for power in range(20) for end in (12, 16)),
)
"""Waiting positions: one by one at first, then ranges that end here."""


@dataclass(frozen=True)
class TimedSteps:
    """Timed steps as columns, each [steps]; see `Work` and `Seconds` for what they are."""

    draft_size: NDArray[np.int64]
    waiting: NDArray[np.int64]
    width: NDArray[np.int64]
    context_length: NDArray[np.int64]
    features: Mask
    draft: Floats
    verify: Floats
    policy: Floats
    rest: Floats

    @classmethod
    def of(cls, timed: list[tuple[Work, Seconds]]) -> TimedSteps:
        """Columns of a list of steps, without those of two target passes. Tokens that are read again widen a pass."""
        timed = [(w, s) for w, s in timed if not commits(w.reread, w.verify_width)]
        done = [(w.draft_size, w.waiting, w.verify_width + w.reread, w.context_length, w.features) for w, _ in timed]
        spent = [(s.draft, s.verify, s.policy, s.rest) for _, s in timed]
        draft_size, waiting, width, context_length, features = np.array(done, np.int64).reshape(-1, 5).T
        seconds = np.array(spent, np.float64).reshape(-1, 4).T
        return cls(draft_size, waiting, width, context_length, features > 0, *seconds)

    def __len__(self) -> int:
        return len(self.width)

    @property
    def drafted(self) -> Mask:
        return self.draft_size > 0

    @property
    def measured(self) -> Floats:
        """Seconds of each step that a cost model answers for: all but the policy's."""
        return self.draft + self.verify + self.rest

    @cached_property
    def rest_of_plain(self) -> Floats:
        """What plain steps took beside the target's pass. Where there was none, steps that verified one position."""
        plain = (self.width == 1) & ~self.drafted
        found: Floats = self.rest[plain if plain.any() else self.width == 1]
        return found

    @cached_property
    def verified(self) -> Floats:
        """Seconds of the target's pass, and of what the rest of a step took longer than in plain steps.

        Sampling and checking go by the verified positions, as the pass does; a table has but one figure for the rest.
        """
        return self.verify + self.rest - trimmed(self.rest_of_plain)[0]

    def modelled(self, cost: CostTable) -> Floats:
        """What a table says of `measured`."""
        drafts = np.where(
            self.drafted, cost.array("draft", self.draft_size) + cost.array("catch_up", self.waiting), 0.0
        )
        return drafts + cost.array("verify", self.width, self.context_length) + cost.rest


def estimate(steps: TimedSteps, largest: int, work: DraftWork) -> CostTable:
    """The figures for block sizes and verify widths up to `largest`.

    Raises:
        CostError: too little was measured to say what the largest block or a plain step costs.
    """
    drafts, catch_up = draft_cells(steps)
    if work.passes == "none" and drafts and drafts[-1].size < largest:
        # It may never have found as much, and what it does is next to free.
        drafts.append(drafts[-1].model_copy(update={"size": largest}))
    widths, contexts = verify_cells(steps)
    if largest not in {cell.size for cell in drafts} or not {1, largest} <= {cell.size for cell in widths}:
        raise CostError(
            f"{len(steps)} measured steps are too few to tell the costs up to block size {largest}: give more prompts, "
            "more new tokens or more time, or a smaller largest block size"
        )
    features = list(feature_cells(steps))
    rest = _cell("rest", 1, steps.rest_of_plain)
    verify: dict[int, float | dict[int, float]] = {
        width.size: {c.context_length or 0: _rounded(c.seconds) for c in contexts if c.size == width.size}
        for width in widths
    }
    return CostTable(
        name="measured",
        draft=_figures(drafts),
        catch_up=_figures(catch_up),
        features=_figures(features),
        verify=verify,
        rest=_rounded(rest.seconds),
        spread=(*drafts, *catch_up, *features, *widths, *contexts, rest),
    )


def worst_cell(steps: TimedSteps, largest: int) -> Cell | None:
    """The figure that is known least, of drafts by block size and target passes by width.

    None while something has not been measured at all, but for what drafters that may draft less did not do.
    """
    widths, drafts = verify_cells(steps)[0], draft_cells(steps)[0]
    if not drafts or not {1, largest} <= {cell.size for cell in widths}:
        return None
    cheap = CHEAP * widths[0].seconds
    return max((c for c in (*widths, *drafts) if c.seconds > cheap), key=lambda c: c.spread)


# Phases. Cells are in the order of their sizes.


def draft_cells(steps: TimedSteps) -> tuple[list[Cell], list[Cell]]:
    """What drafts take by block size, and catching up by waiting positions: a draft's time is the sum of its two.

    Both are fitted to all drafts in turn (backfitting), with nothing to catch up at one waiting position. A cell of
    catching up has the largest number of waiting positions of its samples as its size.
    """
    drafted = steps.drafted
    sizes, waiting, seconds = steps.draft_size[drafted], steps.waiting[drafted], steps.draft[drafted]
    near = waiting <= 1
    if not near.any():
        return [], []
    by_size = list(_each(sizes, waiting <= _WAITING_LITTLE))
    places = np.flatnonzero(~near)
    by_waiting = [places[part] for part in merged_ranges(waiting[places], waiting_range, FEWEST_CATCHING_UP)]
    own, longer = np.zeros(len(seconds)), np.zeros(len(seconds))
    for _ in range(ROUNDS_OF_FITTING):
        for size, here in by_size:
            own[sizes == size] = trimmed((seconds - longer)[here])[0]
        for there in by_waiting:
            longer[there] = trimmed((seconds - own)[there])[0]
    anchor = _cell("", 1, (seconds - own)[near])  # how well the level that all sizes share is known
    cells = [_cell("draft", size, (seconds - longer)[here]) for size, here in by_size]
    return (
        [cell.model_copy(update={"standard_error": _combined([cell, anchor], [1.0, 1.0])}) for cell in cells],
        [_cell("catch_up", int(waiting[there].max()), (seconds - own)[there]) for there in by_waiting],
    )


def feature_cells(steps: TimedSteps) -> Iterator[Cell]:
    """What computing features took, by block size: policy time with, less policy time without."""
    for size, here in _each(steps.draft_size, steps.drafted):
        with_them, without = here & steps.features, here & ~steps.features
        if with_them.any() and without.any():
            more, less = _cell("features", size, steps.policy[with_them]), _cell("", size, steps.policy[without])
            yield Cell(
                phase="features",
                size=size,
                count=more.count + less.count,
                seconds=more.seconds - less.seconds,
                standard_error=_combined([more, less], [1.0, 1.0]),
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
            _cell("verify", width, seconds[part], context_length=round(float(at[part].mean())))
            for part in merged_ranges(at, lambda c: c.bit_length(), FEWEST)
        ]
        shares = [part.count / len(seconds) for part in parts]
        mean = sum(share * part.seconds for share, part in zip(shares, parts, strict=True))
        pooled = {"seconds": mean, "standard_error": _combined(parts, shares)}
        widths.append(_cell("verify", width, seconds).model_copy(update=pooled))
        contexts += parts
    return widths, contexts


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


# Statistics


def trimmed(seconds: Floats) -> tuple[float, float | None]:
    """10% trimmed mean and its standard error (Tukey & McLaughlin 1963); None for a single sample.

    >>> mean, error = trimmed(np.array([1.0] * 9 + [100.0]))
    >>> mean, error
    (1.0, 0.0)
    """
    count = len(seconds)
    cut = min(math.ceil(TRIM * count), (count - 1) // 2)
    ordered = np.sort(seconds)
    mean = float(ordered[cut : count - cut].mean())
    if count < 2:
        return mean, None
    winsorized = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    return mean, float(winsorized.std(ddof=1)) / ((1 - 2 * cut / count) * math.sqrt(count))


def _cell(phase: str, size: int, seconds: Floats, context_length: int | None = None) -> Cell:
    (trimmed_mean, error), mean = trimmed(seconds), float(seconds.mean())
    low, high = np.quantile(seconds, [0.25, 0.75]).tolist()
    return Cell(
        phase=phase,
        size=size,
        context_length=context_length,
        count=len(seconds),
        seconds=trimmed_mean,
        standard_error=error,
        variation=float(seconds.std(ddof=1)) / mean if len(seconds) > 1 and mean > 0 else None,
        quartiles=(low, high),
    )


def _combined(cells: list[Cell], weights: list[float]) -> float | None:
    """Standard error of a weighted sum; None if one of them is not known."""
    errors = [cell.standard_error for cell in cells]
    known = [weight * error for weight, error in zip(weights, errors, strict=True) if error is not None]
    return math.hypot(*known) if len(known) == len(cells) else None


def _figures(cells: list[Cell]) -> dict[int, float]:
    return {cell.size: _rounded(max(cell.seconds, 0.0)) for cell in cells}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
