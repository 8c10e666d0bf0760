"""Policies over traced prompts: replay, modelled time, and what their decisions take."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bpkit.judge.evaluation.recipe import Recipe
from bpkit.policy import overrides
from bpkit.trace.oracle.regret import Taken
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayed, Replayer
from bpkit.types import CostModel, DecoderSpec

Array = NDArray[np.float64]

TRIMMED = 0.1
"""Share of the slowest and of the quickest decisions that do not count: a hiccup of the machine decides nothing."""


def trimmed_mean(values: Array, share: float = TRIMMED) -> float:
    """Mean without the lowest and the highest `share` of the values, rounded down; 0 of nothing.

    >>> trimmed_mean(np.array([1.0, 2.0, 3.0, 100.0]), share=0.25)
    2.5
    """
    if len(values) == 0:
        return 0.0
    cut = int(share * len(values))
    return float(np.sort(values)[cut : len(values) - cut].mean())


@dataclass(frozen=True)
class Runs:
    """Sums over the steps of each prompt: float64 [prompts]."""

    tokens: Array
    steps: Array
    seconds: Array

    def of(self, prompts: NDArray[np.int64]) -> Runs:
        """Some of the prompts, by index."""
        return Runs(self.tokens[prompts], self.steps[prompts], self.seconds[prompts])

    @property
    def rate(self) -> float:
        """Tokens per second: a ratio of sums."""
        return float(self.tokens.sum() / self.seconds.sum())

    @property
    def acceptance_length(self) -> float:
        """Tokens of steps over steps."""
        return float(self.tokens.sum() / self.steps.sum())

    @property
    def acceptance_length_per_prompt(self) -> float:
        """Mean over prompts of the same."""
        return float((self.tokens / self.steps).mean())


@dataclass
class Tally:
    """What a policy did under one cost model, prompt by prompt in the order in which they came.

    Attributes:
        modelled: seconds of each prompt by the cost model.
        begins: measured seconds of `begin`, one for each prompt. decisions: of each step, an array for each prompt.
    """

    prompts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    modelled: list[float] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)
    decisions: list[Array] = field(default_factory=list)
    fallbacks: list[int] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)

    def add(self, replayed: Replayed, modelled: float) -> None:
        self.prompts.append(replayed.index)
        self.tokens.append(replayed.tokens)
        self.steps.append(replayed.steps)
        self.modelled.append(modelled)
        self.begins.append(replayed.begin_seconds)
        self.decisions.append(replayed.step_seconds)
        self.fallbacks.append(replayed.fallbacks)
        self.taken.append(Taken.by_policy(replayed))

    def runs(self, decision: Decision) -> Runs:
        """Prompts in the order of their trace, decision time charged."""
        order = self._order
        steps = np.array(self.steps, np.float64)[order]
        seconds = np.array(self.modelled)[order] + decision.per_begin + decision.per_step * steps
        return Runs(np.array(self.tokens, np.float64)[order], steps, seconds)

    def fallbacks_by_prompt(self) -> NDArray[np.int64]:
        """Policy faults that were mended, prompts in the order of their trace: int64 [prompts]."""
        return np.array(self.fallbacks, np.int64)[self._order]

    def taken_by_prompt(self) -> list[Taken]:
        """The steps, prompts in the order of their trace."""
        return [self.taken[i] for i in self._order]

    @property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self.prompts)


@dataclass(frozen=True)
class Decision:
    """Seconds that a policy's decisions are said to take, the same for each step and for each prompt's `begin`.

    Attributes:
        mean_per_step: plain mean of what was measured. Far above `per_step` either the machine was busy, or the
            policy works in rare bursts, which the trimmed mean forgives.
    """

    per_step: float
    per_begin: float
    mean_per_step: float

    @classmethod
    def measured(cls, tallies: list[Tally]) -> Decision:
        """From all steps of several runs of one policy."""
        steps = np.concatenate([d for tally in tallies for d in tally.decisions] or [np.zeros(0)])
        begins = np.array([b for tally in tallies for b in tally.begins])
        return cls(trimmed_mean(steps), trimmed_mean(begins), float(steps.mean()) if len(steps) else 0.0)


NOTHING = Decision(0.0, 0.0, 0.0)
"""Charged under cost models that are not in seconds."""


@dataclass(frozen=True)
class Stage:
    """What every replay of a trace shares.

    Attributes:
        spec: of the decoder that the trace stands for.
        seed: of the trace, for the policies' own random numbers.
    """

    spec: DecoderSpec
    seed: int | None = None


class Player:
    """One policy over prompts in a row, under several cost models; its memory, if any, lives as long.

    A policy that cannot know the cost model is replayed once, and its steps are priced under each of them. Others are
    replayed for each.

    Raises:
        PolicyError, TraceError: the trace cannot serve it.
    """

    def __init__(self, stage: Stage, recipe: Recipe, costs: Mapping[str, CostModel]) -> None:
        self.costs = costs
        names = list(costs)[:1] if knows_no_cost(recipe, stage.spec) else list(costs)
        self._replayers = {name: Replayer(stage.spec, recipe.make(), costs[name], seed=stage.seed) for name in names}
        self.tallies = {name: Tally() for name in costs}

    def run(self, prompt: PromptTrace) -> None:
        """One prompt more."""
        replayed = {name: replayer.run(prompt) for name, replayer in self._replayers.items()}
        first = next(iter(replayed.values()))
        for name, cost in self.costs.items():
            mine = replayed.get(name, first)
            self.tallies[name].add(mine, mine.seconds(cost))


class _Decoy:
    """A cost model that notices when it is touched."""

    def __init__(self) -> None:
        object.__setattr__(self, "touched", False)

    def __getattribute__(self, name: str) -> object:
        if name not in ("touched", "__class__"):
            object.__setattr__(self, "touched", True)
        return object.__getattribute__(self, name)

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return 1.0


def knows_no_cost(recipe: Recipe, spec: DecoderSpec) -> bool:
    """Whether a policy's choices cannot depend on the cost model.

    Time reaches a policy in two ways: the steps that `observe` is given, and the cost model in `bind`. One that defines
    neither knows nothing of it; nor does one whose `bind` leaves the cost model alone and does not keep it.
    """
    policy = recipe.make()
    if overrides(policy, "observe"):
        return False
    if not overrides(policy, "bind"):
        return True
    decoy = _Decoy()
    policy.bind(spec, decoy)
    touched, alive = decoy.touched, weakref.ref(decoy)
    del decoy
    if alive() is not None:
        gc.collect()
    return not touched and alive() is None
