"""SVIP (Zhang et al. 2024, 2411.18462): stop where the drafter does not know what comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bpkit.types import Draft, Feature
from bpkit_threshold.stopping import StoppingConfig, StopRule

if TYPE_CHECKING:
    from torch import Tensor


class SvipConfig(StoppingConfig):
    """Options of `svip`."""

    h: float = Field(default=0.6, ge=0, description="largest square root of the drafter's entropy (nats) to go on at")
    block_size: int | None = StoppingConfig.model_fields["block_size"]


class Svip(StopRule):
    """Keeps positions up to the first whose sqrt(entropy) exceeds `h`.

    The paper bounds the acceptance rate from below by 1 - sqrt(c * entropy), from Pinsker's inequality. Two things
    differ in the authors' program: it tests sqrt(0.15 * entropy) > 0.3, which is `h` = 0.775 here, and it still
    verifies the token whose entropy was too high. Entropy belongs to the distribution and not to the drafted token,
    so this policy may also run under the rejection rule.
    """

    Config = SvipConfig
    wants = frozenset({Feature.DRAFT_ENTROPY})
    config: SvipConfig

    def trusts(self, draft: Draft) -> Tensor:
        # Squared on the other side: an entropy of 0 may be rounded to -1e-8, whose root is NaN.
        return draft[Feature.DRAFT_ENTROPY] <= self.config.h**2
