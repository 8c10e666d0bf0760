"""One generation, ready to run: what the loop reads from, and how it builds contexts, drafts and steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bpkit.drafters.base import DrafterSession, Proposal
from bpkit.runtime.clock import Clock, Watch
from bpkit.runtime.features import draft_features, target_features
from bpkit.runtime.guard import GuardedPolicy
from bpkit.runtime.stopping import Stopping
from bpkit.runtime.target import TargetOutput, TargetSession
from bpkit.runtime.verify import Verdict, VerifyRule
from bpkit.types import BLOCK_DIFFUSION, OF_THE_DISTRIBUTION, Context, DecoderSpec, Draft, Feature, Step, Work


@dataclass
class Request:
    """Everything that one generation needs.

    Attributes:
        prompt: int64 [1, length].
        wants: features to compute.
        generator: the policy's own random numbers.
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

    def context(self, ids: Tensor, output: TargetOutput | None, *, first: bool = False) -> Context:
        """What the policy sees before a draft; `output` is the pass that decided the anchor, the last of `ids`."""
        length = ids.shape[1]
        numbers = [[length - self.prompt.shape[1]], [self.stopping.max_length - length], [length]]
        position, remaining, context_length = torch.tensor(numbers, device=ids.device)
        features = {}
        if output is not None:
            features = target_features(output, ids[:, -1], self.wants, first=first, embed=self.target.embed)
        return Context(
            spec=self.spec,
            position=position,
            remaining=remaining,
            context_length=context_length,
            generator=self.generator,
            features=features,
        )

    def draft(self, context: Context, block_size: Tensor, ids: Tensor, watch: Watch) -> Draft:
        """Ask the drafter for a block, or nobody at block size 1. What the policy wants of it is the policy's time."""
        size = int(block_size)
        if size == 1:
            return self.no_draft(context)

        def as_draft(proposal: Proposal) -> Draft:
            length = context.full(proposal.tokens.shape[1])
            features = draft_features(proposal, self.wants)
            return Draft(context, block_size, length, proposal.tokens, proposal.scores, features)

        def go_on(so_far: Proposal) -> bool:
            watch.lap("draft")
            answer = self.policy.extend(as_draft(so_far))
            watch.lap("policy")
            return answer

        proposal = self.drafter.draft(size, self.rule.draw(ids), go_on if self.policy.extends else None)
        watch.lap("draft")
        return as_draft(proposal)

    def no_draft(self, context: Context | None = None) -> Draft:
        """A block of the anchor alone."""
        context = context or self.context(self.prompt, None)
        return Draft(context, context.full(1), context.full(0), self.prompt[:, :0])

    def verify_length(self, draft: Draft, ids: Tensor) -> int:
        """Drafted tokens to verify: what the policy keeps, capped to what may still be generated."""
        if draft.tokens.shape[1] == 0:
            return 0
        # A step yields one token more than it verifies.
        return min(int(self.policy.truncate(draft)), self.stopping.max_length - ids.shape[1] - 1)

    def step(
        self,
        draft: Draft,
        waiting: int,
        verify_length: int,
        ids: Tensor,
        tokens: Tensor,
        verdict: Verdict,
        watch: Watch,
    ) -> Step:
        """The record of a turn that began with `ids` and yielded `tokens`, int64 [1, acceptance_length]."""
        watch.lap("rest")
        work = self.work(draft, waiting, verify_length, ids.shape[1])
        seconds = self.clock.charge(watch.take(), work)
        return Step(
            block_size=draft.block_size,
            draft_length=draft.draft_length,
            verify_length=draft.full(verify_length),
            num_accepted=draft.full(tokens.shape[1] - 1),
            tokens=tokens,
            position=ids.shape[1] - self.prompt.shape[1],
            seconds=seconds,
            fallbacks=self.policy.new_fallbacks(),
            near_ties=verdict.near_ties(tokens.shape[1]),
        )

    def work(self, draft: Draft, waiting: int, verify_length: int, context_length: int) -> Work:
        """What a step did that drafted while `waiting` positions had to be read first."""
        size = int(draft.block_size)
        if size > 1 and self.spec.drafter_kind != BLOCK_DIFFUSION:
            size = int(draft.draft_length) + 1
        drafted = size > 1
        return Work(
            draft_size=size if drafted else 0,
            waiting=waiting if drafted else 0,
            verify_width=verify_length + 1,
            context_length=context_length,
            features=drafted and bool(self.wants & OF_THE_DISTRIBUTION),
        )
