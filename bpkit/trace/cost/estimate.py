"""From timed steps to the figures of a cost table, each with its spread.

Means are trimmed by 10% at either end: what matters is the total over many steps, which a median would misjudge, and
what a busy machine adds now and then is no part of a step's cost.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bpkit.decode.reread import commits
from bpkit.trace.cost.errors import CostError
from bpkit.trace.cost.measured import Cell
from bpkit.trace.cost.table import CostTable
from bpkit.types import NGRAM, Seconds, Work

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
class Steps:
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
    def of(cls, timed: list[tuple[Work, Seconds]]) -> Steps:
        """Columns of a list of steps, without those of two target passes. Tokens that are read again widen a pass."""
        timed = [(w, s) for w, s in timed if not commits(w.reread, w.verify_width)]
        done = np.array(
            [(w.draft_size, w.waiting, w.verify_width + w.reread, w.context_length) for w, _ in timed], np.int64
        ).reshape(-1, 4)
        spent = np.array([(s.draft, s.verify, s.policy, s.rest) for _, s in timed], np.float64).reshape(-1, 4)
        features = np.array([w.features for w, _ in timed], np.bool_)
        draft_size, waiting, width, context_length = done.T
        draft, verify, policy, rest = spent.T
        return cls(draft_size, waiting, width, context_length, features, draft, verify, policy, rest)

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


@dataclass(frozen=True)
class Estimate:
    """The figures of a table, and all that is known of their spread."""

    draft: dict[int, float]
    catch_up: dict[int, float]
    features: dict[int, float]
    verify: dict[int, float | dict[int, float]]
    rest: float
    spread: tuple[Cell, ...]


def estimate(steps: Steps, largest: int, kind: str) -> Estimate:
    """The figures for block sizes and verify widths up to `largest`.

    Raises:
        CostError: too little was measured to say what the largest block or a plain step costs.
    """
    apart = take_drafts_apart(steps)
    drafts = {cell.size: cell for cell in apart.own}
    if kind == NGRAM and drafts and largest not in drafts:
        # It may never have found as much, and what it does is next to free.
        drafts[largest] = drafts[max(drafts)].model_copy(update={"size": largest})
    contexts = list(verify_cells_by_context(steps))
    widths = {cell.size for cell in contexts}
    if largest not in drafts or not {1, largest} <= widths:
        raise CostError(
            f"{len(steps)} measured steps are too few to tell the costs up to block size {largest}: give more prompts, "
            "more new tokens or more time, or a smaller largest block size"
        )
    draft = {size: max(cell.seconds, 0.0) for size, cell in drafts.items()}
    features = list(feature_cells(steps))
    verify: dict[int, float | dict[int, float]] = {
        width: {cell.context_length or 0: cell.seconds for cell in contexts if cell.size == width} for width in widths
    }
    rest = _cell("rest", 1, steps.rest_of_plain)
    return Estimate(
        draft=_rounded(draft),
        catch_up=_rounded({cell.size: max(cell.seconds, 0.0) for cell in apart.catch_up}),
        features=_rounded({cell.size: max(cell.seconds, 0.0) for cell in features}),
        verify={w: _rounded(by) if isinstance(by, dict) else by for w, by in sorted(verify.items())},
        rest=_shorter(rest.seconds),
        spread=(*drafts.values(), *apart.catch_up, *features, *verify_cells(steps), *contexts, rest),
    )


def worst_cell(steps: Steps, largest: int) -> Cell | None:
    """The figure that is known least, of drafts by block size and target passes by width.

    None while something has not been measured at all, but for what drafters that may draft less did not do.
    """
    widths = {cell.size: cell for cell in verify_cells(steps)}
    drafts = take_drafts_apart(steps).own
    if not {1, largest} <= set(widths) or not drafts:
        return None
    cheap = CHEAP * widths[1].seconds
    return max((c for c in (*widths.values(), *drafts) if c.seconds > cheap), key=lambda c: c.spread)


# Phases


@dataclass(frozen=True)
class Drafts:
    """Drafts taken apart: seconds = own, by block size + catching up, by waiting positions."""

    own: list[Cell]
    catch_up: list[Cell]


def take_drafts_apart(steps: Steps) -> Drafts:
    """Fit the two parts to all drafts in turn (backfitting), with nothing to catch up at one waiting position.

    A cell of catching up has the largest number of waiting positions of its samples as its size.
    """
    drafted = steps.drafted
    sizes, waiting, seconds = steps.draft_size[drafted], steps.waiting[drafted], steps.draft[drafted]
    near, few = waiting <= 1, waiting <= _WAITING_LITTLE
    if not near.any():
        return Drafts([], [])
    by_size = dict(_each(sizes, few))
    by_waiting = [_within(~near, part) for part in merged_ranges(waiting[~near], waiting_range, FEWEST_CATCHING_UP)]
    own, longer = np.zeros(len(seconds)), np.zeros(len(seconds))
    for _ in range(ROUNDS_OF_FITTING):
        for size, here in by_size.items():
            own[sizes == size] = trimmed((seconds - longer)[here])[0]
        for here in by_waiting:
            longer[here] = trimmed((seconds - own)[here])[0]
    anchor = _cell("", 1, (seconds - own)[near])  # how well the level that all sizes share is known
    cells = [_cell("draft", size, (seconds - longer)[here]) for size, here in by_size.items()]
    return Drafts(
        [cell.model_copy(update={"standard_error": _combined([cell, anchor], [1.0, 1.0])}) for cell in cells],
        [_cell("catch_up", int(waiting[here].max()), (seconds - own)[here]) for here in by_waiting],
    )


def _within(among: Mask, part: Mask) -> Mask:
    """`part` says which of those `among` are meant, bool [of them]; the same as a mask over all."""
    meant = among.copy()
    meant[among] = part
    return meant


def feature_cells(steps: Steps) -> Iterator[Cell]:
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


def verify_cells_by_context(steps: Steps) -> Iterator[Cell]:
    """Target passes by width and context length, in ranges of powers of two."""
    for width, here in _each(steps.width, np.ones(len(steps), np.bool_)):
        contexts, seconds = steps.context_length[here], steps.verified[here]
        for part in merged_ranges(contexts, lambda c: c.bit_length(), FEWEST):
            yield _cell("verify", width, seconds[part], context_length=round(float(contexts[part].mean())))


def verify_cells(steps: Steps) -> list[Cell]:
    """Target passes by width: the mean over context lengths as they came, each range with its own spread."""
    cells: dict[int, list[Cell]] = {}
    for cell in verify_cells_by_context(steps):
        cells.setdefault(cell.size, []).append(cell)
    return [_pooled(parts, steps.verified[steps.width == width]) for width, parts in cells.items()]


def _pooled(parts: list[Cell], seconds: Floats) -> Cell:
    shares = [part.count / len(seconds) for part in parts]
    mean = sum(share * part.seconds for share, part in zip(shares, parts, strict=True))
    return parts[0].model_copy(
        update={
            "context_length": None,
            "count": len(seconds),
            "seconds": mean,
            "standard_error": _combined(parts, shares),
            "variation": _variation(seconds),
            "quartiles": _quartiles(seconds),
        }
    )


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
    ranges = np.array([range_of(number) for number in numbers.tolist()], np.int64)
    groups: list[list[int]] = []
    count = fewest
    for range_, members in zip(*np.unique(ranges, return_counts=True), strict=True):
        if count >= fewest:
            groups.append([])
            count = 0
        groups[-1].append(int(range_))
        count += int(members)
    if count < fewest and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    for group in groups:
        yield np.isin(ranges, group)


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
    mean, error = trimmed(seconds)
    return Cell(
        phase=phase,
        size=size,
        context_length=context_length,
        count=len(seconds),
        seconds=mean,
        standard_error=error,
        variation=_variation(seconds),
        quartiles=_quartiles(seconds),
    )


def _combined(cells: list[Cell], weights: list[float]) -> float | None:
    """Standard error of a weighted sum; None if one of them is not known."""
    errors = [cell.standard_error for cell in cells]
    known = [weight * error for weight, error in zip(weights, errors, strict=True) if error is not None]
    return math.hypot(*known) if len(known) == len(cells) else None


def _variation(seconds: Floats) -> float | None:
    mean = float(seconds.mean())
    return float(seconds.std(ddof=1)) / mean if len(seconds) > 1 and mean > 0 else None


def _quartiles(seconds: Floats) -> tuple[float, float]:
    low, high = np.quantile(seconds, [0.25, 0.75]).tolist()
    return low, high


def _shorter(value: float) -> float:
    return float(f"{value:.6g}")


def _rounded(figures: dict[int, float]) -> dict[int, float]:
    return {size: _shorter(value) for size, value in sorted(figures.items())}
