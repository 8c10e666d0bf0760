"""What steps of several rows cost, and the positions that are worth their price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.types import CostModel
from bpkit_load.prices import PassPrices, StepPrices

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_WIDTHS = 9
"""Widths that a decision compares; more cost its time and gain little, as rows take as much of a width as pays."""


@dataclass(frozen=True)
class TakenPositions:
    """Positions for each row.

    Attributes:
        counts: drafted tokens of each row, int64 [rows].
        width: padded width of the pass, anchors included; 1 if no row has any.
        seconds: of the target's pass, without what tokens of prompts add to it, and of the rest of the step.
        drafting: seconds of the draft, where it was still to be made.
    """

    counts: Ints
    width: int
    seconds: float
    drafting: float


class PositionPrices:
    """What steps of so many rows cost at one context length.

    Args:
        cost: None for `slope`: a further position of a row costs such a part of a plain step of that row.
        sizes: block sizes from 2 on, ascending. rows: that run.
        beside: where the cost model's engine reads prompts in the same passes, how many in one on average, and tokens
            of each.
        features: whether features of drafts are computed.

    Attributes:
        widths: 1 and some of the sizes, int64 [widths].
        verify: seconds of a target pass and of the rest of a step, by padded width and by drafted tokens of all rows
            together, float64 [widths, 1 + most]; more than fit in a width cost infinitely much.
        drafting: the same of the draft; 0 at width 1.

    Raises:
        ValueError: the cost model has no figures for so many rows.
    """

    def __init__(
        self,
        cost: CostModel | None,
        sizes: Sequence[int],
        rows: int,
        at: int,
        *,
        features: bool,
        slope: float,
        beside: tuple[float, int] = (0.0, 0),
    ) -> None:
        self.rows, self.beside, self._cost, self._at = rows, beside, cost, at
        self.widths = np.array([1, *_thinned(sizes)])
        tokens = np.arange(rows * (self.widths[-1] - 1) + 1)
        self._fits = tokens <= rows * (self.widths - 1)[:, None]
        self._prices = StepPrices(cost, slope, at, rows)
        rest = self._prices.of("rest", 1)
        self.verify = np.where(self._fits, self._beside_prompts(rows + tokens) + rest, np.inf)
        self.drafting = self._seconds("draft", self.widths, rows + tokens)
        if features:
            self.drafting = self.drafting + self._seconds("features", self.widths, rows + tokens)
        self.drafting[0] = 0.0

    def _seconds(self, phase: str, sizes: Ints, positions: Ints, beside: int = 0) -> Floats:
        """Of a phase, by its size and by positions that are no padding, as far as they fit: [sizes, positions]."""
        most = np.minimum(positions, self.rows * sizes[:, None]) + beside
        array: Any = getattr(self._cost, "array", None)
        if array is not None and (self._prices.shared or self.rows == 1):
            return np.asarray(array(phase, sizes[:, None], self._at, self.rows, most))
        smallest = 1 if phase == "verify" else 2
        passes = PassPrices(self._prices, phase, smallest, int(sizes.max()))
        return passes.of(np.maximum(np.broadcast_to(sizes[:, None], most.shape), smallest), np.maximum(most, smallest))

    def _beside_prompts(self, positions: Ints) -> Floats:
        """Seconds of target passes, as the mean over passes that read no, one, two, ... prompts beside."""
        mean, length = self.beside
        passes = [
            self._seconds("verify", self.widths, positions, count * length) for count in range(len(poisson(mean)))
        ]
        return np.asarray(np.average(passes, axis=0, weights=poisson(mean)))

    def catch_up(self, waiting: int) -> float:
        """Seconds that a draft takes longer for positions that wait, of the row with most."""
        return self._prices.of("catch_up", waiting) if waiting else 0.0

    def best(self, survival: Floats, rate: float, *, before: float | None = None) -> TakenPositions:
        """Positions whose chances of being reached are worth the time that they take.

        Args:
            survival: chance that the first k drafted tokens stand, falling, float64 [rows, longest draft].
            rate: tokens that a second is worth.
            before: where the draft is still to be made, seconds that it takes beside its price.
        """
        order, tokens, counts = self._taken(survival)
        step = self._step(before)
        choice, last = divmod(int((tokens - rate * step.take(self._flat(counts))).argmax()), tokens.shape[1])
        width, taken = int(self.widths[choice]), int(counts[choice, last])
        chosen = order[:last]
        rows = chosen[chosen % survival.shape[1] < width - 1] // survival.shape[1]
        seconds, all_of_it = float(self.verify[choice, taken]), float(step[choice, taken])
        prompts = self.beside[0] * self.beside[1] * (seconds - float(self.verify[choice, taken - 1])) if taken else 0.0
        return TakenPositions(
            np.bincount(rows, minlength=self.rows), width if taken else 1, seconds - prompts, all_of_it - seconds
        )

    def best_rate(self, survival: Floats, *, before: float) -> float:
        """The most tokens per second that one such step may give."""
        _, tokens, counts = self._taken(survival)
        return float(((self.rows + tokens) / self._step(before).take(self._flat(counts))).max())

    def _step(self, before: float | None) -> Floats:
        if before is None:
            return self.verify
        return self.verify + self.drafting + np.where(self.widths > 1, before, 0.0)[:, None]

    def _flat(self, counts: Ints) -> Ints:
        """Places of counts, [widths, any], in a table that is flat."""
        places: Ints = counts + np.arange(len(self.widths))[:, None] * self.verify.shape[1]
        return places

    def _taken(self, survival: Floats) -> tuple[Ints, Floats, Ints]:
        """The likeliest positions of all rows first: their places, and of each width tokens and positions so far.

        Returns:
            int64 [count]; float64 and int64 [widths, 1 + count].
        """
        width = survival.shape[1]
        order = np.argsort(-survival, axis=None, kind="stable")
        within = (order % width)[None] < (self.widths - 1)[:, None]
        tokens, counts = (
            np.zeros((len(self.widths), len(order) + 1)),
            np.zeros((len(self.widths), len(order) + 1), np.int64),
        )
        np.cumsum(np.where(within, survival.ravel()[order], 0.0), axis=1, out=tokens[:, 1:])
        np.cumsum(within, axis=1, out=counts[:, 1:])
        return order, tokens, counts


def poisson(mean: float) -> list[float]:
    """Chances of 0, 1, ... events, as far as they matter.

    >>> [round(chance, 3) for chance in poisson(0.5)]
    [0.607, 0.303, 0.076, 0.013, 0.002]
    """
    chance, chances = math.exp(-mean), list[float]()
    while len(chances) <= mean or chance > 0.001:
        chances.append(chance)
        chance *= mean / len(chances)
    return chances


def _thinned(sizes: Sequence[int]) -> list[int]:
    """At most `MOST_WIDTHS` of the sizes: the small ones and the largest, ever further apart.

    >>> _thinned([2, 3, 4]), _thinned(range(2, 17))
    ([2, 3, 4], [2, 3, 4, 5, 6, 9, 12, 16])
    """
    if len(sizes) <= MOST_WIDTHS:
        return list(sizes)
    places = np.unique(np.round(np.geomspace(1, len(sizes), MOST_WIDTHS)).astype(int) - 1)
    return [sizes[place] for place in places.tolist()]
