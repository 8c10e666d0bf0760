"""Stop where the draft as a whole has become unlikely, by the drafter's own word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bpkit.policy import Policy, PolicyConfig, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature
from bpkit_threshold.stopping import trusted_length, trusted_whole

if TYPE_CHECKING:
    from torch import Tensor


class ThresholdConfig(PolicyConfig):
    """Options of `threshold`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "threshold": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        "block_size": tuple(range(2, 33)),
    }

    threshold: float = Field(
        default=0.4, ge=0, le=1, description="least probability that the draft so far stands; 0 keeps all of it"
    )
    block_size: int | None = Field(
        default=None, ge=1, description="positions to draft, anchor included; by default the trained block size"
    )


class Threshold(Policy):
    """Keeps position k while the product of the drafter's probabilities of tokens 1 .. k is >= `threshold`.

    A token counts only if all before it stand, hence the product: with calibrated probabilities it is the chance
    that position k is accepted. transformers' `assistant_confidence_threshold` (also 0.4) compares each single
    probability instead, and still verifies the token below it. SpecDec++ (2405.19715) thresholds a product as well,
    of probabilities that a trained head predicts.
    """

    Config = ThresholdConfig
    wants = frozenset({Feature.DRAFT_PROBABILITY})
    config: ThresholdConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.block_size = self.config.block_size or decoder.trained_block_size

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return trusted_whole(draft, self._trusted(draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return trusted_length(draft, self._trusted(draft))

    def _trusted(self, draft: Draft) -> Tensor:
        return draft[Feature.DRAFT_PROBABILITY].cumprod(dim=1) >= self.config.threshold  # bool [batch, width]
