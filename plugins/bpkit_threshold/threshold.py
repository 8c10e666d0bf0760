"""Stop where the draft as a whole has become unlikely, by the drafter's own word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bpkit.types import Draft, Feature
from bpkit_threshold.stopping import StoppingConfig, StopRule

if TYPE_CHECKING:
    from torch import Tensor


class ThresholdConfig(StoppingConfig):
    """Options of `threshold`."""

    threshold: float = Field(
        default=0.4, ge=0, le=1, description="least probability that the draft so far is accepted whole; 0 keeps all"
    )
    block_size: int | None = StoppingConfig.model_fields["block_size"]


class Threshold(StopRule):
    """Keeps position k while the product of the drafter's probabilities of tokens 1 .. k is >= `threshold`.

    A token counts only if all before it stand, hence the product: with calibrated probabilities it is the chance
    that position k is accepted. transformers' `assistant_confidence_threshold` (default 0.4) compares each single
    probability instead, and still verifies the token below it. SpecDec++ (2405.19715) thresholds a product as well,
    of probabilities that a trained head predicts.
    """

    Config = ThresholdConfig
    wants = frozenset({Feature.DRAFT_PROBABILITY})
    config: ThresholdConfig

    def trusts(self, draft: Draft) -> Tensor:
        return draft[Feature.DRAFT_PROBABILITY].cumprod(dim=1) >= self.config.threshold
