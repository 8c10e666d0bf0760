"""TapOut: a bandit that learns which stop rule to draft by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bpkit_threshold.stopping import trusted_length, trusted_whole
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bpkit.policy import Policy, PolicyConfig, PolicyError, State
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_bandit.arm import Arm, pooled_rate
from bpkit_bandit.rules import Rule, parse_rule

if TYPE_CHECKING:
    from torch import Tensor


class TapOutConfig(PolicyConfig):
    """Options of `tapout`."""

    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bandit": ("ucb1", "thompson"),
        "reward": ("blend", "time"),
        "exploration": (0.1, 0.3, 1.0),
        "block_size": (4, 6, 8, 12, 16),
    }

    bandit: Literal["ucb1", "thompson"] = Field(default="ucb1", description="how to pick a rule")
    reward: Literal["blend", "time"] = Field(
        default="blend", description="blend: accepted tokens and their share, as published; time: tokens per second"
    )
    mix: float = Field(default=0.5, ge=0, le=1, description="weight of accepted tokens in the blend")
    rules: tuple[str, ...] = Field(
        default=("fixed@1", "fixed", "confidence", "svip", "svip_difference", "adaedl"),
        min_length=1,
        description="arms: a list, or text such as fixed@1+fixed@8+svip@0.6+adaedl",
    )
    exploration: float = Field(
        default=1.0, ge=0, description="factor of UCB1's bonus, or of Thompson sampling's spread; 0: greedy"
    )
    min_pulls: int = Field(default=1, ge=1, description="steps with each rule before any comparison")
    block_size: int | None = Field(
        default=None, ge=1, description="positions to draft, anchor included; by default the trained block size"
    )

    @field_validator("rules", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Take the command-line form: a comma there separates options."""
        return value.replace(";", "+").split("+") if isinstance(value, str) else value

    @field_validator("rules")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(parse_rule(rule)) for rule in value))


