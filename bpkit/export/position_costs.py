"""What steps of several rows cost by the width of their pass and the drafted tokens of all rows together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from bpkit.export.prices import PassPrices, StepPrices
from bpkit.types import CostModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_WIDTHS = 9
"""Widths that a decision compares; more cost its time and gain little, as rows take as much of a width as pays."""
COST_CONTEXT = 64
"""Costs are looked up once for so many context lengths: they change slowly, and a lookup costs a decision's time."""
MOST_KEPT = 64
"""Numbers of rows and ranges of context lengths whose prices are kept."""


class PositionCosts:
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
        self.rows, self.beside, self.features, self._cost, self._at = rows, beside, features, cost, at
        self.widths = widths_of(sizes)
        tokens = np.arange(rows * (self.widths[-1] - 1) + 1)
        fits = tokens <= rows * (self.widths - 1)[:, None]
        self._prices = StepPrices(cost, slope, at, rows)
        rest = self._prices.of("rest", 1)
        self.verify = np.where(fits, self._beside_prompts(rows + tokens) + rest, np.inf)
        self.drafting = self._seconds("draft", self.widths, rows + tokens)
        if features:
            self.drafting = self.drafting + self._seconds("features", self.widths, rows + tokens)
        self.drafting[0] = 0.0

    def _seconds(self, phase: str, sizes: Ints, positions: Ints, beside: int = 0) -> Floats:
        """Of a phase, by its size and by positions that are no padding, as far as they fit: [sizes, positions]."""
        most = np.minimum(positions, self.rows * sizes[:, None]) + beside
        # One row pays for what it verifies, whatever the width; several for the widest.
        asked = most if self.rows == 1 and phase == "verify" else np.broadcast_to(sizes[:, None], most.shape)
        array: Any = getattr(self._cost, "array", None)
        if array is not None and (self._prices.shared or self.rows == 1):
            try:
                return np.asarray(array(phase, asked, self._at, self.rows, most))
            except ValueError:  # a table may end sooner for so many rows: what it lacks is never chosen
                return np.stack([self._or_inf(phase, *row) for row in zip(asked, most, strict=True)])
        smallest = 1 if phase == "verify" else 2
        passes = PassPrices(self._prices, phase, smallest, int(sizes.max()))
        return passes.of(np.maximum(asked, smallest), np.maximum(most, smallest))

    def _or_inf(self, phase: str, sizes: Ints, positions: Ints) -> Floats:
        """Seconds of a phase, [positions]; infinite where the cost model has no figure for them."""
        ask: Any = self._cost
        try:
            return np.asarray(ask.array(phase, sizes, self._at, self.rows, positions))
        except ValueError:
            return np.full(len(positions), np.inf)

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


Costs = TypeVar("Costs", bound=PositionCosts)


class KeptCosts(Generic[Costs]):
    """The same objects for the same number of rows and about the same context length; those last used are kept.

    Args:
        kind: of what is kept. cost, sizes, features, slope: as of `PositionCosts`.
    """

    def __init__(
        self, kind: type[Costs], cost: CostModel | None, sizes: Sequence[int], *, features: bool, slope: float
    ) -> None:
        self._kind, self._cost, self._sizes, self._options = kind, cost, sizes, {"features": features, "slope": slope}
        self._kept: dict[tuple[Any, ...], Costs] = {}

    def of(self, rows: int, context_length: int, beside: tuple[float, int] = (0.0, 0)) -> Costs:
        """Of so many rows, the longest of which has so many tokens. Raises ValueError as `PositionCosts`."""
        key = rows, context_length // COST_CONTEXT, beside
        found = self._kept.pop(key, None)
        if found is None:
            at = key[1] * COST_CONTEXT + COST_CONTEXT // 2
            options: Any = self._options
            found = self._kind(self._cost, self._sizes, rows, at, beside=beside, **options)
        self._kept[key] = found  # the last used is the last to go
        if len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return found


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


def widths_of(sizes: Sequence[int]) -> Ints:
    """1 and at most `MOST_WIDTHS` of the block sizes: the small ones and the largest, ever further apart.

    >>> widths_of([2, 3, 4]).tolist(), widths_of(range(2, 17)).tolist()
    ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 9, 12, 16])
    """
    if len(sizes) > MOST_WIDTHS:
        places = np.unique(np.round(np.geomspace(1, len(sizes), MOST_WIDTHS)).astype(int) - 1)
        sizes = [sizes[place] for place in places.tolist()]
    return np.array([1, *sizes])
