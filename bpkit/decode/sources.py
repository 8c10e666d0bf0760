"""Several sources of drafts in one decoder: the drafters, and their sessions side by side.

Each row drafts from one source in a step, and rows of one step may draft from different ones. A source that did not
draft reads what it missed before it drafts again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bpkit.assets import model_name
from bpkit.decode.drafter import Drafter, DrafterSession, GoOn, Offer, Proposal, offers_of, own_features
from bpkit.decode.features import draft_features
from bpkit.decode.sampling import Draw
from bpkit.decode.target import TargetSession
from bpkit.decode.text import RunningText, padded
from bpkit.decode.trees import Shapes
from bpkit.types import OF_OFFERS, OF_THE_DISTRIBUTION, DraftWork, Feature, SourceSpec, work_of

RECENT, AT_FIRST = 0.2, 0.5
"""Weight of a step in the moving average of a source's success, and where that begins."""


class Sources:
    """Several drafters of one target, as one `Drafter`.

    What a decoder says of *its* drafter (kind, block sizes, work) is the first one's: policies that name no source
    draft from that.

    Attributes:
        sources: the drafters, in their order. feature_layers: all that any of them needs.
    """

    def __init__(self, sources: Sequence[Drafter]) -> None:
        if not sources:
            raise ValueError("no drafter was given: name at least one")
        if any(len(sources_of(source)) > 1 for source in sources):
            raise ValueError("a source of drafts is one drafter: give all of them in one list")
        self.sources = tuple(sources)
        first = self.sources[0]
        self.name = " + ".join(source.name for source in sources)
        self.kind, self.work = first.kind, work_of_drafter(first)
        self.trained_block_size, self.max_block_size = first.trained_block_size, first.max_block_size
        self.feature_layers = tuple(sorted({layer for source in sources for layer in source.feature_layers}))
        self.provides: frozenset[Feature] = frozenset().union(*(source.provides for source in sources))
        self.remembers_requests = any(getattr(source, "remembers_requests", False) for source in sources)
        self.depends_on_steps = any(getattr(source, "depends_on_steps", False) for source in sources)
        self.branches = max(getattr(source, "branches", 1) for source in sources)

    def begin(self, text: RunningText) -> DrafterSession:
        raise TypeError("several sources have a session each: begin them with SourceSessions")


def sources_of(drafter: Drafter) -> tuple[Drafter, ...]:
    """The drafters that a drafter holds: itself, unless it is several."""
    several: tuple[Drafter, ...] = getattr(drafter, "sources", ())
    return several or (drafter,)


def work_of_drafter(drafter: Drafter) -> DraftWork:
    """What a drafter does for a draft. Raises ValueError for a kind that is not built in and does not say."""
    work = getattr(drafter, "work", None)
    return work if isinstance(work, DraftWork) else work_of(drafter.kind)


def source_spec(drafter: Drafter, largest: int | None = None) -> SourceSpec:
    """What policies learn of a drafter.

    Args:
        largest: block size that they may ask for, if it is less than the drafter's own limit.
    """
    most = min(drafter.max_block_size, largest or drafter.max_block_size)
    trained = min(drafter.trained_block_size, most)
    branches = getattr(drafter, "branches", 1)
    return SourceSpec(model_name(drafter.name), drafter.kind, trained, most, work_of_drafter(drafter), branches)


def _begun(source: Drafter, text: RunningText, target: TargetSession | None) -> DrafterSession:
    beside = getattr(source, "begin_beside", None)
    session: DrafterSession = source.begin(text) if target is None or beside is None else beside(text, target)
    return session


