"""Stop where the draft as a whole has become unlikely, by the drafter's own word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from bpkit.policy import PolicyConfig, State, StopRule
from bpkit.policy.stop_rules import sure_together
from bpkit.sizes import BlockSize
from bpkit.types import Draft, Feature

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
    block_size: BlockSize = None


class Threshold(StopRule):
    """Keeps position k while the product of the drafter's probabilities of tokens 1 .. k is >= `threshold`.

    A token counts only if all before it stand, hence the product: with calibrated probabilities it is the chance
    that position k is accepted. transformers' `assistant_confidence_threshold` (also 0.4) compares each single
    probability instead, and still verifies the token below it. SpecDec++ (2405.19715) thresholds a product as well,
    of probabilities that a trained head predicts.
    """

    Config = ThresholdConfig
    wants = frozenset({Feature.DRAFT_PROBABILITY})
    config: ThresholdConfig

    def trusted(self, state: State, draft: Draft) -> Tensor:
        return sure_together(draft, self.config.threshold)
