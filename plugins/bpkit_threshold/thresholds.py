"""Stop rules with a threshold that stays as it is: `threshold`, `confidence` and `svip`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, State, StopRule
from bpkit.policy.stop_rules import low_entropy, sure
from bpkit.sizes import BlockSize
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_threshold.schedule import Schedule

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
    that position k is accepted.
    """

    Config = ThresholdConfig
    wants = frozenset({Feature.DRAFT_PROBABILITY})
    config: ThresholdConfig

    def trusted(self, state: State, draft: Draft) -> Tensor:
        return draft[Feature.DRAFT_PROBABILITY].cumprod(dim=1) >= self.config.threshold


class ConfidenceConfig(PolicyConfig):
    """Options of `confidence`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "threshold": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
        "keep_last": (True, False),
        "block_size": tuple(range(2, 33)),
    }

    threshold: float = Field(
        default=0.4, ge=0, le=1, description="least probability of a drafted token for the draft to go on"
    )
    keep_last: bool = Field(
        default=True, description="verify also the token at which the draft stops, as transformers does"
    )
    schedule: Literal["constant", "heuristic_transient"] = Field(
        default="constant", description="heuristic_transient: two tokens more after a whole draft, else one less"
    )
    block_size: int | None = Field(
        default=None,
        ge=1,
        description="positions to draft (first, with a schedule), anchor included; by default the trained block size",
    )


class Confidence(StopRule):
    """Drafts up to and including the first token k whose probability q(x_k) is below `threshold`.

    This is `assistant_confidence_threshold` of transformers (0.4), "dynamic speculation lookahead" (Mamou et al. 2024,
    2405.04304, train a classifier for the same decision): each token is judged alone. What differs from transformers,
    docs/policies/thresholds.md says. With `schedule`, the policy of that name chooses how much to draft.
    """

    Config = ConfidenceConfig
    wants = frozenset({Feature.DRAFT_PROBABILITY})
    config: ConfidenceConfig

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        self.schedule: Schedule | None = None
        if self.config.schedule != "constant":
            self.schedule = Schedule(start=max(self.block_size - 1, 1))
            self.schedule.bind(decoder)

    def begin(self, context: Context) -> State:
        return self.schedule.begin(context) if self.schedule else {}

    def select(self, state: State, context: Context) -> Tensor:
        return self.schedule.select(state, context) if self.schedule else super().select(state, context)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        length = super().truncate(state, draft)
        return (length + 1).minimum(draft.draft_length) if self.config.keep_last else length

    def observe(self, state: State, step: Step) -> None:
        if self.schedule:
            self.schedule.observe(state, step)

    def trusted(self, state: State, draft: Draft) -> Tensor:
        return sure(draft, self.config.threshold)


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

    The paper bounds the acceptance rate from below by a term in the root of the entropy; how its program differs,
    docs/policies/thresholds.md says. Entropy belongs to the distribution and not to the drafted token, so this policy
    may also run under the rejection rule.
    """

    Config = SvipConfig
    wants = frozenset({Feature.DRAFT_ENTROPY})
    config: SvipConfig

    def trusted(self, state: State, draft: Draft) -> Tensor:
        return low_entropy(draft, self.config.h)
