"""How often drafted tokens of some probability stand, counted while decoding: a calibration that needs no training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.policy import State
from bpkit.types import Context

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99, 0.999)
"""Between ranges of the drafter's probability whose tokens are counted together."""
DEPTHS = (1, 3, 7)
"""Places in a draft, from 0, at which another range of places begins."""
SUREST = 0.999
"""Chances are kept below, so that their odds are finite."""
WEIGHT = 8.0
"""Tokens that what is known more broadly counts for."""
KEPT = 0.9995
"""Weight of what was counted after each step."""
RANGE, ODDS = "confidence_range", "confidence_odds"
"""Of a state: ranges of the last draft's tokens, -1 where none was looked at; accepted, expected and tested tokens."""


class ConfidenceCounts:
    """Chances of drafted tokens by the drafter's probability, from counts.

    They are counted by range of the probability, and by it and the place in the draft; the finer count leans on the
    broader, and that on the probability itself. A row that accepts more, or less, than these say has the odds of its
    chances shifted: by the odds of what it accepted over the odds of what was expected, as in `portfolio`.

    Args:
        width: longest draft. discount: weight of a row's past after each of its steps.
    """

    def __init__(self, width: int, discount: float) -> None:
        self.width, self.discount = width, discount
        self.depth: Ints = np.searchsorted(DEPTHS, np.arange(width), side="right")
        self.shape = (len(DEPTHS) + 1, len(BOUNDS) + 1)
        self.accepted, self.tested = np.zeros((2, *self.shape))
        middle = np.convolve((0.0, *BOUNDS, 1.0), (0.5, 0.5), "valid")
        self.expected: Floats = np.minimum(middle, SUREST)
        self._bounds = np.array(BOUNDS)
        self._chances = self.chances()

    def take(self, accepted: Floats, tested: Floats) -> None:
        """Go on from counts that were kept, each of `shape`."""
        self.accepted, self.tested = accepted, tested
        self._chances = self.chances()

    def begin(self, context: Context) -> State:
        """What rows begin with, for a state."""
        like, rows = context.position, context.batch_size
        return {RANGE: like.new_full((rows, self.width), -1), ODDS: like.new_zeros(rows, 3).double()}

    def chances(self) -> Floats:
        """That a token stands if all before it do, by range of places and of probabilities."""
        broad = (self.accepted.sum(0) + WEIGHT * self.expected) / (self.tested.sum(0) + WEIGHT)
        chances: Floats = np.minimum((self.accepted + WEIGHT * broad) / (self.tested + WEIGHT), SUREST)
        return chances

    def survival(self, state: State, probability: Any, length: Any) -> Floats:
        """Chance that the first k drafted tokens stand: float64 [rows, width of the draft].

        Args:
            probability: of the drafter, [rows, width]. length: drafted tokens, [rows].
        """
        width = probability.shape[1]
        if np.isnan(probability).any():  # of a source without a distribution
            probability = np.nan_to_num(probability)
        ranges = np.searchsorted(self._bounds, probability, side="right")
        there = np.arange(width) < length[:, None]
        state[RANGE].numpy()[:, :width] = np.where(there, ranges, -1)
        chance = self._chances[self.depth[:width], ranges]
        accepted, expected, tested = state[ODDS].numpy().T[..., None]
        share = np.divide(expected, tested, out=np.full_like(expected, 0.5), where=tested > 0)
        stands = (accepted + WEIGHT * share) / (expected + WEIGHT * share)
        falls = (tested - accepted + WEIGHT * (1 - share)) / (tested - expected + WEIGHT * (1 - share))
        shift = stands / falls
        chance = chance * shift / (1 - chance + chance * shift)
        return np.asarray(np.cumprod(np.where(there, chance, 0.0), axis=1), np.float64)

    def observe(self, state: State, stands: Any, tested: Any) -> None:
        """Count a step.

        Args:
            stands, tested: whether each drafted token stands, and was tested: bool [rows, longest draft].
        """
        odds, ranges = state[ODDS].numpy(), state[RANGE].numpy()
        odds *= self.discount
        known = tested & (ranges >= 0)
        if known.any():
            chance = self._chances[self.depth, ranges]
            odds += np.stack([(stands & known).sum(1), (chance * known).sum(1), known.sum(1)], axis=1)
            place = self.depth * self.shape[1] + ranges
            for counts, counted in ((self.accepted, known & stands), (self.tested, known)):
                counts *= KEPT
                counts += np.bincount(place[counted], minlength=counts.size).reshape(self.shape)
            self._chances = self.chances()
        ranges.fill(-1)
