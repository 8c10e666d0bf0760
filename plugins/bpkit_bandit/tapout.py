"""TapOut: a bandit that learns which stop rule to draft by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from bpkit.policy import PolicyConfig, PolicyError, PolicyMemory, RememberingPolicy, State, StopRule
from bpkit.policy.stop_rules import high_entropy_bound, low_entropy, sure
from bpkit.sizes import BlockSize
from bpkit.types import Context, CostModel, DecoderSpec, Draft, Feature, Step
from bpkit_bandit.arm import Arm, configured, likeliest, row_seconds, upper_bound

if TYPE_CHECKING:
    from torch import Tensor


def small_rise(draft: Draft, most: float) -> Tensor:
    """The root of the entropy exceeds that of the position before by at most `most`: bool [batch, width]."""
    root = draft[Feature.DRAFT_ENTROPY].clamp(min=0).sqrt()  # rounding may have left it just below 0
    trusted = root.isfinite()
    trusted[:, 1:] &= root.diff(dim=1) <= most
    return trusted


def whole(draft: Draft, value: float | None) -> Tensor:
    """Every position: bool [batch, width]."""
    return draft.draft_length.new_ones(draft.tokens.shape) > 0  # on the host, where the counts are


RULES: dict[str, tuple[float | None, float, Callable[[Draft, Any], Tensor]]] = {
    "fixed": (None, math.inf, whole),
    "confidence": (0.8, 1.0, sure),
    "svip": (0.6, math.inf, low_entropy),
    "svip_difference": (0.2, math.inf, small_rise),
    "adaedl": (0.7, 1.0, partial(high_entropy_bound, gamma=0.2)),
}
"""Kinds of rules: the threshold where none is given, the largest, and which positions are trusted."""


@dataclass(frozen=True)
class Rule:
    """One stop rule; none of them learns.

    - `fixed@B`: a block of B positions, all of it; `fixed@1` is no draft.
    - `confidence@h`: up to the first token whose probability is below h.
    - `svip@h`: up to the first position whose sqrt(entropy) exceeds h (SVIP, 2411.18462).
    - `svip_difference@h`: up to the first position whose sqrt(entropy) exceeds that of the one before by more than h.
    - `adaedl@h`: up to the first position with 1 - sqrt(0.2 entropy) below h (AdaEDL, 2410.18351).
    """

    kind: str
    value: float | None

    def block_size(self, usual: int) -> int:
        """Positions to draft."""
        return int(self.value) if self.kind == "fixed" and self.value is not None else usual

    def trusted(self, draft: Draft) -> Tensor:
        """Which positions are trusted, bool [batch, width]."""
        return RULES[self.kind][2](draft, self.value)

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}@{self.value:g}"


def parse_rule(text: str) -> Rule:
    """A rule from text such as `svip@0.6`. Raises ValueError that lists the rules.

    >>> str(parse_rule("svip"))
    'svip@0.6'
    """
    kind, _, value = text.strip().partition("@")
    if kind not in RULES:
        raise ValueError(f"there is no rule {kind!r}; the rules are: {', '.join(RULES)}")
    default, most, _ = RULES[kind]
    try:
        number = float(value) if value else default
    except ValueError:
        raise ValueError(f"rule {text!r}: {value!r} is not a number") from None
    if number is not None and kind == "fixed" and (number < 1 or number != int(number)):
        raise ValueError(f"rule {text!r}: a block size is a whole number from 1")
    if number is not None and most == 1 and not 0 <= number <= 1:
        raise ValueError(f"rule {text!r}: the threshold is between 0 and 1")
    return Rule(kind, number)


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
    block_size: BlockSize = None

    @field_validator("rules", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Take the command-line form: a comma there separates options."""
        return value.replace(";", "+").split("+") if isinstance(value, str) else value

    @field_validator("rules")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(parse_rule(rule)) for rule in value))


class TapOutMemory(PolicyMemory):
    """What outlives a request: the sums of each rule's steps."""

    schema_version: Literal[1] = 1
    reward: str
    rules: dict[str, Arm]


