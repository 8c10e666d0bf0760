"""One generation, ready to run: what the loop reads from, and how it builds contexts, drafts and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bpkit.decode.clock import Clock, GuardedClock, Watch
from bpkit.decode.features import target_features
from bpkit.decode.guard import GuardedPolicy
from bpkit.decode.host import to_host_with
from bpkit.decode.proposed import Proposed
from bpkit.decode.stopping import Stopping
from bpkit.decode.target import TargetOutput, TargetSession
from bpkit.decode.verify import Verdict, VerifyRule
from bpkit.draft.base import DrafterSession, Proposal
from bpkit.types import (
    OF_PREFILL,
    OF_THE_DISTRIBUTION,
    OF_THE_DRAFT,
    Context,
    DecoderSpec,
    Draft,
    Feature,
    Step,
    Work,
)


@dataclass(frozen=True, slots=True)
class Decided:
    """What a target pass decided, on the host.

    Attributes:
        tokens: up to where generation ends, int64 [1, acceptance_length].
        near_ties: among them.
        stopped: whether generation ends.
        context: of the draft that comes next.
    """

    tokens: Tensor
    near_ties: int
    stopped: bool
    context: Context

    def without_prefill(self) -> Decided:
        """Without the features that only `begin` is given."""
        features = {name: value for name, value in self.context.features.items() if name not in OF_PREFILL}
        return replace(self, context=replace(self.context, features=features))


@dataclass
class Request:
    """Everything that one generation needs.

    Attributes:
        prompt: int64 [1, length], on the device.
        wants: features to compute.
        generator: the policy's own random numbers.
        inputs: what the target's prefill takes beside the prompt, such as images.
    """

    prompt: Tensor
    target: TargetSession
    drafter: DrafterSession
    policy: GuardedPolicy
    rule: VerifyRule
    stopping: Stopping
    clock: Clock
    spec: DecoderSpec
    wants: frozenset[Feature]
    generator: torch.Generator
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = Watch(self.clock)

    @property
    def clock_faults(self) -> int:
        """Steps that the clock could not price."""
        return self.clock.faults if isinstance(self.clock, GuardedClock) else 0

    def settle(self, output: TargetOutput, verdict: Verdict, ids: Tensor, *, first: bool = False) -> Decided:
        """Read what a pass over the last of `ids` decided, and what policies may know of it, in one copy."""
        features: dict[Feature, Tensor] = {}
        predictions: dict[str, Tensor] | None = None
        if self.wants - OF_THE_DRAFT:
            features = target_features(output, verdict, self.wants, first=first, embed=self.target.embed)
            self.watch.lap("rest")
            predictions = self.policy.predict(features)
            self.watch.lap("policy")
        (tokens, accepted, near_tie), features, predictions = to_host_with(verdict, features, predictions)
        count, stopped = self.stopping.cut(ids, tokens.tolist()[0][: accepted.tolist()[0] + 1])
        context = self.context(ids.shape[1] + count)
        context.features, context.predictions = features, predictions
        return Decided(tokens[:, :count], sum(near_tie.tolist()[0][:count]), stopped, context)

    def context(self, length: int) -> Context:
        """Counts where prompt and output have `length` tokens."""
        return Context(
            self.spec,
            position=torch.full((1,), length - self.prompt.shape[1]),  # several times as fast as `torch.tensor`
            remaining=torch.full((1,), self.stopping.max_length - length),
            context_length=torch.full((1,), length),
            generator=self.generator,
        )

    def draft(self, context: Context, block_size: Tensor, ids: Tensor) -> Draft:
        """Ask the drafter for a block, or nobody at block size 1. What the policy wants of it is the policy's time."""
        size = int(block_size)
        if size == 1:
            return self.no_draft(context)
        proposed = Proposed(context, block_size, self.wants, self.policy)

        def go_on(latest: Proposal) -> bool:
            self.watch.lap("draft")
            proposed.add(latest)
            answer = self.policy.extend(proposed.draft())
            self.watch.lap("policy")
            return answer

        proposal = self.drafter.draft(size, self.rule.draw(ids), go_on if self.policy.extends else None)
        self.watch.lap("draft")
        proposed.add(proposal.after(proposed.length))
        draft = proposed.draft()
        draft.tokens, draft.logits = proposal.tokens.to(ids.device), proposal.scores
        return draft

    def no_draft(self, context: Context | None = None) -> Draft:
        """A block of the anchor alone."""
        context = context or self.context(self.prompt.shape[1])
        return Draft(context, context.full(1), context.full(0), self.prompt[:, :0])

    def verify_length(self, draft: Draft, ids: Tensor) -> int:
        """Drafted tokens to verify: what the policy keeps, capped to what may still be generated, and read."""
        if draft.tokens.shape[1] == 0:
            return 0
        # A step yields one token more than it verifies.
        most = self.stopping.max_length - ids.shape[1] - 1
        if self.target.positions is not None:  # where plain decoding may end before it comes to the last one
            most = max(0, min(most, self.target.positions - ids.shape[1]))
        return min(int(self.policy.truncate(draft)), most)

    def step(self, draft: Draft, waiting: int, verify_length: int, ids: Tensor, decided: Decided) -> Step:
        """The record of a turn that began with `ids`."""
        self.watch.lap("rest")
        work = self.work(draft, waiting, verify_length, ids.shape[1])
        seconds = self.clock.charge(self.watch.take(), work)
        return Step(
            block_size=draft.block_size,
            draft_length=draft.draft_length,
            verify_length=draft.full(verify_length),
            num_accepted=draft.full(decided.tokens.shape[1] - 1),
            tokens=decided.tokens,
            position=ids.shape[1] - self.prompt.shape[1],
            seconds=seconds,
            fallbacks=self.policy.new_fallbacks(),
            near_ties=decided.near_ties,
        )

    def work(self, draft: Draft, waiting: int, verify_length: int, context_length: int) -> Work:
        """What a step did that drafted while `waiting` positions had to be read first."""
        drafted = draft.tokens.shape[1]
        return Work(
            draft_size=drafted + 1 if drafted else 0,
            waiting=waiting if drafted else 0,
            verify_width=verify_length + 1,
            context_length=context_length,
            features=drafted > 0 and not self.wants.isdisjoint(OF_THE_DISTRIBUTION),
            reread=self.target.reread,
        )
