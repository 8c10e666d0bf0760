"""SVIP (Zhang et al. 2024, 2411.18462): stop where the drafter does not know what comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bpkit.policy import PolicyConfig, State, StopRule
from bpkit.policy.stop_rules import low_entropy
from bpkit.sizes import BlockSize
from bpkit.types import Draft, Feature

if TYPE_CHECKING:
    from torch import Tensor


class SvipConfig(PolicyConfig):
    """Options of `svip`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "h": (0.2, 0.4, 0.6, 0.775, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0),
        "block_size": tuple(range(2, 33)),
    }

    h: float = Field(default=0.6, ge=0, description="largest sqrt(entropy) that is trusted; the entropy is in nats")
    block_size: BlockSize = None


class Svip(StopRule):
    """Keeps positions up to the first whose sqrt(entropy) exceeds `h`.

    The paper bounds the acceptance rate from below by a term in the root of the entropy. The authors' program tests
    sqrt(0.15 * entropy) > 0.3, which is `h` = 0.775 here, and still verifies the token at which it stops; here that
    token is left out. Entropy belongs to the distribution and not to the drafted token, so this policy may also run
    under the rejection rule.
    """

    Config = SvipConfig
    wants = frozenset({Feature.DRAFT_ENTROPY})
    config: SvipConfig

    def trusted(self, state: State, draft: Draft) -> Tensor:
        return low_entropy(draft, self.config.h)
