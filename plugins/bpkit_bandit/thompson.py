"""Thompson sampling: try a block size as often as it is likely to be the fastest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bpkit.policy import State
from bpkit.types import Context
from bpkit_bandit.arm import Arm, pooled_rate
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
        import torch  # here, so that options can be listed without it

        generator = context.generator
        noise = torch.randn(len(self.usable), generator=generator, device=generator.device, dtype=torch.float64)
        typical_rate = pooled_rate(self.arms.values())
        draws = [self._draw(self.arms[b], typical_rate, z) for b, z in zip(self.usable, noise.tolist(), strict=True)]
        return context.full(self.usable[draws.index(max(draws))])

    def _draw(self, arm: Arm, typical_rate: float, z: float) -> tuple[bool, float]:
        """Whether the arm is untried, which outranks every rate, and its draw with standard normal noise `z`."""
        if not arm.tried(self.config.min_pulls):
            return True, z
        return False, arm.rate + z * arm.spread(typical_rate) / math.sqrt(arm.count)
