"""From timed steps of an engine that packs its rows to a `PackedCost`, with the error in steps that were held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.cost.figures import CostError
from bpkit.trace.cost.held_out import held_out_error
from bpkit.trace.cost.packed import PackedCost
from bpkit.trace.cost.statistics import HUBER, MEDIAN_OF_NORMAL, ROUNDS_OF_WEIGHING
from bpkit.trace.cost.table import HeldOut
from bpkit.trace.cost.timed import TimedSteps

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Passes = Literal["none", "one", "each"]
"""Of the drafter: no model, one pass of it for a whole draft, or one for each token."""
FEWEST = 20
"""Steps between two bends of a line; a bend with fewer before it is left out."""
FEWEST_STEPS = 60
FOLDS = 4


@dataclass(frozen=True)
class EngineSteps:
    """Steps of an engine as columns, each [steps].

    Attributes:
        run: in which it was timed; runs are held out as a whole.
        rows: that were in the pass, those whose prompts it read included.
        decoding: rows that decoded. verified: their positions of the target's pass.
        prompt_tokens: the other positions of the pass.
        draft_length: tokens of each row's draft that was made in the step, 0 if none was.
        context_length: of the longest row.
        seconds: from the step's beginning to that of the next, without the policy's decisions.
    """

    run: Ints
    rows: Ints
    decoding: Ints
    verified: Ints
    prompt_tokens: Ints
    draft_length: Ints
    context_length: Ints
    seconds: Floats

    @classmethod
    def of(cls, steps: Sequence[Sequence[float]]) -> EngineSteps:
        """Columns of a list of steps, each with its numbers in the order of the attributes."""
        names = [column.name for column in fields(cls)]
        columns = np.array(steps, np.float64).reshape(-1, len(names)).T
        counts = {name: column.astype(np.int64) for name, column in zip(names[:-1], columns[:-1], strict=True)}
        return cls(**counts, seconds=columns[-1])

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, chosen: NDArray[np.bool_]) -> EngineSteps:
        """Some of the steps."""
        return EngineSteps(*(getattr(self, column.name)[chosen] for column in fields(self)))

    @property
    def positions(self) -> Ints:
        """Of the target's pass."""
        return self.verified + self.prompt_tokens

    def drafted(self, passes: Passes) -> Ints:
        """Positions of a pass of the drafter, 0 where it drafted nothing."""
        width = self.draft_length + 1 if passes == "one" else 1
        return np.where(self.draft_length > 0, self.rows * width, 0)

    def modelled(self, cost: PackedCost) -> Floats:
        """What a cost model says of `seconds`."""
        size = self.draft_length + 1
        draft = cost.array("draft", size, 0, self.rows) + cost.array("features", size, 0, self.rows)
        return cost.array("prefill", self.positions) + cost.array("rest", 1, 0, self.rows) + draft


def fit_packed(steps: EngineSteps, passes: Passes, *, name: str = "measured") -> PackedCost:
    """The lines that are nearest to the steps: non-negative least squares of relative errors.

    Lines rise or stay level from bend to bend, and bend at powers of two. Outliers weigh less, by Huber's weights.

    Raises:
        CostError: the steps are too few.
    """
    if len(steps) < FEWEST_STEPS:
        raise CostError(
            f"{len(steps)} measured steps are too few to tell what they cost: give more prompts, more new tokens or "
            "more time"
        )
    positions, drafted = steps.positions, steps.drafted(passes)
    bends = _bends(positions)
    draft_bends = _bends(drafted[drafted > 0]) if passes != "none" and (drafted > 0).any() else []
    times = steps.draft_length if passes == "each" else np.ones(len(steps))
    columns = [_rises(positions, bends), steps.rows[:, None], _rises(drafted, draft_bends) * times[:, None]]
    found = _least_squares(np.hstack(columns), steps.seconds)
    whole, row, draft = np.split(found, [len(bends), len(bends) + 1])
    return PackedCost(
        name=name,
        passes=_line(bends, whole),
        row=_rounded(row[0]),
        draft=_line(draft_bends, draft),
        draft_passes="each" if passes == "each" else "one",
        max_rows=int(steps.rows.max()),
        max_block_size=max(int(steps.draft_length.max()) + 1, 2),
        context_length=int(np.median(steps.context_length)),
    )


