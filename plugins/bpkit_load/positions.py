"""What steps of several rows cost, and the positions that are worth their price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from bpkit.export.position_costs import PositionCosts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST = 0.05
"""Positions with a lower chance are never taken: they gain next to nothing and would take a decision's time."""


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
    """What steps of so many rows cost, and the best of them; arguments as of `PositionCosts`.

    Class attributes:
        least: positions with a lower chance are never taken.
    """

    least = LEAST

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
        if self._flat:
            return self._widest(survival, rate, before)
        if self.rows == 1:
            return self._of_one(survival[0].tolist(), rate, before, None if kept is None else kept[0].tolist())
        chances = survival.ravel()
        order = np.flatnonzero(chances > self.least)
        order = order[np.argsort(-chances[order], kind="stable")]
        gains, place = chances[order], order % survival.shape[1]
        share = None if kept is None else kept.ravel()[order]
        best, choice, taken = -rate * float(self.verify[0, 0]), 0, order[:0]
        for width in self._compared if before is not None else self._compared_after:
            inside = slice(None) if self.widths[width] > survival.shape[1] else place < self.widths[width] - 1
            tokens = np.cumsum(gains[inside])
            if not len(tokens):
                continue
            seconds = self._first(width, len(tokens), None if share is None else share[inside], before)
            worth = tokens - rate * seconds
            last = int(worth.argmax())
            if worth[last] > best:
                best, choice, taken = float(worth[last]), width, order[inside][: last + 1]
        counts = np.bincount(taken // survival.shape[1], minlength=self.rows)
        return self._chosen(choice, counts, len(taken), before)

    def _first(self, width: int, count: int, share: Floats | None, before: float | None) -> Floats:
        """Seconds of a step with the first 1, 2, ... positions of a width, float64 [count].

        Args:
            share: chance of each to be verified; the target's pass is priced by how many are in the mean, rounded.
        """
        if share is None:
            seconds = self.verify[width, 1 : count + 1]
        else:
            seconds = self.verify[width].take(np.rint(np.cumsum(share)).astype(np.int64))
        return seconds if before is None else seconds + self.drafting[width, 1 : count + 1] + before

    def _of_one(
        self, chances: Sequence[float], rate: float, before: float | None, kept: Sequence[float] | None
    ) -> TakenPositions:
        """The same of one row: plain numbers take a third of the time of arrays."""
        chances = [chance for chance in chances if chance > self.least]
        ahead = [*accumulate(chances)]
        counts = range(1, len(chances) + 1) if kept is None else [round(share) for share in accumulate(kept)]
        best, choice, taken = -rate * self._verify[0][0], 0, 0
        for width in self._compared if before is not None else self._compared_after:
            verify, drafting = self._verify[width], self._drafts[width]
            for last in range(min(int(self.widths[width]) - 1, len(chances))):
                seconds = verify[counts[last]] + (0.0 if before is None else drafting[last + 1] + before)
                worth = ahead[last] - rate * seconds
                if worth > best:
                    best, choice, taken = worth, width, last + 1
        return self._chosen(choice, np.array([taken]), taken, before)

    @cached_property
    def _verify(self) -> list[list[float]]:
        """`verify` as plain numbers; and `drafting`."""
        numbers: list[list[float]] = self.verify.tolist()
        return numbers

    @cached_property
    def _drafts(self) -> list[list[float]]:
        numbers: list[list[float]] = np.broadcast_to(self.drafting, self.verify.shape).tolist()
        return numbers

    def _widest(self, survival: Floats, rate: float, before: float | None) -> TakenPositions:
        """The same where a width has one price: then all of it is taken."""
        seconds = self.verify[:, 0].copy()
        if before is not None:
            seconds += self.drafting[:, 0]
            seconds[1:] += before
        likely = survival > self.least
        ahead = np.concatenate([[0.0], np.cumsum((survival * likely).sum(axis=0))])
        choice = int((ahead[np.minimum(self.widths - 1, survival.shape[1])] - rate * seconds).argmax())
        counts = likely[:, : self.widths[choice] - 1].sum(axis=1)
        return self._chosen(choice, counts, int(counts.sum()), before)

    def _chosen(self, choice: int, counts: Ints, taken: int, before: float | None) -> TakenPositions:
        verify, drafting, prompts = float(self.verify[choice, taken]), 0.0, 0.0
        if before is not None:
            drafting = float(self.drafting[choice, taken]) + (before if choice else 0.0)
        if taken and self.beside[0]:
            prompts = self.beside[0] * self.beside[1] * (verify - float(self.verify[choice, taken - 1]))
        return TakenPositions(counts, int(self.widths[choice]) if taken else 1, verify - prompts, drafting)

    def best_rate(self, survival: Floats, *, before: float | None = None, drafting: float = 0.0) -> float:
        """The most tokens per second that one such step may give.

        Args:
            survival, before: as of `best`. drafting: seconds that a draft took which is made.
        """
        rate, better = 0.0, self.rows / (drafting + float(self.verify[0, 0]))
        while better > rate:  # Dinkelbach's iteration: what is best at a rate has no lower one
            rate = better
            taken = self.best(survival, rate, before=before)
            tokens = self.rows + float(survival[np.arange(survival.shape[1]) < taken.counts[:, None]].sum())
            better = max(rate, tokens / (taken.seconds + taken.drafting + drafting))
        return rate

    @cached_property
    def _flat(self) -> bool:
        """Whether prices go by widths alone."""
        fits = np.isfinite(self.verify)
        return all(bool((table == table[:, :1])[fits].all()) for table in (self.verify, self.drafting))

    @cached_property
    def _compared(self) -> list[int]:
        """Places of the widths with a draft that are compared: the widest alone, where no other is ever cheaper."""
        return self._compared_after if self._packed(self.drafting) else [*range(1, len(self.widths))]

    @cached_property
    def _compared_after(self) -> list[int]:
        """The same where the draft is made."""
        return [len(self.widths) - 1] if self._packed(self.verify) else [*range(1, len(self.widths))]

    def _packed(self, table: Floats) -> bool:
        fits = np.isfinite(self.verify[1:])
        return bool((table[1:] >= table[-1])[fits].all())