class Memory(BaseModel):
    """What outlives a request: the sums of each rule's steps."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    reward: str
    rules: dict[str, Arm]


class TapOut(Policy):
    """Before every draft, picks a stop rule (see `rules`) by what each has earned; the rule then says where to stop.

    The sequence-level variant of TapOut (Sridhar et al. 2025, 2511.02017), one pull a draft. A step with m accepted
    of n verified tokens, at most M, earns

        blend = mix * m / M + (1 - mix) * m / n           (0 if nothing was verified)

    and `ucb1` picks the rule with the largest mean + exploration * sqrt(2 ln t / t_rule) (Auer et al. 2002).
    `thompson` draws from a normal distribution around the mean with its standard error.

    With `reward=time`, the rate of a rule is its tokens over its seconds, and its spread, as in `ucb`, scales
    the bonus, because tokens per second are not in [0, 1]. Only then is `fixed@1` an arm, which drafts nothing and
    would earn no blend.

    Differences from the paper: the logit margin is not among the rules, because drafters do not offer the second-best
    token; `adaedl` has a constant threshold here, so that an arm's worth does not drift with it; fixed blocks and no
    draft are arms too; thresholds are those the rules are commonly run with, and the token at which a rule stops is not
    verified. With a block-diffusion drafter, which drafts its whole block first, rules trim what is verified. There was
    no program of the authors to compare details with.

    One pick serves all rows of a batch: they share what is known, and the time of a step.
    """

    Config = TapOutConfig
    wants = frozenset({Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY})
    config: TapOutConfig

    def __init__(self, config: PolicyConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.rules: list[Rule] = [parse_rule(text) for text in self.config.rules]
        self.arms = [Arm() for _ in self.rules]
        self.usable = list(range(len(self.rules)))

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        self.block_size = self.config.block_size or decoder.trained_block_size
        sizes = [rule.block_size(self.block_size) for rule in self.rules]
        # A blend is earned with drafts only: an arm without one could not win, and would still be tried.
        least = 2 if self.config.reward == "blend" else 1
        fits = [place for place, size in enumerate(sizes) if least <= size <= decoder.max_block_size]
        self.usable = fits or list(range(len(self.rules)))
        self.longest = max(1, max(sizes[place] for place in self.usable) - 1)

    def select(self, state: State, context: Context) -> Tensor:
        place = self._pick(context)
        state["rule"] = context.full(place)
        return context.full(self.rules[place].block_size(self.block_size))

    def _pick(self, context: Context) -> int:
        for place in self.usable:
            if not self.arms[place].tried(self.config.min_pulls):
                return place
        typical = pooled_rate(self.arms)
        if self.config.bandit == "thompson":
            import torch  # here, so that options can be listed without it

            of = context.generator
            noise = torch.randn(len(self.usable), generator=of, device=of.device, dtype=torch.float64).tolist()
            scores = [self._drawn(self.arms[a], typical, z) for a, z in zip(self.usable, noise, strict=True)]
        else:
            log_steps = math.log(max(1.0, sum(self.arms[place].count for place in self.usable)))
            scores = [self._bound(self.arms[place], typical, log_steps) for place in self.usable]
        return self.usable[scores.index(max(scores))]

    def _bound(self, arm: Arm, typical: float, log_steps: float) -> float:
        scale = 1.0 if self.config.reward == "blend" else arm.spread(typical)
        return arm.rate + self.config.exploration * scale * math.sqrt(2 * log_steps / arm.count)

    def _drawn(self, arm: Arm, typical: float, z: float) -> float:
        return arm.rate + self.config.exploration * z * arm.spread(typical) / math.sqrt(arm.count)

    def extend(self, state: State, draft: Draft) -> Tensor:
        rule = self._rule(state)
        trusted = None if rule is None else rule.trusted(draft)
        return draft.draft_length > 0 if trusted is None else trusted_whole(draft, trusted)

    def truncate(self, state: State, draft: Draft) -> Tensor:
        rule = self._rule(state)
        trusted = None if rule is None else rule.trusted(draft)
        return draft.draft_length if trusted is None else trusted_length(draft, trusted)

    def _rule(self, state: State) -> Rule | None:
        """The rule of all rows; None where rows of different steps were put together, and nothing is cut."""
        places = set(state["rule"].tolist())
        return self.rules[places.pop()] if len(places) == 1 else None

    def observe(self, state: State, step: Step) -> None:
        seconds = step.seconds.total / len(step.block_size)  # of a row: all rows went through one pass
        if self.config.reward == "time" and not 0 < seconds < math.inf:
            return  # a clock that stands still teaches nothing
        rows = zip(state["rule"].tolist(), step.num_accepted.tolist(), step.verify_length.tolist(), strict=True)
        for place, accepted, verified in rows:
            if self.config.reward == "time":
                self.arms[place].add(accepted + 1, seconds)
            else:
                self.arms[place].add(self.blend(accepted, verified), 1.0)

    def blend(self, accepted: int, verified: int) -> float:
        """The published reward, 0 .. 1."""
        share = accepted / verified if verified else 0.0
        return self.config.mix * min(accepted / self.longest, 1.0) + (1 - self.config.mix) * share

    def state_dict(self) -> dict[str, Any]:
        arms = dict(zip(self.config.rules, self.arms, strict=True))
        return Memory(reward=self.config.reward, rules=arms).model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a memory. Rules that it lacks start untried. Raises PolicyError if it does not fit."""
        try:
            loaded = Memory.model_validate(state)
        except ValidationError as error:
            raise PolicyError(f"this is no memory of tapout: {error}") from None
        if loaded.reward != self.config.reward:
            raise PolicyError(f"the memory counted reward {loaded.reward!r}, this is {self.config.reward!r}")
        if unknown := sorted(loaded.rules.keys() - set(self.config.rules)):
            raise PolicyError(f"the memory knows rules {unknown}, which option 'rules' does not list")
        self.arms = [loaded.rules.get(name, Arm()) for name in self.config.rules]
