"""What is known of one arm: sums over its steps, the rate that follows from them, and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field

from bpkit.policy import PolicyError
from bpkit.types import Context, Step

Sum = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = TypeVar("Name", int, str)
Known = TypeVar("Known")
FORGOTTEN = 1e-6
"""A discounted count below this is no knowledge any more."""


@dataclass(slots=True)
class Arm:
    """Sums over the steps of one arm; T is a step's tokens (its acceptance length), S its seconds.

    The rate is a ratio of sums, sum T / sum S. The mean of T/S would be the mean speed of steps and not the speed of
    the text: it rewards sizes for steps that are short, and can rank them wrongly.

    Attributes:
        pulls: steps ever counted. `count` is the same after forgetting.
    """

    pulls: Annotated[int, Field(ge=0)] = 0
    count: Sum = 0.0
    tokens: Sum = 0.0
    tokens_squared: Sum = 0.0
    seconds: Sum = 0.0
    seconds_squared: Sum = 0.0
    tokens_seconds: Sum = 0.0

    def add(self, tokens: float, seconds: float, rows: int = 1) -> None:
        """Count a step of a row, or of several rows that were alike."""
        self.pulls += rows
        self.count += rows
        self.tokens += rows * tokens
        self.tokens_squared += rows * tokens * tokens
        self.seconds += rows * seconds
        self.seconds_squared += rows * seconds * seconds
        self.tokens_seconds += rows * tokens * seconds

    def forget(self, discount: float) -> None:
        """Make all that was counted weigh `discount` times as much."""
        self.count *= discount
        self.tokens *= discount
        self.tokens_squared *= discount
        self.seconds *= discount
        self.seconds_squared *= discount
        self.tokens_seconds *= discount

    def tried(self, min_pulls: int) -> bool:
        """Whether there is enough to estimate a rate from."""
        return self.pulls >= min_pulls and self.count > FORGOTTEN and self.seconds > 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def spread(self, typical_rate: float) -> float:
        """Standard deviation of one step around the rate, in tokens per second; over sqrt(count), that of the rate.

        Delta method: to first order, sum T / sum S - R is the mean of the deviations e = (T - R S) / mean S, so
        its variance is that of e over n. The sum of e squared needs only the six sums:

            (sum T^2 - 2 R sum TS + R^2 sum S^2) / mean(S)^2

        One more step with a deviation of `typical_rate` is counted in. Tokens are small whole numbers: two steps
        with the same outcome would otherwise pass for certainty, and the arm might never be pulled again.
        """
        rate, mean_seconds = self.rate, self.seconds / self.count
        deviations = self.tokens_squared - 2 * rate * self.tokens_seconds + rate**2 * self.seconds_squared
        deviations = max(deviations, 0.0) / mean_seconds**2  # rounding may leave it just below 0
        return math.sqrt((deviations + typical_rate**2) / (self.count + 1))


def pooled_rate(arms: Collection[Arm]) -> float:
    """Tokens per second over all arms together; 0 if nothing was counted."""
    seconds = sum(arm.seconds for arm in arms)
    return sum(arm.tokens for arm in arms) / seconds if seconds > 0 else 0.0


def upper_bound(
    arms: Mapping[Name, Arm], usable: Sequence[Name], min_pulls: int, exploration: float, *, scaled: bool = True
) -> Name:
    """The arm with the highest rate + `exploration` * scale * sqrt(2 ln n / n_arm), as in UCB1 (Auer et al. 2002).

    n is the count of all usable arms; the scale is the arm's own spread, or 1. Untried arms come first, in order.
    """
    typical_rate = pooled_rate(arms.values())
    log_n = math.log(max(1.0, sum(arms[name].count for name in usable)))

    def bound(name: Name) -> float:
        arm = arms[name]
        if not arm.tried(min_pulls):
            return math.inf
        scale = arm.spread(typical_rate) if scaled else 1.0
        return arm.rate + exploration * scale * math.sqrt(2 * log_n / arm.count)

    return max(usable, key=bound)


def likeliest(
    arms: Mapping[Name, Arm], usable: Sequence[Name], min_pulls: int, context: Context, spread: float = 1.0
) -> Name:
    """Thompson sampling: the arm with the highest of normal draws, around its rate with `spread` standard errors.

    Untried arms come first, at random. The noise is of the context's generator.
    """
    draws = drawn(arms, usable, min_pulls, context, spread)
    return max(draws, key=draws.__getitem__)


def drawn(
    arms: Mapping[Name, Arm], usable: Sequence[Name], min_pulls: int, context: Context, spread: float = 1.0
) -> dict[Name, tuple[bool, float]]:
    """What `likeliest` compares, of every usable arm: whether it is untried, and its draw."""
    import torch  # here, so that options can be listed without it

    typical_rate, of = pooled_rate(arms.values()), context.generator
    noise = torch.randn(len(usable), generator=of, device=of.device, dtype=torch.float64).tolist()

    def draw(arm: Arm, z: float) -> tuple[bool, float]:
        if not arm.tried(min_pulls):
            return True, z
        return False, arm.rate + spread * z * arm.spread(typical_rate) / math.sqrt(arm.count)

    return {name: draw(arms[name], z) for name, z in zip(usable, noise, strict=True)}


def row_seconds(step: Step) -> float:
    """What one row pays for a step; 0 where the clock stands still or is broken, which teaches nothing.

    The rows of a batch went through one forward pass, and each pays an equal part of it. That is right for rows that
    were given one arm.
    """
    seconds = step.seconds.total / len(step.block_size)
    return seconds if 0 < seconds < math.inf else 0.0


def configured(
    known: Mapping[Name, Known], names: Sequence[Name], new: Callable[[], Known], what: str
) -> dict[Name, Known]:
    """What a memory knows of each arm, with a new one for each that it lacks. PolicyError if it knows of others."""
    if unknown := sorted(known.keys() - set(names)):
        option = what.replace(" ", "_")
        raise PolicyError(f"the memory knows {what} {unknown}, which option {option!r} does not list")
    return {name: known[name] if name in known else new() for name in names}
