"""What steps of several rows cost, and the positions that are worth their price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.export.position_costs import PositionCosts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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


class PositionPrices(PositionCosts):
    """What steps of so many rows cost, and the best of them; arguments as of `PositionCosts`."""

    def best(
        self, survival: Floats, rate: float, *, before: float | None = None, kept: Floats | None = None
    ) -> TakenPositions:
        """Positions whose chances of being reached are worth the time that they take.

        Args:
            survival: chance that the first k drafted tokens stand, falling, float64 [rows, longest draft].
            rate: tokens that a second is worth.
            before: where the draft is still to be made, seconds that it takes beside its price.
            kept: of a draft that is cut short after it is made, chances that the first k tokens are verified; by
                default all that is taken is.
        """
        order, within, tokens, counts = self._taken(survival)
        places = self._flat(counts)
        seconds = self.verify.take(places if kept is None else self._flat(self._verified(order, within, kept)))
        if before is not None:
            seconds += self.drafting.take(places)
            seconds[1:] += before
        choice, last = divmod(int((tokens - rate * seconds).argmax()), tokens.shape[1])
        width, taken = int(self.widths[choice]), int(counts[choice, last])
        chosen = order[:last]
        rows = chosen[chosen % survival.shape[1] < width - 1] // survival.shape[1]
        verify = float(self.verify[choice, taken])
        prompts = self.beside[0] * self.beside[1] * (verify - float(self.verify[choice, taken - 1])) if taken else 0.0
        drafting = 0.0 if before is None else float(self.drafting[choice, taken]) + (before if width > 1 else 0.0)
        return TakenPositions(np.bincount(rows, minlength=self.rows), width if taken else 1, verify - prompts, drafting)

    def best_rate(self, survival: Floats, *, before: float) -> float:
        """The most tokens per second that one such step may give."""
        _, _, tokens, counts = self._taken(survival)
        seconds = (self.verify + self.drafting).take(self._flat(counts))
        seconds[1:] += before
        return float(((self.rows + tokens) / seconds).max())

    def _verified(self, order: Ints, within: Any, kept: Floats) -> Ints:
        """How many of the positions so far are verified in the mean, rounded; as the counts of `_taken`."""
        found = np.zeros((len(self.widths), len(order) + 1))
        np.cumsum(within * kept.ravel()[order], axis=1, out=found[:, 1:])
        return np.rint(found, out=found).astype(np.int64)

    def _flat(self, counts: Ints) -> Ints:
        """Places of counts, [widths, any], in a table that is flat."""
        places: Ints = counts + np.arange(len(self.widths))[:, None] * self.verify.shape[1]
        return places

    def _taken(self, survival: Floats) -> tuple[Ints, Any, Floats, Ints]:
        """The likeliest positions of all rows first: their places, and of each width which are part of such a block,
        and tokens and positions so far.

        Returns:
            int64 [count]; bool [widths, count]; float64 and int64 [widths, 1 + count].
        """
        order = np.argsort(-survival, axis=None, kind="stable")
        chances, shape = survival.ravel()[order], (len(self.widths), len(order) + 1)
        place = np.where(chances > 0, order % survival.shape[1], self.widths[-1])  # what was not drafted is never part
        within = place < (self.widths - 1)[:, None]
        tokens, counts = np.zeros(shape), np.zeros(shape, np.int64)
        np.cumsum(within * chances, axis=1, out=tokens[:, 1:])
        np.cumsum(within, axis=1, out=counts[:, 1:])
        return order, within, tokens, counts