class TapOut(RememberingPolicy[TapOutMemory], StopRule):
    """Before every draft, picks a stop rule (see `rules`) by what each has earned; the rule then says where to stop.

    The sequence-level variant of TapOut (Sridhar et al. 2025, 2511.02017), one pull a draft. A step with m accepted
    of n verified tokens, at most M, earns

        blend = mix * m / M + (1 - mix) * m / n           (0 if nothing was verified)

    and `ucb1` picks the rule with the largest mean + exploration * sqrt(2 ln t / t_rule) (Auer et al. 2002).
    `thompson` draws from a normal distribution around the mean with its standard error. With `reward=time` a rule is
    judged by its tokens per second, as in `ucb`. One pick serves all rows of a batch. What differs from the paper,
    docs/policies/bandits.md says.
    """

    Config = TapOutConfig
    Memory = TapOutMemory
    wants = frozenset({Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY})
    in_order = True
    config: TapOutConfig

    @property
    def arms(self) -> list[Arm]:
        """In the order of `rules`."""
        return list(self.memory.rules.values())

    def fresh_memory(self) -> TapOutMemory:
        return TapOutMemory(reward=self.config.reward, rules={name: Arm() for name in self.config.rules})

    def bind(self, decoder: DecoderSpec, cost: CostModel | None = None) -> None:
        super().bind(decoder, cost)
        self.rules = [parse_rule(text) for text in self.config.rules]
        self.sizes = [rule.block_size(self.block_size) for rule in self.rules]
        # A blend is earned with drafts only: an arm without one could not win, and would still be tried.
        least = 2 if self.config.reward == "blend" else 1
        fits = [place for place, size in enumerate(self.sizes) if least <= size <= decoder.max_block_size]
        self.usable = fits or list(range(len(self.rules)))
        self.longest = max(1, max(self.sizes[place] for place in self.usable) - 1)

    def begin(self, context: Context) -> State:
        return {"rule": context.full(0)}

    def select(self, state: State, context: Context) -> Tensor:
        place = self._pick(context)
        state["rule"] = context.full(place)
        return context.full(self.sizes[place])

    def _pick(self, context: Context) -> int:
        arms, least, exploration = dict(enumerate(self.arms)), self.config.min_pulls, self.config.exploration
        untried = [place for place in self.usable if not arms[place].tried(least)]
        if untried:
            return untried[0]
        if self.config.bandit == "thompson":
            return likeliest(arms, self.usable, least, context, spread=exploration)
        return upper_bound(arms, self.usable, least, exploration, scaled=self.config.reward == "time")

    def trusted(self, state: State, draft: Draft) -> Tensor:
        rule: Tensor = state["rule"]
        first, *others = set(rule.tolist())
        trusted: Tensor = self.rules[first].trusted(draft)
        for place in others:  # only where rows of different steps were put together
            trusted = self.rules[place].trusted(draft).where(rule[:, None] == place, trusted)
        return trusted

    def observe(self, state: State, step: Step) -> None:
        arms, timed, seconds = self.arms, self.config.reward == "time", row_seconds(step)
        if timed and not seconds:
            return
        rule, accepted, verified = state["rule"], step.num_accepted, step.verify_length
        drafted = step.draft_length > 0
        if not timed and drafted.any():  # rows that had no draft say nothing of a rule that cut the drafts of others
            rule, accepted, verified = rule[drafted], accepted[drafted], verified[drafted]
        alike = Counter(zip(rule.tolist(), accepted.tolist(), verified.tolist(), strict=True))
        for (place, stood, of), rows in alike.items():
            if timed:
                arms[place].add(stood + 1, seconds, rows)
            else:
                arms[place].add(self.blend(stood, of), 1.0, rows)

    def blend(self, accepted: int, verified: int) -> float:
        """The published reward, 0 .. 1."""
        share = accepted / verified if verified else 0.0
        return self.config.mix * min(accepted / self.longest, 1.0) + (1 - self.config.mix) * share

    def fitted(self, memory: TapOutMemory) -> TapOutMemory:
        """Rules that it lacks start untried."""
        if memory.reward != self.config.reward:
            raise PolicyError(f"the memory counted reward {memory.reward!r}, this is {self.config.reward!r}")
        memory.rules = configured(memory.rules, self.config.rules, Arm, "rules")
        return memory
