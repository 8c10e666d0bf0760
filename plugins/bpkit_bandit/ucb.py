"""Upper confidence bounds: pick the block size that could still be the fastest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bpkit.policy import State
from bpkit.types import Context
from bpkit_bandit.arm import Arm, log_steps, pooled_rate
from bpkit_bandit.learner import BanditConfig, Learner

if TYPE_CHECKING:
    from torch import Tensor


class UCBConfig(BanditConfig):
    """Options of `ucb`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {**BanditConfig.grid, "exploration": (0.1, 0.3, 1.0, 2.0)}

    exploration: float = Field(default=1.0, ge=0, description="factor of the bonus for what is little known; 0: greedy")


class UCB(Learner):
    """Picks the arm with the highest rate + `exploration` * spread * sqrt(2 ln n / n_arm); nothing is random.

    n is the steps counted for all arms. UCB1 (Auer et al. 2002) is for rewards in [0, 1]; tokens per second have
    no such scale, so the arm's own spread gives it, as in UCB-V and UCB1-tuned. All rows of a batch get the same block
    size: they share what is known. Arms with fewer than `min_pulls` steps come first, smallest first.

    BanditSpec (2505.15141) brought UCB to speculative decoding; how its program differs, docs/policies/bandits.md says.
    """

    Config = UCBConfig
    config: UCBConfig

    def select(self, state: State, context: Context) -> Tensor:
        typical_rate = pooled_rate(self.arms.values())
        log_n = log_steps([self.arms[size] for size in self.usable])
        return context.full(max(self.usable, key=lambda size: self._bound(self.arms[size], typical_rate, log_n)))

    def _bound(self, arm: Arm, typical_rate: float, log_n: float) -> float:
        if not arm.tried(self.config.min_pulls):
            return math.inf
        return arm.upper_bound(self.config.exploration, arm.spread(typical_rate), log_n)
