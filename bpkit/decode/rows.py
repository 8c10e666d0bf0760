"""Rows that run together: what the loop reads from, and how it builds contexts, drafts and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bpkit.decode.drafter import Proposal
from bpkit.decode.features import target_features
from bpkit.decode.guard import GuardedPolicy
from bpkit.decode.host import to_host_with
from bpkit.decode.proposed import Proposed
from bpkit.decode.request import Request
from bpkit.decode.target import TargetOutput, TargetSession
from bpkit.decode.text import RunningText, counts, to_device
from bpkit.decode.timing import Stopwatch, TimedDrafter
from bpkit.decode.trees import Shapes, VerifiedNodes
from bpkit.decode.verify import Verdict, VerifyRule
from bpkit.types import (
    OF_PREFILL,
    OF_THE_DISTRIBUTION,
    OF_THE_DRAFT,
    OF_THE_SOURCES,
    Context,
    DecoderSpec,
    Draft,
    Feature,
    Prefill,
    SourceWork,
    Step,
    StepTree,
    Work,
)


@dataclass(frozen=True, slots=True)
class Decided:
    """What a target pass decided of each row, on the host.

    Attributes:
        tokens: up to where generation ends, int64 [rows, width]; padding behind the last of a row.
        position: output index of the first of them.
        num_accepted: drafted tokens that stand.
        near_ties: among the tokens.
        stopped: whether generation ends.
        context: of the draft that comes next.
        passed: tokens of the target at verified positions behind those of each row; of trees none.
        columns: of trees those of the pass that stand, anchors first; None of chains.
    """

    tokens: Tensor
    position: list[int]
    num_accepted: list[int]
    near_ties: tuple[int, ...]
    stopped: tuple[bool, ...]
    context: Context
    passed: list[list[int]]
    columns: list[list[int]] | None = None


@dataclass
class Shared:
    """What all rows of a decoder share.

    Attributes:
        wants: features to compute.
        keeps_trees: whether steps say which trees were drafted.
        watch: on which target, drafter and policy note their time.
    """

    policy: GuardedPolicy
    watch: Stopwatch
    spec: DecoderSpec
    wants: frozenset[Feature]
    keeps_trees: bool = False


@dataclass
class Rows:
    """Requests side by side, with the sessions that hold what models keep of them.

    Attributes:
        text: of the rows; the drafter shares it.
        context: of the next draft, once something was decided.
        ended: rows that the last pass ended.
    """

    requests: list[Request]
    text: RunningText
    target: TargetSession
    drafter: TimedDrafter
    rule: VerifyRule
    shared: Shared
    generator: torch.Generator
    context: Context | None = None
    ended: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.requests)

    def __post_init__(self) -> None:
        self.policy, self.watch = self.shared.policy, self.shared.watch

    # Rows come and go

    def join(self, other: Rows) -> None:
        """Take in rows that have begun, after one's own."""
        self.requests += other.requests
        self.text.join(other.text)
        self.target.join(other.target)
        self.drafter.join(other.drafter)
        self.rule.join(other.rule)
        assert self.context is not None
        assert other.context is not None
        self.context = replace(
            self._counted(),
            features=_joined(self.context.features, other.context.features),
            predictions=_joined(self.context.predictions or {}, other.context.predictions or {}) or None,
        )

    def leave(self, after: int = 0) -> None:
        """Let go of rows that ended; the others close up.

        Args:
            after: rows that the policy has before these.
        """
        if not self.ended:
            return
        self.policy.end([after + place for place in self.ended])
        for place in self.ended:
            self.requests[place].finish()
        # The last rows take the places of those that left, so that as little as possible has to move.
        staying = [place for place in range(len(self)) if place not in set(self.ended)]
        head = [place if place in staying else None for place in range(len(staying))]
        tail = iter([place for place in staying if place >= len(staying)])
        rows = [next(tail) if place is None else place for place in head]
        self.policy.keep([*range(after), *(after + place for place in rows)])
        self._keep(rows)
        self.ended = []

    def _keep(self, rows: list[int]) -> None:
        self.requests = [self.requests[place] for place in rows]
        if not rows:
            return
        self.text.keep(rows)
        self.target.keep(rows)
        self.drafter.keep(rows)
        self.rule.keep(rows)
        assert self.context is not None
        features, predictions = self.context.features, self.context.predictions
        self.context = replace(
            self._counted(),
            features=_selected(features, rows),
            predictions=None if predictions is None else _selected(predictions, rows),
        )

    # A turn

    def settle(self, output: TargetOutput, verdict: Verdict, width: Sequence[int]) -> Decided:
        """Read what a pass decided, and what policies may know of it, in one copy; append it to the texts.

        Args:
            width: drafted tokens of each row that were verified.
        """
        text, position = self.text, self.text.position
        features: dict[Feature, Tensor] = {}
        predictions: dict[str, Tensor] | None = None
        wants, first = self.shared.wants, not any(position)
        if wants - OF_THE_DRAFT - OF_THE_SOURCES:
            features = target_features(output, verdict, wants, first=first, embed=self.target.embed)
            predictions = self.policy.predict(features)
        decided = [part for part in verdict if part is not None]
        (tokens, accepted, near_tie, *path), features, predictions = to_host_with(decided, features, predictions)
        stands = accepted.tolist()
        verified = [row[: count + 1] for row, count in zip(tokens.tolist(), stands if path else width, strict=True)]
        chosen = [row[: count + 1] for row, count in zip(verified, stands, strict=True)]
        passed = [row[len(own) :] for row, own in zip(verified, chosen, strict=True)]
        ends = [request.cut(row) for request, row in zip(self.requests, chosen, strict=True)]
        chosen = [row[:count] for row, (count, _) in zip(chosen, ends, strict=True)]
        anchor = verdict.tokens.gather(1, verdict.num_accepted[:, None])
        text.append(verdict.tokens, anchor, chosen)
        for request in self.requests:
            request.settle()
        stopped = tuple(end for _, end in ends)
        self.ended = [place for place, end in enumerate(stopped) if end]
        context = self._counted()
        context.features, context.predictions = features, predictions
        context.running += self.policy.rows if first else 0
        self.context = _without_prefill(context)
        widest = max(map(len, chosen))
        ties = tuple(sum(row[:count]) for row, (count, _) in zip(near_tie.tolist(), ends, strict=True))
        num_accepted = [len(row) - 1 for row in chosen]
        columns = [row[: len(own)] for row, own in zip(path[0].tolist(), chosen, strict=True)] if path else None
        return Decided(tokens[:, :widest], position, num_accepted, ties, stopped, context, passed, columns)

    def _counted(self) -> Context:
        """Counts of the texts as they are."""
        length = self.text.length
        return Context(
            self.shared.spec,
            position=counts(self.text.position),
            remaining=counts([row.max_length - row.length for row in self.text.rows]),
            context_length=counts(length),
            generator=self.generator,
            row_ids=tuple(request.number for request in self.requests),
        )

    def offered(self, context: Context) -> Context:
        """The context with what the sources have before a draft, where the policy wants to know."""
        wanted = self.shared.wants & OF_THE_SOURCES
        if not wanted:
            return context
        return replace(context, features={**context.features, **self.drafter.features(wanted)})

    def draft(self, block_size: Sequence[int], source: Sequence[int], shapes: Shapes | None = None) -> Draft:
        """Ask each row's source for a block, or nobody where no row drafts; see `Selected`."""
        if max(block_size) == 1:
            return self.no_draft()
        assert self.context is not None
        wants, device = self.shared.wants, self.text.device
        proposed = Proposed(self.context, counts(block_size), counts(source), wants, self.policy, device)

        def go_on(latest: Proposal) -> list[bool]:
            proposed.add(latest)
            return self.policy.extend(proposed.draft())

        draw = self.rule.draw(block_size)
        asked = go_on if self.policy.extends else None
        proposal = self.drafter.draft(block_size, source, draw, asked, wants, shapes)
        proposed.add(proposal.after(proposed.width))
        draft = proposed.draft()
        draft.tokens, draft.logits = proposal.tokens.to(device), proposal.scores
        draft.read, draft.parents, draft.chances = self.drafter.read, proposal.parents, proposal.chances
        draft.positions = proposal.draft_sizes
        return draft

    def no_draft(self) -> Draft:
        """Blocks of the anchor alone."""
        context = self.context or self._counted()
        nothing = context.full(0)
        return Draft(context, context.full(1), nothing, self.text.anchor[:, :0], positions=[1] * len(nothing))

    def cut(self, draft: Draft, policy: GuardedPolicy) -> tuple[Draft, list[int]]:
        """The draft without the nodes of trees that are not verified, and the tokens of each row that are.

        It is what the policy keeps, capped to what may still be generated, and read.
        """
        if draft.parents is None:
            return draft, [*map(min, policy.truncate(draft), self._deepest())]
        parents, device = draft.parents.tolist(), draft.tokens.device
        nodes = VerifiedNodes.of(parents, policy.keep_nodes(draft), self._deepest(), device)
        whole = draft if self.shared.keeps_trees else None
        cut = replace(draft, tokens=nodes.tokens(draft.tokens), nodes=nodes, whole=whole)
        return cut, [len(row) for row in nodes.places]

    def _deepest(self) -> list[int]:
        """Drafted tokens of each row, one after the other, that may be verified."""
        positions = self.target.positions
        deepest = []
        for row in self.text.rows:
            # A step yields one token more than it verifies.
            most = row.max_length - row.length - 1
            if positions is not None:  # where plain decoding may end before it comes to the last one
                most = max(0, min(most, positions - row.length))
            deepest.append(most)
        return deepest

    def verify(self, draft: Draft, width: Sequence[int]) -> TargetOutput:
        """The target's pass over anchors and drafted tokens, so many of each row."""
        tokens = torch.cat([self.text.anchor, draft.tokens[:, : max(width)]], dim=1)
        if draft.nodes is not None and draft.nodes.tree is not None:
            reading: Any = self.target  # of a decoder that takes drafters with branches, so of a kind that reads them
            output: TargetOutput = reading.verify_trees(tokens, draft.nodes.tree)
            return output
        return self.target.verify(tokens, [count + 1 for count in width])

    def advance(self, output: TargetOutput, draft: Draft, decided: Decided, width: Sequence[int]) -> None:
        """Drop what was rejected from what the target holds, and show the drafter what stands."""
        if decided.columns is None:
            self.target.rollback([count - stands for count, stands in zip(width, decided.num_accepted, strict=True)])
            features = output.features_of([stands + 1 for stands in decided.num_accepted])
        else:
            reading: Any = self.target
            reading.accept([count + 1 for count in width], decided.columns)
            features = output.features_at(decided.columns)
        self.drafter.verified(draft.source.tolist(), width, decided.num_accepted)
        self.drafter.passed(decided.passed)
        self.drafter.advance(features)

    # Records

    def prefill(self, decided: Decided) -> Prefill:
        """The record of rows that begin."""
        return Prefill(decided.tokens, self.watch.charge(None), decided.near_ties, self.row_ids, decided.stopped)

    def step(self, draft: Draft, width: Sequence[int], decided: Decided) -> Step:
        """The record of a turn that verified so many drafted tokens of each row."""
        seconds = self.watch.charge(self.work(draft, width, decided.position))
        return Step(
            block_size=draft.block_size,
            draft_length=draft.draft_length,
            verify_length=counts(width),
            num_accepted=counts(decided.num_accepted),
            tokens=decided.tokens,
            position=counts(decided.position),
            seconds=seconds,
            fallbacks=self.policy.new_fallbacks(),
            near_ties=decided.near_ties,
            row_ids=self.row_ids,
            stopped=decided.stopped,
            source=draft.source,
            offer_agreed=self.drafter.agreed([row.newest for row in self.text.rows]),
            path=None if draft.nodes is None else self._path(draft.nodes.places, decided),
            tree=None if draft.whole is None else self._tree(draft.whole, draft.nodes.places),
        )

    @staticmethod
    def _tree(whole: Draft, places: Sequence[Sequence[int]]) -> StepTree:
        """What was drafted, with one more read of the device."""
        (tokens,), _, _ = to_host_with([whole.tokens], {}, None)
        verified = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, nodes in enumerate(places):
            verified[row, list(nodes)] = True
        assert whole.parents is not None
        assert whole.chances is not None
        return StepTree(tokens, whole.parents, whole.chances, verified)

    @staticmethod
    def _path(places: Sequence[Sequence[int]], decided: Decided) -> Tensor:
        """Of drafted trees the tokens that stand; see `Step.path`."""
        columns = decided.columns or [list(range(stands + 1)) for stands in decided.num_accepted]
        paths = [[own[column - 1] for column in row[1:]] for own, row in zip(places, columns, strict=True)]
        widest = max(map(len, paths))
        return torch.tensor([[*path, *[-1] * (widest - len(path))] for path in paths], dtype=torch.long)

    @property
    def row_ids(self) -> tuple[int, ...]:
        return tuple(request.number for request in self.requests)

    def work(self, draft: Draft, width: Sequence[int], position: Sequence[int]) -> Work:
        """What a turn did that began at these positions."""
        first, *others = self._drafts(draft) or [SourceWork(0, 0, 0, 0)]
        context = [row.prompt_length + at for row, at in zip(self.text.rows, position, strict=True)]
        return Work(
            draft_size=first.draft_size,
            waiting=first.waiting,
            verify_width=max(width) + 1,
            context_length=max(context),
            features=first.features,
            reread=self.target.reread,
            rows=len(self),
            drafted=first.drafted,
            verified=sum(width) + len(self),
            source=first.source,
            others=tuple(others),
        )

    def _drafts(self, draft: Draft) -> list[SourceWork]:
        """What each source did that drafted something."""
        sizes: dict[int, list[int]] = {}
        lengths = draft.draft_length.tolist()
        for source, length, size in zip(draft.source.tolist(), lengths, draft.positions, strict=True):
            if length:
                sizes.setdefault(source, []).append(size)
        features = not self.shared.wants.isdisjoint(OF_THE_DISTRIBUTION)
        return [
            SourceWork(source, max(drafted), draft.read.get(source, 0), sum(drafted), features)
            for source, drafted in sorted(sizes.items())
        ]


def _without_prefill(context: Context) -> Context:
    """The context without the features that only `begin` is given."""
    if context.features.keys().isdisjoint(OF_PREFILL):
        return context
    return replace(context, features={name: v for name, v in context.features.items() if name not in OF_PREFILL})


def _joined(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Values of rows and of those after them, where both have them."""
    return {name: torch.cat([one[name], other[name]]) for name in one if name in other}


def _selected(values: Mapping[Any, Tensor], rows: Sequence[int]) -> dict[Any, Tensor]:
    return {name: value[to_device(rows, value.device)] for name, value in values.items()}
