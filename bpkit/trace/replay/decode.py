"""Replay: the live loop and the same policies, over a trace instead of models.

The output of a prompt is one fixed sequence, so what each draft would have been and how much of it would have stood is
a table. The loop runs over a target and a drafter that look everything up, and a cost model says what each step takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bpkit.decode.clock import CostClock, GuardedClock, price
from bpkit.decode.loop import decode
from bpkit.decode.noise import POLICY_SALT, hashed
from bpkit.decode.request import Request
from bpkit.decode.text import RunningText
from bpkit.decode.timing import Stopwatch, TimedDrafter, TimedPolicy, TimedTarget
from bpkit.policy import PolicyError
from bpkit.registry.resolve import PolicyLike, resolve_policy
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay.models import Lookup, TracedDrafter, TracedRule, TracedStop, TracedTarget
from bpkit.types import OF_THE_DRAFT, CostModel, DecoderSpec, Feature, Step, Work


class Fill(Protocol):
    """Adds features that a trace does not hold, by running the models again.

    Attributes:
        offers: features that it can add.
    """

    offers: frozenset[Feature]

    def __call__(self, prompt: PromptTrace, features: frozenset[Feature]) -> PromptTrace:
        """The prompt with `features` added."""
        ...


@dataclass(frozen=True)
class Replayed:
    """What a policy did with one prompt.

    Attributes:
        index: of the prompt in its trace.
        tokens: that the steps yielded; the one that prefill decides is not among them.
        position, block_size, draft_length, verify_length, num_accepted: of each step, int32 [steps].
        work: of each step, for pricing under any cost model.
        begin_seconds: measured decision time of `begin`.
        step_seconds: measured decision time of each step, float64 [steps]; `observe` counts with the step after it.
        fallbacks: policy faults that were mended.
    """

    index: int
    tokens: int
    position: NDArray[np.int32]
    block_size: NDArray[np.int32]
    draft_length: NDArray[np.int32]
    verify_length: NDArray[np.int32]
    num_accepted: NDArray[np.int32]
    work: tuple[Work, ...]
    begin_seconds: float
    step_seconds: NDArray[np.float64]
    fallbacks: int

    @property
    def steps(self) -> int:
        return len(self.work)

    def seconds(self, cost: CostModel) -> float:
        """Modelled time of the steps, decision time left out."""
        return sum(price(cost, work).total for work in self.work)


class _Notes(CostClock):
    """A cost clock that keeps the work of every step."""

    def __init__(self, cost: CostModel) -> None:
        super().__init__(cost)
        self.work: list[Work] = []

    def charge(self, measured: Any, work: Work | None) -> Any:
        if work is not None:
            self.work.append(work)
        return super().charge(measured, work)


class Replayer:
    """Replays prompts of one trace under one policy.

    A policy with memory keeps it from prompt to prompt, as in a decoder: make one Replayer for each order of prompts.

    Args:
        spec: of the decoder that the trace stands for (`Trace.spec`).
        policy: an instance, or what `bpkit.resolve_policy` takes.
        cost: what steps cost; also handed to the policy's `bind`, and the clock that it may learn from.
        seed: of the trace, for the policy's own random numbers.
        strict: raise on policy faults instead of mending them.
        fill: where features come from that the trace does not hold.

    Raises:
        PolicyError: the policy cannot serve the decoder that the trace stands for.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        policy: PolicyLike,
        cost: CostModel,
        *,
        seed: int | None = None,
        strict: bool = False,
        fill: Fill | None = None,
    ) -> None:
        self.spec, self.cost, self.seed, self.strict, self.fill = spec, cost, seed, strict, fill
        self.policy = resolve_policy(policy)
        self.policy.bind(spec, cost)
        self.requests = 0

    def run(self, prompt: PromptTrace) -> Replayed:
        """Replay one prompt.

        Raises:
            PolicyError: the policy wants what the trace does not hold; the message says how to add it.
            TraceError: the policy asks for a block size that was not traced.
        """
        there = offered(prompt) | (self.fill.offers if self.fill is not None else frozenset())
        wants = self.policy.wants | (self.policy.wants_optional & there)
        prompt = self._filled(prompt, wants)
        clock = _Notes(self.cost)
        self.requests += 1
        request = self._request(Lookup(prompt), wants, clock)
        steps = [record for record in decode(request) if isinstance(record, Step)]

        def column(name: str) -> NDArray[np.int32]:
            return np.array([int(getattr(step, name)) for step in steps], np.int32)

        return Replayed(
            index=prompt.index,
            tokens=prompt.decided_by_steps,
            position=column("position"),
            block_size=column("block_size"),
            draft_length=column("draft_length"),
            verify_length=column("verify_length"),
            num_accepted=column("num_accepted"),
            work=tuple(clock.work),
            begin_seconds=clock.policy_seconds[0],
            step_seconds=np.array(clock.policy_seconds[1:]),
            fallbacks=request.policy.fallbacks,
        )

    def _filled(self, prompt: PromptTrace, wants: frozenset[Feature]) -> PromptTrace:
        missing = wants - offered(prompt)
        if not missing:
            return prompt
        names = ", ".join(sorted(missing))
        if self.fill is None:
            flags = " ".join(f"--features {name}" for name in sorted(missing))
            raise PolicyError(
                f"policy {type(self.policy).__name__} wants {names}, which the trace does not hold: trace into a new "
                f"folder with `{flags}`, or let them be computed again with `--recompute`"
            )
        return self.fill(prompt, missing)

    def _request(self, lookup: Lookup, wants: frozenset[Feature], clock: CostClock) -> Request:
        # The decoder's own way to seed: a live decoder that runs the same prompts in the same order draws the same.
        seed = hashed(self.seed or 0, lookup.trace.index, self.requests, POLICY_SALT) >> 1
        text, watch = RunningText(lookup.prompt), Stopwatch(GuardedClock(clock))
        return Request(
            text=text,
            target=TimedTarget(TracedTarget(lookup, text, wants, stateful=self.spec.stateful), watch),
            drafter=TimedDrafter(TracedDrafter(lookup, text, self.spec.work, wants), watch),
            policy=TimedPolicy(self.policy, self.spec, watch, strict=self.strict),
            rule=TracedRule(lookup, text),
            stopping=TracedStop(lookup.trace, text),
            watch=watch,
            spec=self.spec,
            wants=wants,
            generator=torch.Generator().manual_seed(seed),
        )


def offered(prompt: PromptTrace) -> frozenset[Feature]:
    """Features that a trace holds."""
    return frozenset({Feature.DRAFT_TOKENS, *prompt.features, *prompt.drafts.features})


def with_features(prompt: PromptTrace, features: dict[Feature, NDArray[np.float32]]) -> PromptTrace:
    """A prompt with further features, each where it belongs."""
    of_drafts = {name: value for name, value in features.items() if name in OF_THE_DRAFT}
    of_prompt = {name: value for name, value in features.items() if name not in OF_THE_DRAFT}
    drafts = replace(prompt.drafts, features={**prompt.drafts.features, **of_drafts})
    return replace(prompt, drafts=drafts, features={**prompt.features, **of_prompt})
