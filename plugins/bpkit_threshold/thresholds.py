"""Stop rules by the drafter's own word: `threshold`, `confidence`, `svip`, and `adaedl`, whose threshold adapts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from bpkit.policy import PolicyConfig, PolicyMemory, RememberingPolicy, State, StopRule, fade
from bpkit.policy.stop_rules import high_entropy_bound, low_entropy, sure
from bpkit.sizes import BlockSize
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_threshold.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


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

    SVIP (Zhang et al. 2024, 2411.18462) bounds the acceptance rate from below by a term in the root of the entropy; how
    its program differs, docs/policies/thresholds.md says. Entropy belongs to the distribution and not to the drafted
    token, so this policy may also run under the rejection rule.
    """

    Config = SvipConfig
    wants = frozenset({Feature.DRAFT_ENTROPY})
    config: SvipConfig

    def trusted(self, state: State, draft: Draft) -> Tensor:
        return low_entropy(draft, self.config.h)


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
    across_requests: bool = Field(default=False, description="begin a request where those before it ended")
    block_size: BlockSize = None


class AdaEdlMemory(PolicyMemory):
    """What outlives a request: the threshold, which moves step by step, and the running share of accepted tokens."""

    fading = frozenset({"acceptance"})
    bounds = (0.0, 1.0)

    threshold: Share
    acceptance: Share


class AdaEdl(RememberingPolicy[AdaEdlMemory], StopRule):
    """Keeps positions up to the first with 1 - sqrt(gamma * H) < lambda, H being the drafter's entropy in nats.

    AdaEDL (Agrawal, Jeon & Lee 2024, 2410.18351): the left side approximates a lower bound on the chance that the token
    is accepted. After each step with n verified and m accepted tokens, lambda follows the running acceptance r:

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
        fade(state, kept, verified)
        nudged = (threshold + self.config.nudge).where(acceptance <= self.config.target, threshold - self.config.nudge)
        kept = self.config.threshold_memory
        moved = (kept * threshold + (1 - kept) * nudged).clamp(0, 1)
        state["acceptance"], state["threshold"] = acceptance, moved.where(verified, threshold)

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            self.memory = self.memory.after(state)
