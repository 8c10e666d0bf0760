"""A policy as it is judged: its spec as typed and options chosen for it, made afresh for each run; its replays."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bpkit.judge.statistics import Totals, trimmed_mean
from bpkit.policy import Policy, PolicyError, overrides, validated
from bpkit.registry.resolve import PolicyLike, resolve_policy
from bpkit.trace.cost import NamedCost
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayed, Replayer
from bpkit.types import DecoderSpec

BLOCK_SIZE, BLOCK_SIZES, MEMORY, ACROSS_REQUESTS = "block_size", "block_sizes", "memory", "across_requests"
"""Options with a meaning of their own: a block size, several, a file to learn from and to save to, and whether what was
learned outlives a request.
"""


@dataclass(frozen=True)
class Candidate:
    """A policy that can be made as often as needed; no two share a memory.

    Attributes:
        spec: as `bpkit.resolve_policy` takes it. Options that it names stay as they are.
        options: chosen on top of it.
    """

    spec: PolicyLike
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Policy:
        """A fresh policy. Raises PolicyError."""
        policy = resolve_policy(self.spec)
        if policy is self.spec:
            raise PolicyError(
                f"{policy!r} is a policy that was made already, and may have learned: give its name and options, "
                "such as 'bandit:discount=0.99', so that each run begins afresh"
            )
        if not self.options:
            return policy
        made, given = type(policy), policy.config.model_dump(exclude_unset=True)
        return made(validated(made.Config, {**given, **self.options}, owner=made.__name__))

    def with_options(self, options: dict[str, Any]) -> Candidate:
        """The same policy with these options too."""
        return Candidate(self.spec, {**self.options, **options})

    def fitted(self, traced: Sequence[int]) -> Candidate:
        """The same policy, its list of block sizes limited to those that the trace holds and 1.

        A list that was given with the spec stays: asking for a size that is not there is an error to be told.

        Raises:
            PolicyError: it would learn from, or write to, a file: results would depend on what else was run.
        """
        config = self.make().config
        if getattr(config, MEMORY, None):
            raise PolicyError(
                f"policy {self.spec!r}: an evaluation begins without memory, so that it can be repeated; leave out "
                f"option {MEMORY!r}"
            )
        sizes = getattr(config, BLOCK_SIZES, None)
        if sizes is None or BLOCK_SIZES in config.model_fields_set:
            return self
        kept = tuple(size for size in sizes if size == 1 or size in traced)
        return self if kept == tuple(sizes) else self.with_options({BLOCK_SIZES: kept})

    def variations(self, traced: Sequence[int]) -> list[Candidate]:
        """This one first, then all combinations of what its Config declares in `grid` and the spec leaves open."""
        config = self.make().config
        axes = {
            name: [v for v in values if name != BLOCK_SIZE or v in traced]
            for name, values in type(config).grid.items()
            if name not in config.model_fields_set
        }
        axes = {name: usable for name, usable in axes.items() if usable}
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        others = [c for c in combinations if any(value != getattr(config, name) for name, value in c.items())]
        return [self, *(self.with_options(options) for options in others)]

    @property
    def remembers(self) -> bool:
        """Whether the policy keeps a memory from prompt to prompt, so that their order matters."""
        policy = self.make()
        return overrides(policy, "state_dict") and getattr(policy.config, ACROSS_REQUESTS, True)

    def knows_no_cost(self, spec: DecoderSpec) -> bool:
        """Whether the policy's choices cannot depend on the cost model.

        Time reaches a policy in two ways: the steps that `observe` is given, and the cost model in `bind`. One that
        defines neither knows nothing of it; nor does one whose `bind` leaves the cost model alone and does not keep it.
        """
        policy = self.make()
        if overrides(policy, "observe"):
            return False
        if not overrides(policy, "bind"):
            return True
        cost = _WatchedCost()
        policy.bind(spec, cost)
        touched, kept = cost.touched, weakref.ref(cost)
        del cost
        if kept() is not None:
            gc.collect()
        return not touched and kept() is None

    def describe(self) -> dict[str, Any]:
        """All options with their values, as plain JSON."""
        return self.make().config.model_dump(mode="json")


class _WatchedCost:
    """A cost model that notices when it is touched."""

    def __init__(self) -> None:
        object.__setattr__(self, "touched", False)

    def __getattribute__(self, name: str) -> object:
        if name not in ("touched", "__class__"):
            object.__setattr__(self, "touched", True)
        return object.__getattribute__(self, name)

    def seconds(self, phase: str, size: int, context_length: int) -> float:
        return 1.0


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
        self, candidate: Candidate, spec: DecoderSpec, costs: Mapping[str, NamedCost], seed: int | None = None
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
    def measured(cls, prompts: Sequence[Priced], cost: NamedCost) -> DecisionTime:
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
