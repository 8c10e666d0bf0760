"""How well a cost model prices steps of several rows that it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bpkit.trace.cost.statistics import trimmed
from bpkit.trace.cost.table import HeldOut
from bpkit.trace.cost.timed import Floats, TimedSteps

FEWEST = 10
"""Steps that a mix must have: the mean of fewer is noise."""

MEAN_OF_NORMAL = 0.798
"""Mean of a normal deviate without its sign, in standard deviations."""


def held_out_error(steps: TimedSteps, modelled: Floats, given: Sequence[int]) -> HeldOut | None:
    """The error of prices in steps that were not used to make them; see `HeldOut`. None if the steps are too few.

    Args:
        modelled: price of each step, float64 [steps].
        given: numbers of rows that there are tables for; prices of others are interpolated.
    """
    ratio = steps.measured / modelled
    kinds, kind, count = np.unique(_kinds(steps), axis=0, return_inverse=True, return_counts=True)
    kind = kind.reshape(-1)
    mixes = np.flatnonzero(count >= FEWEST).tolist()
    if not mixes:
        return None
    means = {mix: trimmed(ratio[kind == mix]) for mix in mixes}
    error = {mix: mean - 1 for mix, (mean, _) in means.items()}
    worst = max(mixes, key=lambda mix: abs(error[mix]))
    by_rows = {
        rows: _mean([abs(error[mix]) for mix in mixes if kinds[mix, 0] == rows])
        for rows in np.unique(kinds[mixes, 0]).tolist()
    }
    between = [abs(error[mix]) for mix in mixes if kinds[mix, 0] not in given]
    return HeldOut(
        steps=int(count[mixes].sum()),
        mixes=len(mixes),
        mean_error=_mean([abs(e) for e in error.values()]),
        worst_error=round(error[worst], 4),
        worst_mix=_named(*kinds[worst].tolist()),
        within_tenth=_mean([abs(e) < 0.1 for e in error.values()]),
        noise=_mean([MEAN_OF_NORMAL * (spread or 0.0) for _, spread in means.values()]),
        step_error=round(float(np.median(np.abs(ratio - 1))), 4),
        by_rows=by_rows,
        between_error=_mean(between) if between else None,
    )


def _kinds(steps: TimedSteps) -> np.ndarray:
    """What like steps share, int64 [steps, 4]: rows, width and context length by doublings, more than half verified."""
    width, context = (np.frexp(sizes)[1] for sizes in (steps.width - 1, steps.context_length))
    full = 2 * steps.verify_positions > steps.rows * steps.width
    return np.stack([steps.rows, width, context, full], axis=1)


def _named(rows: int, width: int, context: int, full: int) -> str:
    widest, share = 2**width, "more" if full else "less"
    widths = str(widest) if widest <= 2 else f"{widest // 2 + 1} to {widest}"
    return f"{rows} rows, width {widths}, {share} than half verified, context length {2 ** (context - 1)} and more"


def _mean(values: list[float] | list[bool]) -> float:
    return round(float(np.mean(values)), 4)
