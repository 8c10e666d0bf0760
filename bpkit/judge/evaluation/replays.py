"""A policy over traced prompts: replay, modelled time, and what its decisions take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bpkit.judge.evaluation.candidate import Candidate
from bpkit.judge.statistics import Floats, Totals, trimmed_mean
from bpkit.trace.records import PromptTrace, Taken
from bpkit.trace.replay import Replayer
from bpkit.types import CostModel, DecoderSpec


@dataclass(frozen=True)
class ReplayedPrompt:
    """What a policy did with one prompt, priced under one cost model.

    Attributes:
        index: of the prompt in its trace.
        modelled: seconds by the cost model, decision time left out.
        begin_seconds, step_seconds: measured decision time of `begin` and of each step.
        fallbacks: policy faults that were mended.
        taken: the steps.
    """

    index: int
    tokens: int
    steps: int
    modelled: float
    begin_seconds: float
    step_seconds: Floats
    fallbacks: int
    taken: Taken


class PolicyReplay:
    """One policy over prompts in a row, under several cost models; its memory, if any, lives as long.

    A policy that cannot know the cost model is replayed once, and its steps are priced under each of them. Others are
    replayed for each.

    Raises:
        PolicyError, TraceError: the trace cannot serve it.
    """

    def __init__(
        self, candidate: Candidate, spec: DecoderSpec, costs: Mapping[str, CostModel], seed: int | None = None
    ) -> None:
        self.costs = costs
        names = list(costs)[:1] if candidate.knows_no_cost(spec) else list(costs)
        self._replayers = {name: Replayer(spec, candidate.make(), costs[name], seed=seed) for name in names}
        self._done: dict[str, list[ReplayedPrompt]] = {name: [] for name in costs}

    def run(self, prompt: PromptTrace) -> None:
        """One prompt more."""
        replayed = {name: replayer.run(prompt) for name, replayer in self._replayers.items()}
        first = next(iter(replayed.values()))
        for name, cost in self.costs.items():
            one = replayed.get(name, first)
            self._done[name].append(
                ReplayedPrompt(
                    one.index,
                    one.tokens,
                    one.steps,
                    one.seconds(cost),
                    one.begin_seconds,
                    one.step_seconds,
                    one.fallbacks,
                    one,
                )
            )

    def prompts(self, cost: str) -> list[ReplayedPrompt]:
        """What was done so far under a cost model, in the order of the trace."""
        return sorted(self._done[cost], key=lambda one: one.index)


@dataclass(frozen=True)
class DecisionTime:
    """Seconds that a policy's decisions are said to take, the same for each step and for each prompt's `begin`.

    Attributes:
        mean_per_step: plain mean of what was measured. Far above `per_step` either the machine was busy, or the
            policy works in rare bursts, which the trimmed mean forgives.
    """

    per_step: float = 0.0
    per_begin: float = 0.0
    mean_per_step: float = 0.0

    @classmethod
    def measured(cls, prompts: Sequence[ReplayedPrompt]) -> DecisionTime:
        """From all steps of one or several replays of one policy."""
        steps = np.concatenate([one.step_seconds for one in prompts] or [np.zeros(0)])
        begins = np.array([one.begin_seconds for one in prompts])
        return cls(trimmed_mean(steps), trimmed_mean(begins), float(steps.mean()) if len(steps) else 0.0)


NOTHING = DecisionTime()
"""Charged under cost models that are not in seconds."""


def totals(prompts: Sequence[ReplayedPrompt], charged: DecisionTime) -> Totals:
    """Of each prompt, decision time charged."""
    tokens, steps, modelled = np.array([(one.tokens, one.steps, one.modelled) for one in prompts], np.float64).T
    return Totals(tokens, steps, modelled + charged.per_begin + charged.per_step * steps)