class SourceSessions:
    """The sessions of a decoder's sources for the rows of one running text.

    Args:
        sessions: one for each source. specs: of the sources.
        rows: that begin.
        own_layers: target layers that each source reads; `layers` are those whose features are handed over.

    Attributes:
        read: decided positions that each source read for the last draft, by source; of those that drafted.
        success: of each row, the recent success of each source; see `Feature.SOURCE_SUCCESS`.
    """

    def __init__(
        self,
        sessions: Sequence[DrafterSession],
        specs: Sequence[SourceSpec],
        rows: int,
        layers: tuple[int, ...] = (),
        own_layers: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self.sessions, self.specs, self.layers = list(sessions), specs, layers
        self.own_layers = own_layers or [()] * len(sessions)
        self.read: dict[int, int] = {}
        self._offered: list[list[Offer] | None] | None = None
        self.success = [[AT_FIRST] * len(sessions) for _ in range(rows)]

    @classmethod
    def begun(
        cls, drafter: Drafter, specs: Sequence[SourceSpec], text: RunningText, target: TargetSession | None = None
    ) -> SourceSessions:
        """Sessions of all sources that a drafter holds.

        Args:
            target: the session of the same rows, for sources that begin beside it; None where its passes are captured.
        """
        sources = sources_of(drafter)
        sessions = [_begun(source, text, target) for source in sources]
        own_layers = [source.feature_layers for source in sources]
        return cls(sessions, specs, len(text.rows), drafter.feature_layers, own_layers)

    def advance(self, features: Sequence[Tensor] | None) -> None:
        """Tell all what was appended to the text; see `DrafterSession`."""
        for session, own in zip(self.sessions, self.own_layers, strict=True):
            session.advance(own_features(features, self.layers, own))

    def passed(self, chosen: Sequence[list[int]]) -> None:
        """Tell those that want to know what the target said after the last token of a step."""
        for session in self.sessions:
            if hasattr(session, "passed"):
                session.passed(chosen)

    def verified(self, source: Sequence[int], width: Sequence[int], num_accepted: Sequence[int]) -> None:
        """Note how much of what was verified stood, of each row."""
        for row, drafted_by, count, stands in zip(self.success, source, width, num_accepted, strict=True):
            if count:
                row[drafted_by] += RECENT * (stands / count - row[drafted_by])

    def features(self, wants: frozenset[Feature]) -> dict[Feature, Tensor]:
        """Of the sources, before a draft: each [rows, sources], on the host."""
        found: dict[Feature, Tensor] = {}
        if wants & OF_OFFERS:
            self._offered = [self._offers(place) for place in range(len(self.sessions))]
            known = [
                _known(offers, spec, len(self.success)) for offers, spec in zip(self._offered, self.specs, strict=True)
            ]
            count, match, share = zip(*known, strict=True)
            found[Feature.SOURCE_OFFER], found[Feature.SOURCE_MATCH] = torch.tensor(count).T, torch.tensor(match).T
            found[Feature.SOURCE_SHARE] = torch.tensor(share, dtype=torch.float64).T
            rows = range(len(self.success))
            found[Feature.SOURCE_SUPPORT] = torch.tensor([_support(self._offered, row) for row in rows])
        if Feature.SOURCE_SUCCESS in wants:
            found[Feature.SOURCE_SUCCESS] = torch.tensor(self.success, dtype=torch.float64)
        return {name: value for name, value in found.items() if name in wants}

    def _offers(self, place: int) -> list[Offer] | None:
        """What a free source has for each row; None of one that does not say before it drafts."""
        spec = self.specs[place]
        return offers_of(self.sessions[place], spec.max_block_size - 1) if spec.work.free else None

    def agreed(self, yielded: Sequence[Sequence[int]]) -> Tensor | None:
        """How much of what sources offered came to be; see `Step.offer_agreed`.

        Args:
            yielded: tokens of each row's step.
        """
        if self._offered is None:
            return None
        offered, self._offered = self._offered, None
        return torch.tensor(
            [
                [-1 if offers is None else _common(offers[row].tokens, tokens) for offers in offered]
                for row, tokens in enumerate(yielded)
            ]
        )

    def draft(
        self,
        block_size: Sequence[int],
        source: Sequence[int],
        draw: Draw,
        go_on: GoOn | None,
        wants: frozenset[Feature],
        shapes: Shapes | None = None,
    ) -> Proposal:
        """Propose tokens for each row from its source; at least one row has a block size above 1.

        A policy's `extend` is asked where all rows that draft have one source; beside others a block is drafted whole.

        Args:
            wants: features of drafts, which are computed here where sources differ.
            shapes: trees to draft, of rows whose source drafts trees.
        """
        used = sorted({place for place, size in zip(source, block_size, strict=True) if size > 1})
        if len(used) == 1:
            proposal = self._drafted(used[0], block_size, draw, go_on, shapes)
            self.read = {used[0]: proposal.read}
            return proposal if len(self.sessions) == 1 else _complete(proposal, wants)
        parts: dict[int, Proposal] = {}
        for place in used:
            sizes = [size if own == place else 1 for size, own in zip(block_size, source, strict=True)]
            own_shapes = shapes and [shape if own == place else None for shape, own in zip(shapes, source, strict=True)]
            part = self._drafted(place, sizes, draw, None, own_shapes)
            parts[place] = _complete(replace(part, features=draft_features(part, wants)), wants)
        self.read = {place: part.read for place, part in parts.items()}
        return _together(parts, source, block_size)

    def _drafted(
        self,
        place: int,
        block_size: Sequence[int],
        draw: Draw,
        go_on: GoOn | None,
        shapes: Shapes | None,
    ) -> Proposal:
        """What one source drafts; sessions of chains know of no shapes."""
        session: Any = self.sessions[place]
        shaped: dict[str, Any] = {"shapes": shapes} if shapes and any(shapes) else {}
        proposal: Proposal = session.draft(block_size, draw, go_on, **shaped)
        return proposal

    def keep(self, rows: Sequence[int]) -> None:
        for session in self.sessions:
            session.keep(rows)
        self.success = [self.success[row] for row in rows]

    def join(self, other: SourceSessions) -> None:
        for session, more in zip(self.sessions, other.sessions, strict=True):
            session.join(more)
        self.success += other.success


def _together(parts: Mapping[int, Proposal], source: Sequence[int], block_size: Sequence[int]) -> Proposal:
    """Proposals of several sources as one: each row that of its source, of one that does not draft nothing."""
    first = next(iter(parts.values()))
    nothing = first.after(first.tokens.shape[1])
    made = [parts[own] if size > 1 else nothing for own, size in zip(source, block_size, strict=True)]
    device = first.tokens.device

    def rows_of(value: Callable[[Proposal], Tensor]) -> Tensor:
        return padded([value(part)[row : row + 1].to(device) for row, part in enumerate(made)])

    trees = any(part.parents is not None for part in parts.values())
    if trees:
        made = [part.as_tree() for part in made]
    features = {name: rows_of(partial(_feature, name=name, parts=parts)) for name in _names(parts)}
    scored = not trees and any(part.scores is not None for part in parts.values())
    vocab = next((part.scores.shape[-1] for part in parts.values() if part.scores is not None), 0)
    return Proposal(
        rows_of(lambda part: part.tokens),
        rows_of(partial(_scores, vocab=vocab)) if scored else None,
        None,
        [part.counts[row] for row, part in enumerate(made)],
        max(part.read for part in parts.values()),
        features,
        parents=_on_the_host([part.parents for part in made]) if trees else None,
        chances=_on_the_host([part.chances for part in made]) if trees else None,
        positions=[part.draft_sizes[row] for row, part in enumerate(made)],
    )


def _on_the_host(made: Sequence[Tensor | None]) -> Tensor:
    """Parents or chances of each row out of those of its source, [rows, width]."""
    return padded([part[row : row + 1] for row, part in enumerate(made) if part is not None])


def _complete(part: Proposal, wants: frozenset[Feature]) -> Proposal:
    """A proposal with NaN for wanted features of the distribution, where its source has none."""
    if part.scores is not None:
        return part
    features = draft_features(part, wants)
    absent = part.tokens.new_full(part.tokens.shape, float("nan"), dtype=torch.float32)
    return replace(part, features={**dict.fromkeys(wants & OF_THE_DISTRIBUTION, absent), **features})


def _known(offers: list[Offer] | None, spec: SourceSpec, rows: int) -> tuple[list[int], list[int], list[float]]:
    """Tokens on offer, length of the match, and its share, of each row."""
    if offers is None:
        return [spec.max_block_size - 1] * rows, [0] * rows, [1.0] * rows
    share = [offer.share if offer.tokens else 0.0 for offer in offers]
    return [len(offer.tokens) for offer in offers], [offer.match for offer in offers], share


def _support(offered: Sequence[list[Offer] | None], row: int) -> list[int]:
    """How many others' offers of a row begin as each source's does."""
    first = [offers[row].tokens[0] if offers and offers[row].tokens else None for offers in offered]
    return [0 if token is None else first.count(token) - 1 for token in first]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens from the first on that are the same."""
    count = 0
    for count, (mine, theirs) in enumerate(zip(one, other, strict=False), 1):
        if mine != theirs:
            return count - 1
    return count


def _names(parts: Mapping[int, Proposal]) -> set[Feature]:
    return {name for part in parts.values() for name in part.features or {}}


def _feature(part: Proposal, *, name: Feature, parts: Mapping[int, Proposal]) -> Tensor:
    """A feature of drafts, [rows, width, ...]; NaN where a source has none such as the first that has it."""
    like = next(other.features[name] for other in parts.values() if other.features and name in other.features)
    own = (part.features or {}).get(name)
    if own is not None and own.shape[2:] == like.shape[2:]:
        return own
    return like.new_full((*part.tokens.shape, *like.shape[2:]), float("nan"))


def _scores(part: Proposal, *, vocab: int) -> Tensor:
    """Scores of a part; a store is sure of its tokens. float32 [rows, width, vocab]."""
    if part.scores is not None:
        return part.scores
    sure = torch.full((*part.tokens.shape, vocab), float("-inf"), device=part.tokens.device)
    return sure.scatter_(-1, part.tokens[..., None], 0.0)