def held_out_steps(steps: EngineSteps, passes: Passes, given: Sequence[int]) -> HeldOut | None:
    """The error in steps of runs that were not used, by cross-validation; None if too little is left.

    Args:
        given: numbers of rows that were asked for; others occur where runs begin and end.
    """
    priced = np.zeros(len(steps))
    runs = np.unique(steps.run)
    for fold in range(min(FOLDS, len(runs))):
        held = np.isin(steps.run, runs[fold::FOLDS])
        if (~held).sum() < FEWEST_STEPS:
            return None
        priced[held] = steps.part(held).modelled(fit_packed(steps.part(~held), passes))
    known = (priced > 0) & (steps.decoding > 0)
    return held_out_error(_as_timed(steps.part(known)), priced[known], given) if known.any() else None


def _as_timed(steps: EngineSteps) -> TimedSteps:
    """The steps as those of padded passes are held, with the mean width of the rows as the width."""
    nothing, zero = np.zeros(len(steps), np.int64), np.zeros(len(steps))
    width = -(-steps.verified // np.maximum(steps.decoding, 1))
    return TimedSteps(
        draft_size=np.where(steps.draft_length > 0, steps.draft_length + 1, 0),
        waiting=nothing,
        width=width,
        context_length=steps.context_length,
        features=nothing > 0,
        rows=steps.decoding,
        draft_positions=nothing,
        verify_positions=steps.verified,
        draft=zero,
        verify=steps.seconds,
        policy=zero,
        rest=zero,
    )


def _bends(numbers: Ints) -> list[int]:
    """Powers of two, from the smallest number on, with enough steps between any two."""
    found = [int(numbers.min())]
    power = 1
    while power < numbers.max():
        power *= 2
        if ((numbers > found[-1]) & (numbers <= power)).sum() >= FEWEST and power > found[-1]:
            found.append(power)
    return found


def _rises(numbers: Ints, bends: Sequence[int]) -> Floats:
    """Columns whose sum with weights is a line that bends there: a level, then what lies beyond each bend but the last.

    Where the number is 0, all are. float64 [steps, bends].
    """
    if not bends:
        return np.zeros((len(numbers), 0))
    ends = [*bends[1:-1], np.inf]
    rises = [np.clip(numbers - low, 0, high - low) for low, high in zip(bends[:-1], ends, strict=True)]
    return np.stack([np.asarray(numbers > 0, np.float64), *rises], axis=1)


def _line(bends: Sequence[int], weights: Floats) -> dict[int, float]:
    """The figures at the bends."""
    if not bends:
        return {}
    values = np.cumsum([weights[0], *(weights[1:] * np.diff(bends))])
    return {bend: _rounded(value) for bend, value in zip(bends, values.tolist(), strict=True)}


def _least_squares(columns: Floats, seconds: Floats) -> Floats:
    """Non-negative weights of the columns with the smallest relative errors, outliers by Huber's weights (1964)."""
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    scaled, weights = columns / scale, 1.0 / seconds
    found = np.zeros(columns.shape[1])
    for _ in range(ROUNDS_OF_WEIGHING):
        found = _non_negative(scaled * weights[:, None], seconds * weights)
        error = np.abs(seconds - scaled @ found) / seconds
        spread = float(np.median(error)) / MEDIAN_OF_NORMAL
        if not spread:
            break
        weights = np.sqrt(np.minimum(1.0, HUBER * spread / np.maximum(error, 1e-300))) / seconds
    return np.asarray(found / scale)


def _non_negative(columns: Floats, values: Floats) -> Floats:
    """Least squares without negative weights, by active sets (Lawson & Hanson 1974, chapter 23)."""
    q, r = np.linalg.qr(columns)
    aims, found, free = q.T @ values, np.zeros(columns.shape[1]), np.zeros(columns.shape[1], bool)
    least = 1e-10 * float(np.abs(r.T @ aims).max(initial=0.0))
    for _ in range(10 * len(found)):
        gains = np.where(free, -np.inf, r.T @ (aims - r @ found))
        if not gains.max(initial=-np.inf) > least:
            break
        free[gains.argmax()] = True
        while True:
            best = np.zeros_like(found)
            best[free] = np.linalg.lstsq(r[:, free], aims)[0]
            below = free & (best <= 0)
            if not below.any():
                break
            share = float((found[below] / np.maximum(found[below] - best[below], 1e-300)).min())
            found += share * (best - found)
            free &= found > 1e-12 * found.max()
        found = best
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
