"""Thompson sampling: try a block size as often as it is likely to be the fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpkit.policy import State
from bpkit.types import Context
from bpkit_bandit.arm import Arm, normal_noise, pooled_rate
from bpkit_bandit.learner import Learner

if TYPE_CHECKING:
    from torch import Tensor


class Thompson(Learner):
    """Draws tokens per second of every arm from what is known of it, and picks the arm with the highest draw.

    A draw is normal around the arm's rate with its standard error, both from `Arm`. EESD (2406.03853) samples the
    draft length the same way, but from acceptance alone; here the reward is time. Arms with fewer than `min_pulls`
    steps come first, at random.

    One draw serves all rows of a batch. Only the time of the whole step is known: were sizes mixed, large blocks
    would be charged less than they cost, small ones more, and the bandit would settle on blocks that are too large.
    """

    def select(self, state: State, context: Context) -> Tensor:
        typical_rate, noise = pooled_rate(self.arms.values()), normal_noise(context, len(self.usable))
        draws = [self._draw(self.arms[size], typical_rate, z) for size, z in zip(self.usable, noise, strict=True)]
        return context.full(self.usable[draws.index(max(draws))])

    def _draw(self, arm: Arm, typical_rate: float, z: float) -> tuple[bool, float]:
        """Whether the arm is untried, which outranks every rate, and its draw."""
        tried = arm.tried(self.config.min_pulls)
        return not tried, arm.draw(z, typical_rate) if tried else z
