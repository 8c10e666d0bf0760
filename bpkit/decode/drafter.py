"""The drafter protocol: what proposes tokens, and its memory of one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bpkit.decode.sampling import Draw
from bpkit.decode.text import RowText, RunningText, padded
from bpkit.decode.trees import Shapes, chain
from bpkit.types import DraftWork, Feature


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens, before a policy sees them. What stands behind a row's own count is padding.

    Attributes:
        tokens: int64 [rows, width].
        scores: the drafter's processed scores, float32 [rows, width, vocab], or None if it has no distribution.
        hidden: its last hidden states, [rows, width, hidden], or None.
        counts: tokens of each row, at most its block_size - 1.
        read: decided positions that the drafter read before it drafted, of the row that had most; 0 without a model.
        features: what policies may see of it, where that is known already (in replay); else it is computed.
        parents: of a tree, as in `Draft`, on the host; None of a chain. Children of one node are different tokens.
        chances: as in `Draft`, on the host.
        places: of a tree, which of the positions of `scores` and `hidden` each token is drawn from, int64 [rows, width]
            on their device; None where position and token are one.
        positions: of a tree, the anchor and the positions of each row that the drafter computed, one after the other;
            None where they are its tokens.
    """

    tokens: Tensor
    scores: Tensor | None
    hidden: Tensor | None
    counts: Sequence[int]
    read: int = 0
    features: Mapping[Feature, Tensor] | None = None
    parents: Tensor | None = None
    chances: Tensor | None = None
    places: Tensor | None = None
    positions: Sequence[int] | None = None

    def of_tokens(self, values: Tensor) -> Tensor:
        """Of values of positions, [rows, positions, ...], those of the tokens: [rows, width, ...]."""
        if self.places is None:
            return values
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, self.places.to(values.device)]

    def at_tokens(self, values: Tensor) -> Tensor:
        """Of values of positions and words, [rows, positions, vocab], those of the tokens: [rows, width]."""
        if self.places is None:
            return values.gather(-1, self.tokens[..., None])[..., 0]
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, self.places, self.tokens]

    def as_tree(self) -> Proposal:
        """The same with parents."""
        if self.parents is not None:
            return self
        rows, width = self.tokens.shape
        places = torch.arange(width, device=self.tokens.device).expand(rows, width)
        return replace(
            self,
            parents=chain(width, rows),
            chances=torch.full((rows, width), torch.nan),
            places=places,
        )

    @property
    def draft_sizes(self) -> list[int]:
        """What each row's draft costs, as a block size."""
        return list(self.positions or [count + 1 for count in self.counts])

    def after(self, count: int) -> Proposal:
        """Without the first `count` tokens of each row."""
        if count == 0:
            return self

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[:, count:]

        return replace(
            self,
            tokens=self.tokens[:, count:],
            scores=cut(self.scores),
            hidden=cut(self.hidden),
            counts=[max(0, row - count) for row in self.counts],
            features=None if self.features is None else {name: v[:, count:] for name, v in self.features.items()},
            parents=cut(self.parents),
            chances=cut(self.chances),
            places=cut(self.places),
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """What a free source has for one row, before a policy selects.

    Attributes:
        tokens: that it would draft now.
        match: length of the match that they come from, in tokens; 0 if there is none.
        share: of the match's occurrences that go on with the first token, as `Feature.SOURCE_SHARE` counts; 1 if they
            are not counted.
    """

    tokens: list[int]
    match: int = 0
    share: float = 1.0


def proposed(offer: Offer) -> Proposal:
    """An offer as the proposal of its row."""
    return Proposal(torch.tensor([offer.tokens], dtype=torch.long), None, None, [len(offer.tokens)])


GoOn = Callable[[Proposal], list[bool]]
"""Asks the policy's `extend` which rows draft another token. It is handed only the tokens that were drafted since it
was last asked, so that each is looked at once."""


class DrafterSession(Protocol):
    """A drafter's state for the rows of one running text.

    One of a free source (`DraftWork.free`) also has `offer(most) -> list[Offer]`: what it would draft for each row, up
    to so many tokens, of a tree the best path; what it drafts at a smaller size is the beginning of what it drafts at a
    larger one. One that learns from what the target said after a wrong token has `passed(chosen)`, which is called
    after every step, before `advance`: `chosen[i]` are the target's tokens of row *i*, on the host, at those verified
    positions that come after the last token that the step yields.
    """

    def advance(self, features: Sequence[Tensor] | None) -> None:
        """Take in what was appended to the text: `text.newest`, of which the last token is each row's new anchor.

        First called when prefill has decided the first token: the prompt is new, too. After a draft of this drafter
        those of the newest tokens that come before the last are drafted tokens that stand. After one of another source
        it has seen none of them.

        Args:
            features: target features of the positions that were read to decide them, of each row [count, layers *
                hidden] (of the first call: of the prompt), or None if the drafter has no `feature_layers`.
        """
        ...

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        """Propose up to `block_size - 1` tokens after the anchor of each row; at least one row has 2 or more.

        That of a drafter with `branches` above 1 takes `shapes=None` as well, which is handed over where a `Plan` has
        trees: of each row the `TreeShape` to draft, without nodes that are ruled out and those after them, or None
        where the tree is the drafter's choice.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order; the text was told before."""
        ...

    def join(self, other: Any) -> None:
        """Take in the rows of another session of this drafter after one's own; the text was told before."""
        ...


class RowDrafterSession(Protocol):
    """A drafter's state for one row, where each row drafts by itself; see `EachRow`.

    One of a free source also has `offer(most) -> Offer`, and one that learns from passes `passed(chosen)`, as in
    `DrafterSession`, of this row.
    """

    def advance(self, features: Tensor | None) -> None:
        """As in `DrafterSession`: `text.newest` was appended; features are [count, layers * hidden], or None."""
        ...

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        """Propose up to `block_size - 1` tokens, of which there is at least one: a proposal of one row.

        That of a drafter with `branches` above 1 takes `shape=None` as well: this row's, as in `DrafterSession`.
        """
        ...


class EachRow:
    """A `DrafterSession` of one session for each row, for drafters that gain nothing from drafting rows together.

    A policy's `extend` is asked where one row runs; beside others a row drafts its whole block, which `truncate` cuts.

    Args:
        begin: makes the session of a row.
    """

    def __init__(self, text: RunningText, begin: Callable[[RowText], RowDrafterSession]) -> None:
        self.sessions = [begin(row) for row in text.rows]

    def advance(self, features: Sequence[Tensor] | None) -> None:
        for place, session in enumerate(self.sessions):
            session.advance(None if features is None else features[place])

    def draft(
        self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None, shapes: Shapes | None = None
    ) -> Proposal:
        shaped = [{"shape": shape} if shape else {} for shape in shapes or [None] * len(self.sessions)]
        sessions: list[Any] = self.sessions
        if len(sessions) == 1:
            proposal: Proposal = sessions[0].draft(block_size[0], draw, go_on, **shaped[0])
            return proposal
        made: list[Proposal | None] = [
            session.draft(size, draw.row(row), None, **own) if size > 1 else None
            for row, (session, size, own) in enumerate(zip(sessions, block_size, shaped, strict=True))
        ]
        return side_by_side(made)

    @property
    def offers(self) -> bool:
        """Whether the sessions of all rows make offers."""
        return all(hasattr(session, "offer") for session in self.sessions)

    def offer(self, most: int) -> list[Offer]:
        """What each row's session would draft, up to `most` tokens. Where `offers` only."""
        return [session.offer(most) for session in self.sessions]  # type: ignore[attr-defined]

    def passed(self, chosen: Sequence[list[int]]) -> None:
        """Tell the sessions, where they want to know, what the target said after the last token of a step."""
        for session, tokens in zip(self.sessions, chosen, strict=True):
            if hasattr(session, "passed"):
                session.passed(tokens)

    def keep(self, rows: Sequence[int]) -> None:
        self.sessions = [self.sessions[row] for row in rows]

    def join(self, other: EachRow) -> None:
        self.sessions += other.sessions


def side_by_side(made: Sequence[Proposal | None]) -> Proposal:
    """Proposals of one row each as one of all; None stands for a row that does not draft."""
    like = next(proposal for proposal in made if proposal is not None)
    nothing = like.after(like.tokens.shape[1])
    each = [proposal or nothing for proposal in made]

    def of(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return padded(there) if len(there) == len(values) else None

    tokens = of([proposal.tokens for proposal in each])
    assert tokens is not None
    if any(proposal.parents is not None for proposal in each):
        each = [proposal.as_tree() for proposal in each]
    features = None
    if like.features is not None:
        parts = {name: of([(one.features or {})[name] for one in each]) for name in like.features}
        features = {name: part for name, part in parts.items() if part is not None}
    return Proposal(
        tokens,
        of([proposal.scores for proposal in each]),
        of([proposal.hidden for proposal in each]),
        [proposal.counts[0] for proposal in each],
        max(proposal.read for proposal in each),
        features,
        parents=of([proposal.parents for proposal in each]),
        chances=of([proposal.chances for proposal in each]),
        places=of([proposal.places for proposal in each]),
        positions=[proposal.draft_sizes[0] for proposal in each],
    )


def offers_of(session: DrafterSession, most: int) -> list[Offer] | None:
    """What each row of a free source would draft, up to `most` tokens; None of one that makes no offers."""
    if not getattr(session, "offers", hasattr(session, "offer")):
        return None
    offering: Any = session
    made: list[Offer] = offering.offer(most)
    return made


def own_features(
    features: Sequence[Tensor] | None, layers: tuple[int, ...], own: tuple[int, ...]
) -> Sequence[Tensor] | None:
    """Of features of the target's `layers`, those of a drafter's `own`: None if it reads none.

    Args:
        features: of each row [count, layers * hidden].
    """
    if features is None or not own:
        return None
    if own == layers:
        return features
    places = [layers.index(layer) for layer in own]
    return [row.view(len(row), len(layers), -1)[:, places].flatten(1) for row in features]


class Drafter(Protocol):
    """A source of drafts for one target.

    Attributes:
        name: path or description.
        kind: a label, such as `block-diffusion`, for people and files.
        work: what it does for a draft.
        trained_block_size: of training, or a default where there was none.
        max_block_size: the largest block that it drafts.
        feature_layers: target layers it needs; layer *i* means `hidden_states[i + 1]`.
        provides: draft features that it can give to policies.

    A drafter whose drafts depend on earlier requests (a store of n-grams across prompts, say) also has an attribute
    `remembers_requests = True`; without one it counts as False. Traces refuse such a drafter, because theirs would
    hold for one order of prompts only. So they do with `depends_on_steps = True`: a drafter whose drafts depend on what
    was drafted and verified before, and not on the text alone.

    A drafter that may use what the target holds of the rows has `begin_beside(text, target)`, which is called instead
    of `begin` with the target's session, where that has one whose passes are not captured.

    A drafter whose drafts may be trees has `branches`, the most children that a node of them has; 1 without one. Its
    proposals then have `parents`, and its `max_block_size` counts nodes.

    A drafter that holds several sources lists them as `sources`; see `bpkit.decode.sources`.
    """

    name: str
    kind: str
    work: DraftWork
    trained_block_size: int
    max_block_size: int
    feature_layers: tuple[int, ...]
    provides: frozenset[Feature]

    def begin(self, text: RunningText) -> DrafterSession:
        """A session for rows that begin together, whose prompts are the text so far.

        A drafter that drafts each row by itself returns `EachRow(text, ...)`.
        """
        ...
