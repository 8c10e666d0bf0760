"""Thompson sampling: try a block size as often as it is likely to be the fastest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bpkit.policy import State
from bpkit.types import Context
from bpkit_bandit.arm import pooled_rate
from bpkit_bandit.learner import Learner

if TYPE_CHECKING:
    from torch import Tensor


class Thompson(Learner):
    """Draws tokens per second of every arm from what is known of it, and picks the arm with the highest draw.

    A draw is normal around the arm's rate with its standard error, both from `Arm`. EESD (2406.03853) samples the
    draft length the same way, but from acceptance alone; here the reward is time. Each row of a batch draws for
    itself, so a batch tries several sizes at once. Arms with fewer than `min_pulls` steps come first, at random.
    """

    def select(self, state: State, context: Context) -> Tensor:
        import torch  # here, so that options can be listed without it

        generator = context.generator
        shape = (context.batch_size, len(self.usable))
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
        estimates = self._estimates()
        return context.position.new_tensor([self._best(estimates, row) for row in noise.tolist()])

    def _estimates(self) -> list[tuple[int, float, float]]:
        """For each usable arm: its rank, where untried arms are above all others; its rate; its standard error."""
        typical_rate = pooled_rate(self.arms.values())
        estimates = []
        for arm in (self.arms[size] for size in self.usable):
            if arm.tried(self.config.min_pulls):
                estimates.append((0, arm.rate, arm.spread(typical_rate) / math.sqrt(arm.count)))
            else:
                estimates.append((1, 0.0, 1.0))
        return estimates

    def _best(self, estimates: list[tuple[int, float, float]], noise: list[float]) -> int:
        draws = [(rank, rate + error * z) for (rank, rate, error), z in zip(estimates, noise, strict=True)]
        return self.usable[draws.index(max(draws))]
