"""A policy over traced prompts: replay, modelled time, and what its decisions take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bpkit.judge.evaluation.candidate import Candidate
from bpkit.judge.statistics import Totals, trimmed_mean
from bpkit.trace.cost import CostTable
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayed, Replayer
from bpkit.types import DecoderSpec

Priced = tuple[Replayed, float]
"""What a policy did with one prompt, and its seconds by a cost model, decision time left out."""


class PolicyReplay:
    """One policy over prompts in a row, under several cost models; its memory, if any, lives as long.

    A policy that cannot know the cost model is replayed once, and its steps are priced under each of them. Others are
    replayed for each.

    Raises:
        PolicyError, TraceError: the trace cannot serve it.
    """

    def __init__(
        self, candidate: Candidate, spec: DecoderSpec, costs: Mapping[str, CostTable], seed: int | None = None
    ) -> None:
        self.costs = costs
        names = list(costs)[:1] if candidate.knows_no_cost(spec) else list(costs)
        self._replayers = {name: Replayer(spec, candidate.make(), costs[name], seed=seed) for name in names}
        self._done: dict[str, list[Priced]] = {name: [] for name in costs}

    def run(self, prompt: PromptTrace) -> None:
        """One prompt more."""
        replayed = {name: replayer.run(prompt) for name, replayer in self._replayers.items()}
        first = next(iter(replayed.values()))
        for name, cost in self.costs.items():
            one = replayed.get(name, first)
            self._done[name].append((replace(one, work=()), one.seconds(cost)))  # once priced, its work is let go

    def prompts(self, cost: str) -> list[Priced]:
        """What was done so far under a cost model, in the order of the trace."""
        return sorted(self._done[cost], key=lambda done: done[0].index)


@dataclass(frozen=True)
class DecisionTime:
    """Seconds that a policy's decisions are said to take, the same for each step and for each prompt's `begin`.

    Attributes:
        mean_per_step: plain mean of what was measured. Far above `per_step` either the machine was busy, or the
            policy works in rare bursts, which the trimmed mean forgives.
        charged: whether it is added to the modelled time, which must be in seconds then.
    """

    per_step: float
    per_begin: float
    mean_per_step: float
    charged: bool

    @classmethod
    def measured(cls, prompts: Sequence[Priced], cost: CostTable) -> DecisionTime:
        """From all steps of one or several replays of one policy."""
        steps = np.concatenate([one.step_seconds for one, _ in prompts] or [np.zeros(0)])
        begins = np.array([one.begin_seconds for one, _ in prompts])
        mean = float(steps.mean()) if len(steps) else 0.0
        return cls(trimmed_mean(steps), trimmed_mean(begins), mean, cost.unit == "seconds")

    def totals(self, prompts: Sequence[Priced]) -> Totals:
        """Of each prompt, with decision time where it is charged."""
        rows = [(one.tokens, one.steps, seconds) for one, seconds in prompts]
        tokens, steps, modelled = np.array(rows, np.float64).T
        return Totals(tokens, steps, modelled + (self.per_begin + self.per_step * steps if self.charged else 0.0))
