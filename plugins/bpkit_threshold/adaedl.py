"""AdaEDL (Agrawal, Jeon & Lee 2024, 2410.18351): an entropy bound on acceptance, against a threshold that adapts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_threshold.stopping import trusted_length, trusted_whole

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
    block_size: int | None = Field(
        default=None, ge=1, description="positions to draft, anchor included; by default the trained block size"
    )


class Memory(BaseModel):
    """What outlives a request: the threshold and the running share of accepted tokens."""

    model_config = ConfigDict(extra="forbid")

    threshold: Share
    acceptance: Share


class AdaEdl(Policy):
    """Keeps positions up to the first with 1 - sqrt(gamma * H) < lambda, H being the drafter's entropy in nats.

    The left side approximates a lower bound on the chance that the token is accepted. After each step with n verified
    and m accepted tokens, lambda follows the running acceptance r:

        r      <- beta_1 r + (1 - beta_1) m / n
        lambda <- beta_2 lambda + (1 - beta_2) (lambda + epsilon   if r <= alpha,
                                                lambda - epsilon   otherwise)

    so that too few accepted tokens make the drafter stop sooner. The update is that of Draft & Verify (2309.08168),
    with its constants; r begins at 0, as in its program (`decoding.py` of dilab-zju/self-speculative-decoding). The
    first lambda is open (here 0.7; 0.8 for greedy and 0.5 for sampled texts there).

    Differences from that program: a step that verified nothing has no m / n, and changes nothing; lambda stays within
    [0, 1], and falls also after a draft of the full length; the token at which the rule stops is not verified. With a
    block-diffusion drafter the rule trims what is verified. In one step lambda moves by at most (1 - beta_2) epsilon =
    0.001, which says little within one short request: with `across_requests` it lives on.
    """

    Config = AdaEdlConfig
    wants = frozenset({Feature.DRAFT_ENTROPY})
    config: AdaEdlConfig

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.memory = Memory(threshold=self.config.threshold, acceptance=0.0)

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.block_size = self.config.block_size or decoder.trained_block_size

    def begin(self, context: Context) -> State:
        import torch  # here, so that options can be listed without it

        def rows(value: float) -> Tensor:
            return context.position.new_full((context.batch_size,), value, dtype=torch.float64)

        return {"threshold": rows(self.memory.threshold), "acceptance": rows(self.memory.acceptance)}

    def select(self, state: State, context: Context) -> Tensor:
        return context.full(self.block_size)

    def extend(self, state: State, draft: Draft) -> Tensor:
        return trusted_whole(draft, self._trusted(state, draft))

    def truncate(self, state: State, draft: Draft) -> Tensor:
        return trusted_length(draft, self._trusted(state, draft))

    def observe(self, state: State, step: Step) -> None:
        thresholds, acceptances = state["threshold"].tolist(), state["acceptance"].tolist()
        outcomes = zip(step.num_accepted.tolist(), step.verify_length.tolist(), strict=True)
        for row, (accepted, verified) in enumerate(outcomes):
            if verified:
                acceptances[row] = self._acceptance(acceptances[row], accepted / verified)
                thresholds[row] = self._threshold(thresholds[row], acceptances[row])
        state["threshold"] = state["threshold"].new_tensor(thresholds)
        state["acceptance"] = state["acceptance"].new_tensor(acceptances)

    def end(self, state: State) -> None:
        if self.config.across_requests and state:
            means = {name: float(rows.mean()) for name, rows in state.items()}
            self.memory = Memory(**means)

    def state_dict(self) -> dict[str, Any]:
        return self.memory.model_dump()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a memory. Raises PolicyError if it is none."""
        try:
            self.memory = Memory.model_validate(state)
        except ValidationError as error:
            raise PolicyError(f"this is no memory of adaedl: {error}") from None

    def _trusted(self, state: State, draft: Draft) -> Tensor:
        # The bound, solved for the entropy: an entropy of 0 may be rounded to -1e-8, and its root would be NaN.
        most = (1 - state["threshold"]).square() / self.config.gamma  # float64 [batch]
        trusted: Tensor = draft[Feature.DRAFT_ENTROPY] <= most[:, None]
        return trusted  # bool [batch, width]

    def _acceptance(self, past: float, now: float) -> float:
        return self.config.rate_memory * past + (1 - self.config.rate_memory) * now

    def _threshold(self, past: float, acceptance: float) -> float:
        nudged = past + self.config.nudge if acceptance <= self.config.target else past - self.config.nudge
        moved = self.config.threshold_memory * past + (1 - self.config.threshold_memory) * nudged
        return min(max(moved, 0.0), 1.0)
