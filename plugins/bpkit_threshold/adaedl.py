"""AdaEDL (Agrawal, Jeon & Lee 2024, 2410.18351): an entropy bound on acceptance, against a threshold that adapts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State, StopRule
from bpkit.policy.stop_rules import high_entropy_bound
from bpkit.sizes import BlockSize
from bpkit.types import Context, Draft, Feature, Step

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class AdaEdlConfig(PolicyConfig):
    """Options of `adaedl`; the names of the paper are in brackets."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "threshold": (0.05, 0.2, 0.35, 0.5, 0.7, 0.85),
        "across_requests": (False, True),
        "block_size": tuple(range(2, 33)),
    }

    threshold: Share = Field(default=0.7, description="acceptance bound below which to stop, at first (lambda)")
    gamma: float = Field(default=0.2, gt=0, description="factor of the entropy, in nats (gamma)")
    target: Share = Field(default=0.9, description="share of verified tokens that should be accepted (alpha)")
    rate_memory: Share = Field(default=0.5, description="weight of the past in the share of accepted tokens (beta_1)")
    threshold_memory: Share = Field(default=0.9, description="weight of the past in the threshold (beta_2)")
    nudge: float = Field(default=0.01, ge=0, description="move of the threshold, before smoothing (epsilon)")
    across_requests: bool = Field(default=False, description="begin a request where the last one ended")
    block_size: BlockSize = None


class AdaEdlMemory(PolicyMemory):
    """What outlives a request: the threshold and the running share of accepted tokens."""

    threshold: Share
    acceptance: Share


class AdaEdl(RememberingPolicy[AdaEdlMemory], StopRule):
    """Keeps positions up to the first with 1 - sqrt(gamma * H) < lambda, H being the drafter's entropy in nats.

    The left side approximates a lower bound on the chance that the token is accepted. After each step with n verified
    and m accepted tokens, lambda follows the running acceptance r:

        r      <- beta_1 r + (1 - beta_1) m / n
        lambda <- beta_2 lambda + (1 - beta_2) (lambda + epsilon   if r <= alpha,
                                                lambda - epsilon   otherwise)

    Lambda stays within [0, 1]; a step that verified nothing has no m / n, and changes nothing. The update is that of
    Draft & Verify (2309.08168), with its constants and r = 0 to begin with; docs/policies/thresholds.md says how its
    program differs.
    """

    Config = AdaEdlConfig
    Memory = AdaEdlMemory
    wants = frozenset({Feature.DRAFT_ENTROPY})
    config: AdaEdlConfig

    def fresh_memory(self) -> AdaEdlMemory:
        return AdaEdlMemory(threshold=self.config.threshold, acceptance=0.0)

    def begin(self, context: Context) -> State:
        return self.memory.rows(context)

    def trusted(self, state: State, draft: Draft) -> Tensor:
        return high_entropy_bound(draft, state["threshold"][:, None], self.config.gamma)

    def observe(self, state: State, step: Step) -> None:
        past, threshold, verified = state["acceptance"], state["threshold"], step.verify_length > 0
        now = step.num_accepted.double() / step.verify_length  # NaN, and not used, where nothing was verified
        kept = self.config.rate_memory
        acceptance = (kept * past + (1 - kept) * now).where(verified, past)
        nudged = (threshold + self.config.nudge).where(acceptance <= self.config.target, threshold - self.config.nudge)
        kept = self.config.threshold_memory
        moved = (kept * threshold + (1 - kept) * nudged).clamp(0, 1)
        state["acceptance"], state["threshold"] = acceptance, moved.where(verified, threshold)

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            self.memory = AdaEdlMemory.mean_of(state)
