"""SVIP (Zhang et al. 2024, 2411.18462): stop where the drafter does not know what comes next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature
from bpkit_threshold.stopping import trusted_length, trusted_whole

if TYPE_CHECKING:
    from torch import Tensor


class SvipConfig(PolicyConfig):
    """Options of `svip`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "h": (0.2, 0.4, 0.6, 0.775, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0),
        "block_size": tuple(range(2, 33)),
    }

    h: float = Field(default=0.6, ge=0, description="largest sqrt(entropy) that is trusted; the entropy is in nats")
    block_size: int | None = Field(
        default=None, ge=1, description="positions to draft, anchor included; by default the trained block size"
    )


class Svip(Policy):
    """Keeps positions up to the first whose sqrt(entropy) exceeds `h`.

    The paper bounds the acceptance rate from below by a term in the root of the entropy. The authors' program tests
    sqrt(0.15 * entropy) > 0.3, which is `h` = 0.775 here, and still verifies the token at which it stops; here that
    token is left out. Entropy belongs to the distribution and not to the drafted token, so this policy may also run
    under the rejection rule.
    """

    Config = SvipConfig
    wants = frozenset({Feature.DRAFT_ENTROPY})
    config: SvipConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.block_size = self.config.block_size or decoder.trained_block_size

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return trusted_whole(draft, self._trusted(draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return trusted_length(draft, self._trusted(draft))

    def _trusted(self, draft: Draft) -> Tensor:
        # Squared on the other side: an entropy of 0 may be rounded to -1e-8, and its root would be NaN.
        return draft[Feature.DRAFT_ENTROPY] <= self.config.h**2  # bool [batch, width]
