"""Replay: the live loop and the same policies, over a trace instead of models.

The output of a prompt is one fixed sequence, so what each draft would have been and how much of it would have stood is
a table. The loop runs over a target and a drafter that look everything up, and a cost model says what each step takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessorList

from bpkit.decode.admission import Admission
from bpkit.decode.clock import CostClock, GuardedClock, price
from bpkit.decode.loop import decode
from bpkit.decode.noise import POLICY_SALT, hashed
from bpkit.decode.request import Request
from bpkit.decode.rows import Rows, Shared
from bpkit.decode.sampling import Processors, Sampler
from bpkit.decode.sources import SourceSessions
from bpkit.decode.text import RunningText
from bpkit.decode.timing import Stopwatch, TimedDrafter, TimedPolicy, TimedTarget
from bpkit.policy import PolicyError
from bpkit.registry.resolve import PolicyLike, resolve_policy
from bpkit.trace.records import PromptTrace, Taken
from bpkit.trace.traced import TracedDrafter, TracedPrompts, TracedRule, TracedTarget, TracedText
from bpkit.types import OF_THE_DRAFT, OF_THE_SOURCES, CostModel, DecoderSpec, Feature, Step, Work


class Fill(Protocol):
    """Adds features that a trace does not hold, by running the models again.

    Attributes:
        offers: features that it can add.
    """

    offers: frozenset[Feature]

    def __call__(self, prompt: PromptTrace, features: frozenset[Feature]) -> PromptTrace:
        """The prompt with `features` added."""
        ...


@dataclass(frozen=True, kw_only=True)
class Replayed(Taken):
    """What a policy did with one prompt.

    Attributes:
        index: of the prompt in its trace.
        work: of each step, for pricing under any cost model.
        begin_seconds: measured decision time of `begin`.
        step_seconds: measured decision time of each step, float64 [steps]; `observe` counts with the step after it.
        fallbacks: policy faults that were mended.
    """

    index: int
    work: tuple[Work, ...]
    begin_seconds: float
    step_seconds: NDArray[np.float64]
    fallbacks: int

    def seconds(self, cost: CostModel) -> float:
        """Modelled time of the steps, decision time left out."""
        return sum(price(cost, work).total for work in self.work)


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
        clock = _WorkClock(self.cost)
        self.requests += 1
        rows = self._rows(prompt, wants, clock)
        admission = Admission(rows.requests, lambda requests, slots: rows)
        steps = [record for record in decode(admission, rows.policy) if isinstance(record, Step)]
        columns = ("position", "block_size", "draft_length", "verify_length", "num_accepted", "source")
        return Replayed(
            tokens=prompt.decided_by_steps,
            **{name: np.array([int(getattr(step, name)) for step in steps], np.int32) for name in columns},
            draft_size=np.array([work.draft_size for work in clock.work], np.int32),
            features=any(work.features for work in clock.work),
            index=prompt.index,
            work=tuple(clock.work),
            begin_seconds=clock.policy_seconds[0],
            step_seconds=np.array(clock.policy_seconds[1:]),
            fallbacks=rows.policy.fallbacks,
        )

    def _filled(self, prompt: PromptTrace, wants: frozenset[Feature]) -> PromptTrace:
        missing = wants - offered(prompt)
        if not missing:
            return prompt
        if self.fill is None:
            flags = " ".join(f"--features {name}" for name in sorted(missing))
            raise PolicyError(
                f"policy {type(self.policy).__name__} wants {', '.join(sorted(missing))}, which the trace does not "
                f"hold: trace into a new folder with `{flags}`, or let them be computed again with `--recompute`"
            )
        return self.fill(prompt, missing)

    def _rows(self, prompt: PromptTrace, wants: frozenset[Feature], clock: CostClock) -> Rows:
        watch = Stopwatch(GuardedClock(clock))
        shared = Shared(TimedPolicy(self.policy, self.spec, watch, strict=self.strict), watch, self.spec, wants)
        prompts = TracedPrompts([prompt], wants)
        request = traced_request(prompts.text(0), prompt.index, self.seed, self.requests)
        return traced_rows([request], prompts, shared)


def traced_request(text: TracedText, number: int, seed: int | None, count: int) -> Request:
    """A request whose output is known, the `count`-th of its decoder.

    Args:
        number: its row id.
    """
    # The decoder's own way to seed: a live decoder that runs the same prompts in the same order draws the same.
    generator = torch.Generator().manual_seed(hashed(seed or 0, text.traced.index, count, POLICY_SALT) >> 1)
    sampler = Sampler(text, Processors(LogitsProcessorList()), None)
    return Request(number, text, sampler, text, generator)


def traced_rows(
    requests: list[Request],
    prompts: TracedPrompts,
    shared: Shared,
    target: Callable[..., TracedTarget] = TracedTarget,
) -> Rows:
    """Rows that begin together, over sessions that look everything up.

    Args:
        target: makes the target's.
    """
    text, spec = RunningText([request.text for request in requests]), shared.spec
    drafters = [
        TracedDrafter(drafts, source, shared.wants, text)
        for drafts, source in zip(prompts.sources, spec.sources, strict=True)
    ]
    return Rows(
        requests,
        text,
        TimedTarget(target(prompts, text, stateful=spec.stateful), shared.watch),
        TimedDrafter(SourceSessions(drafters, spec.sources, rows=len(requests)), shared.watch),
        TracedRule(prompts, text),
        shared,
        requests[0].generator,
    )


def offered(prompt: PromptTrace) -> frozenset[Feature]:
    """Features that a trace holds, or that follow from it."""
    of_drafts = {name for drafts in prompt.sources for name in drafts.features}
    known = OF_THE_SOURCES - (set() if knows_matches(prompt) else {Feature.SOURCE_MATCH, Feature.SOURCE_SHARE})
    return frozenset({Feature.DRAFT_TOKENS, *prompt.features, *of_drafts, *known})


def knows_matches(prompt: PromptTrace) -> bool:
    """Whether it is known of all drafts without a model how long the match was that they come from."""
    return all(drafts.features or drafts.match_length is not None for drafts in prompt.sources)


def with_features(prompt: PromptTrace, features: dict[Feature, NDArray[np.float32]]) -> PromptTrace:
    """A prompt with further features, each where it belongs."""
    of_drafts = {name: value for name, value in features.items() if name in OF_THE_DRAFT}
    of_prompt = {name: value for name, value in features.items() if name not in OF_THE_DRAFT}
    drafts = replace(prompt.drafts, features={**prompt.drafts.features, **of_drafts})
    return replace(prompt, drafts=drafts, features={**prompt.features, **of_prompt})


class _WorkClock(CostClock):
    """A cost clock that keeps the work of every step."""

    def __init__(self, cost: CostModel) -> None:
        super().__init__(cost)
        self.work: list[Work] = []

    def charge(self, measured: Any, work: Work | None) -> Any:
        if work is not None:
            self.work.append(work)
        return super().charge(measured, work)
