"""Replay: the live loop and the same policies, over a trace instead of models.

The output of a prompt is one fixed sequence, so what each draft would have been and how much of it would have stood is
a table. The loop runs over a target and a drafter that look everything up, and a cost model says what each step takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessorList

from bpkit.decode.admission import Admission
from bpkit.decode.clock import CostClock, GuardedClock, price
from bpkit.decode.drafter import EachRow, GoOn, Offer, Proposal
from bpkit.decode.loop import decode
from bpkit.decode.noise import POLICY_SALT, hashed
from bpkit.decode.request import Request
from bpkit.decode.reread import Rereading
from bpkit.decode.rows import Rows, Shared
from bpkit.decode.sampling import Draw, Processors, Sampler, Samplers
from bpkit.decode.sources import SourceSessions
from bpkit.decode.target import TargetOutput
from bpkit.decode.text import RowText, RunningText
from bpkit.decode.timing import Stopwatch, TimedDrafter, TimedPolicy, TimedTarget
from bpkit.decode.verify import Coupled, Verdict
from bpkit.policy import PolicyError
from bpkit.registry.resolve import PolicyLike, resolve_policy
from bpkit.trace.records import DraftTable, PromptTrace, Taken
from bpkit.trace.store.manifest import TraceError
from bpkit.types import (
    OF_PREFILL,
    OF_THE_DRAFT,
    OF_THE_SOURCES,
    CostModel,
    DecoderSpec,
    Draft,
    DraftWork,
    Feature,
    Step,
    Work,
)


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
        # The decoder's own way to seed: a live decoder that runs the same prompts in the same order draws the same.
        seed = hashed(self.seed or 0, prompt.index, self.requests, POLICY_SALT) >> 1
        generator = torch.Generator().manual_seed(seed)
        tokens = prompt.prompt_tokens.tolist()
        row = RowText(torch.tensor([tokens]), prompt.prompt_length + prompt.max_new_tokens, tokens=tokens)
        text = RunningText([row])
        watch = Stopwatch(GuardedClock(clock))
        policy = TimedPolicy(self.policy, self.spec, watch, strict=self.strict)
        sampler = Sampler(row, Processors(LogitsProcessorList()), None)
        return Rows(
            [Request(prompt.index, row, sampler, _TracedStop(prompt, row), generator)],
            text,
            TimedTarget(_TracedTarget(prompt, row, wants, stateful=self.spec.stateful), watch),
            TimedDrafter(self._sources(prompt, text, wants), watch),
            _TracedRule(prompt, Samplers([sampler])),
            Shared(policy, watch, self.spec, wants),
            generator,
        )

    def _sources(self, prompt: PromptTrace, text: RunningText, wants: frozenset[Feature]) -> SourceSessions:
        works = [source.work for source in self.spec.sources]
        begins = [
            partial(_TracedDrafter, drafts, work, wants) for drafts, work in zip(prompt.sources, works, strict=True)
        ]
        return SourceSessions([EachRow(text, begin) for begin in begins], self.spec.sources, rows=1)


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


# What looks everything up, in the places of the models that the loop expects


class _TracedTarget:
    """A `TargetSession` without a model, for one row. It has no logits; `_TracedRule` knows what they decided."""

    positions: int | None = None

    def __init__(self, prompt: PromptTrace, text: RowText, wants: frozenset[Feature], *, stateful: bool) -> None:
        self.text = text
        self.held = [0]
        self.rereading = Rereading() if stateful else None
        self.nothing = torch.zeros(1, 1, 1)
        wanted = {name: torch.tensor(prompt.features[name])[None] for name in wants & prompt.features.keys()}
        self.at_first = {name: value[:, None] for name, value in wanted.items() if name in OF_PREFILL}
        self.by_position = {name: value for name, value in wanted.items() if name not in OF_PREFILL}

    @property
    def reread(self) -> int:
        return 0 if self.rereading is None else self.rereading.reread

    def prefill(self, tokens: Tensor, counts: Sequence[int], *, last: bool, **inputs: Any) -> TargetOutput:
        first = {name: value[:, :1] for name, value in self.by_position.items()}
        return TargetOutput(self.nothing, None, None, {**first, **self.at_first})

    def verify(self, tokens: Tensor, counts: Sequence[int]) -> TargetOutput:
        (width,), first = counts, self.text.position
        if self.rereading is not None:
            self.rereading.verify(width)
        known = {name: value[:, first : first + width] for name, value in self.by_position.items()}
        return TargetOutput(self.nothing, None, None, known)

    def rollback(self, counts: Sequence[int]) -> None:
        if self.rereading is not None:
            self.rereading.reject(counts[0])

    def keep(self, rows: Sequence[int]) -> None:
        """There is one row."""

    def join(self, other: Any) -> None:
        raise NotImplementedError("prompts are replayed one by one")

    def embed(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError("a trace knows its features and embeds nothing")

    def cache(self, row: int) -> None:
        """There is none."""


class _TracedDrafter:
    """A `RowDrafterSession` without a model, that reads what a real one with such `work` would read."""

    def __init__(self, drafts: DraftTable, work: DraftWork, wants: frozenset[Feature], text: RowText) -> None:
        self.drafts, self.text, self.work = drafts, text, work
        self.features = {name: value for name, value in drafts.features.items() if name in wants}
        self.waiting: int | None = None
        """Positions that the next draft reads; None until prefill has decided the first token."""
        self.length: int | None = None
        """Tokens of the draft since the last advance."""

    def advance(self, features: Tensor | None) -> None:
        if self.waiting is None:
            self.waiting = self.work.first(self.text.prompt_length)
        elif self.length is None:
            self.waiting = self.work.after_no_draft(self.waiting, len(self.text.newest))
        else:
            self.waiting = self.work.after_draft(self.length, len(self.text.newest) - 1)
        self.length = None

    def offer(self, most: int) -> Offer:
        at = self.text.position - 1
        tokens = self.drafts.tokens[at, -1, : self.drafts.draft_length[at, -1]].tolist()
        match, share = self.drafts.match_length, self.drafts.match_share
        return Offer(tokens, 0 if match is None else int(match[at]), 1.0 if share is None else float(share[at]))

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        at = self.text.position - 1, _column(self.drafts, block_size)
        self.length = int(self.drafts.draft_length[at])
        if go_on is not None and self.work.may_end_early:
            for length in range(1, self.length):
                if not go_on(self._proposal(at, length).after(length - 1))[0]:
                    self.length = length
                    break
        return self._proposal(at, self.length)

    def _proposal(self, at: tuple[int, int], length: int) -> Proposal:
        tokens = torch.from_numpy(self.drafts.tokens[at][:length]).long()[None]
        features = {name: torch.from_numpy(value[at][:length])[None] for name, value in self.features.items()}
        return Proposal(tokens, None, None, [length], self.waiting or 0, {Feature.DRAFT_TOKENS: tokens, **features})


class _TracedRule(Coupled):
    """A verify rule that knows which drafted tokens stand."""

    def __init__(self, prompt: PromptTrace, samplers: Samplers) -> None:
        super().__init__(samplers)
        self.sources = prompt.sources
        self.output = torch.tensor(prompt.output_tokens).long()[None]
        self.no_tie = torch.zeros(1, 1, dtype=torch.bool)

    def verify(self, logits: Tensor, draft: Draft, width: Sequence[int]) -> Verdict:
        (position,), accepted = self.samplers.position, 0
        if width[0] > 0:
            drafts = self.sources[int(draft.source)]
            at = position - 1, _column(drafts, int(draft.block_size))
            accepted = min(int(drafts.num_accepted[at]), width[0])
        tokens = self.output[:, position : position + accepted + 1]
        return Verdict(tokens, torch.tensor([accepted]), self.no_tie)


class _TracedStop:
    """An `OutputEnd` that ends where the output did."""

    def __init__(self, prompt: PromptTrace, text: RowText) -> None:
        self.text, self.end = text, prompt.output_length

    def cut(self, tokens: Sequence[int]) -> tuple[int, bool]:
        return len(tokens), self.text.position + len(tokens) == self.end


def _column(drafts: DraftTable, block_size: int) -> int:
    try:
        return drafts.column(block_size)
    except KeyError:
        sizes = drafts.block_sizes.tolist()
        raise TraceError(
            f"block size {block_size} was asked for, but the trace has 1+{'+'.join(map(str, sizes))}: trace with "
            f"`--block-sizes 2-{max(sizes)}` so that there are no gaps, or restrict the policy's sizes"
        ) from None
