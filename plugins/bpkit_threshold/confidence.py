"""Dynamic speculation as in transformers' assisted generation: stop at the first token the drafter is unsure of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, State, StopRule
from bpkit.policy.stop_rules import sure
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_threshold.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor


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
    2405.04304, train a classifier for the same decision): each token is judged alone, and the token that stops the
    draft is verified. `threshold` judges the draft as a whole instead. What differs from transformers,
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
