"""One generation, ready to run: what the loop reads from, and how it builds contexts, drafts and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bpkit.decode.drafter import DrafterSession, Proposal
from bpkit.decode.features import target_features
from bpkit.decode.guard import GuardedPolicy
from bpkit.decode.host import to_host_with
from bpkit.decode.proposed import Proposed
from bpkit.decode.stopping import OutputEnd
from bpkit.decode.target import TargetOutput, TargetSession
from bpkit.decode.text import RunningText, counts
from bpkit.decode.timing import Stopwatch
from bpkit.decode.verify import Verdict, VerifyRule
from bpkit.types import (
    OF_PREFILL,
    OF_THE_DISTRIBUTION,
    OF_THE_DRAFT,
    Context,
    DecoderSpec,
    Draft,
    Feature,
    Prefill,
    Step,
    Work,
)


@dataclass(frozen=True, slots=True)
class Decided:
    """What a target pass decided, on the host.

    Attributes:
        tokens: up to where generation ends, int64 [1, acceptance_length].
        position: output index of the first of them, of each row.
        num_accepted: of each row.
        near_ties: among the tokens, of each row.
        stopped: whether generation ends.
        context: of the draft that comes next.
    """

    tokens: Tensor
    position: list[int]
    num_accepted: list[int]
    near_ties: tuple[int, ...]
    stopped: bool
    context: Context

    def without_prefill(self) -> Context:
        """The context without the features that only `begin` is given."""
        features = {name: value for name, value in self.context.features.items() if name not in OF_PREFILL}
        return replace(self.context, features=features)


@dataclass
class Request:
    """Everything that one generation needs.

    Attributes:
        text: of the running rows; target, drafter, rule and stopping share it.
        wants: features to compute.
        watch: on which target, drafter and policy note their time.
        generator: the policy's own random numbers.
        inputs: what the target's prefill takes beside the prompt, such as images.
    """

    text: RunningText
    target: TargetSession
    drafter: DrafterSession
    policy: GuardedPolicy
    rule: VerifyRule
    stopping: OutputEnd
    watch: Stopwatch
    spec: DecoderSpec
    wants: frozenset[Feature]
    generator: torch.Generator
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def settle(self, output: TargetOutput, verdict: Verdict) -> Decided:
        """Read what a pass decided, and what policies may know of it, in one copy; append it to the text."""
        text, position = self.text, self.text.position
        features: dict[Feature, Tensor] = {}
        predictions: dict[str, Tensor] | None = None
        if self.wants - OF_THE_DRAFT:
            first = not any(position)
            features = target_features(output, verdict, self.wants, first=first, embed=self.target.embed)
            predictions = self.policy.predict(features)
        (tokens, accepted, near_tie), features, predictions = to_host_with(verdict, features, predictions)
        ((count, stopped),) = (
            self.stopping.cut(row, chosen[: stands + 1])
            for row, (chosen, stands) in enumerate(zip(tokens.tolist(), accepted.tolist(), strict=True))
        )
        tokens = tokens[:, :count]
        text.append(verdict.tokens[:, :count], tokens)
        context = self.context()
        context.features, context.predictions = features, predictions
        ties = tuple(sum(row[:count]) for row in near_tie.tolist())
        return Decided(tokens, position, [count - 1], ties, stopped, context)

    def context(self) -> Context:
        """Counts of the text as it is."""
        length = self.text.length
        return Context(
            self.spec,
            position=counts(self.text.position),
            remaining=counts([self.stopping.max_length - row for row in length]),
            context_length=counts(length),
            generator=self.generator,
        )

    def draft(self, context: Context, block_size: Sequence[int]) -> Draft:
        """Ask the drafter for a block, or nobody where no row drafts."""
        if max(block_size) == 1:
            return self.no_draft(context)
        proposed = Proposed(context, counts(block_size), self.wants, self.policy)

        def go_on(latest: Proposal) -> bool:
            proposed.add(latest)
            return self.policy.extend(proposed.draft())

        proposal = self.drafter.draft(block_size, self.rule.draw(), go_on if self.policy.extends else None)
        proposed.add(proposal.after(proposed.length))
        draft = proposed.draft()
        draft.tokens, draft.logits = proposal.tokens.to(self.text.ids.device), proposal.scores
        draft.read = proposal.read
        return draft

    def no_draft(self, context: Context | None = None) -> Draft:
        """A block of the anchor alone."""
        context = context or self.context()
        return Draft(context, context.full(1), context.full(0), self.text.ids[:, :0])

    def width(self, draft: Draft, verify_length: Sequence[int]) -> int:
        """Drafted tokens to verify: what the policy keeps, capped to what may still be generated, and read."""
        (length,) = self.text.length
        # A step yields one token more than it verifies.
        most = self.stopping.max_length - length - 1
        if self.target.positions is not None:  # where plain decoding may end before it comes to the last one
            most = max(0, min(most, self.target.positions - length))
        return min(max(verify_length), most)

    def prefill(self, decided: Decided) -> Prefill:
        """The record of prefill."""
        return Prefill(decided.tokens, self.watch.charge(None), decided.near_ties)

    def step(self, draft: Draft, width: int, decided: Decided) -> Step:
        """The record of a turn that verified `width` drafted tokens."""
        seconds = self.watch.charge(self.work(draft, width, decided.position))
        return Step(
            block_size=draft.block_size,
            draft_length=draft.draft_length,
            verify_length=draft.full(width),
            num_accepted=counts(decided.num_accepted),
            tokens=decided.tokens,
            position=counts(decided.position),
            seconds=seconds,
            fallbacks=self.policy.new_fallbacks(),
            near_ties=decided.near_ties,
        )

    def work(self, draft: Draft, width: int, position: Sequence[int]) -> Work:
        """What a turn did that began at these positions."""
        drafted = draft.tokens.shape[1]
        return Work(
            draft_size=drafted + 1 if drafted else 0,
            waiting=draft.read if drafted else 0,
            verify_width=width + 1,
            context_length=self.text.prompt_length[0] + position[0],
            features=drafted > 0 and not self.wants.isdisjoint(OF_THE_DISTRIBUTION),
            reread=self.target.reread,
        )
