"""Ensemble drafting: several models draft the same positions, and a mixture of their distributions decides.

TABED (Lee et al., https://github.com/furiosa-ai/TABED), which weighs drafts of one model from several forms of an
image prompt; here they are drafts of several models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpkit.decode.drafter import Drafter, DrafterSession, GoOn, Proposal, own_features
from bpkit.decode.resolve_drafter import resolve_drafter
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
from bpkit.draft.autoregressive import AutoregressiveDrafter, AutoregressiveSession, TokenByToken
from bpkit.draft.mixture import FixedWeights, MixedDraw, MixtureWeights, Undrawn
from bpkit.types import Feature

ENSEMBLE = "ensemble"
MOST = 4
"""Members whose weights may follow the target's tokens: a grid for five has a thousand points."""


class EnsembleDrafter:
    """Drafts the arg-max of a weighted mixture of its members' distributions, plus the noise where there is noise.

    Args:
        members: drafters of `target`, of one kind of work: all of a whole block in one pass, or all token after token.
        weights: one for each member; None lets them follow the target's tokens, request by request.

    Raises:
        ValueError: members that cannot draft together.
    """

    kind = ENSEMBLE
    provides = frozenset({Feature.DRAFT_TOKENS, Feature.DRAFT_PROBABILITY, Feature.DRAFT_ENTROPY})

    def __init__(
        self, members: Sequence[Drafter], target: PreTrainedModel, *, weights: Sequence[float] | None = None
    ) -> None:
        _refuse_unlike(members, weights)
        self.members, self.weights = list(members), weights
        self.name = "+".join(member.name for member in members)
        self.work = members[0].work
        self.trained_block_size = min(member.trained_block_size for member in members)
        self.max_block_size = min(member.max_block_size for member in members)
        self.feature_layers = tuple(sorted({layer for member in members for layer in member.feature_layers}))
        self.model = nn.ModuleList(m for m in (getattr(member, "model", None) for member in members) if m is not None)
        self.depends_on_steps = weights is None
        self.remembers_requests = any(getattr(member, "remembers_requests", False) for member in members)

    @classmethod
    def load(
        cls,
        path: str,
        target: PreTrainedModel,
        *,
        members: Sequence[str | Mapping[str, Any]],
        weights: Sequence[float] | None = None,
    ) -> EnsembleDrafter:
        """Make its members as `resolve_drafter` does; there is no `path` of its own."""
        return cls([resolve_drafter(member, target) for member in members], target, weights=weights)

    def begin(self, text: RunningText) -> EnsembleSession:
        return (AssistantsSession if self.work.passes == "each" else EnsembleSession)(self, text)


class EnsembleSession:
    """The members' sessions side by side, each of which drafts whole blocks."""

    def __init__(self, drafter: EnsembleDrafter, text: RunningText) -> None:
        self.drafter, self.text = drafter, text
        self.members: list[DrafterSession] = [member.begin(text) for member in drafter.members]
        rows = len(text.rows)
        self.weights: Any = (
            MixtureWeights(rows, len(self.members), text.device)
            if drafter.weights is None
            else FixedWeights(rows, drafter.weights, text.device)
        )
        self._drawn: tuple[MixedDraw, Sequence[int]] | None = None
        """What was drawn in this step, and how many tokens of each row."""

    def advance(self, features: Sequence[Tensor] | None) -> None:
        drafter = self.drafter
        for member, session in zip(drafter.members, self.members, strict=True):
            session.advance(own_features(features, drafter.feature_layers, member.feature_layers))
        if self._drawn is not None and drafter.weights is None:
            draw, drafted = self._drawn
            counts = [min(row) for row in zip(drafted, self.text.counts, strict=True)]
            self.weights.learn(draw, self.text.newest, counts)
        self._drawn = None

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        mixed = self._mixed(draw)
        made = [member.draft(block_size, Undrawn(draw.samplers), None) for member in self.members]
        counts = [min(row) for row in zip(*(proposal.counts for proposal in made), strict=True)]
        width = max(counts)
        logits = [proposal.scores[:, :width] for proposal in made if proposal.scores is not None]
        tokens, scores = mixed(torch.stack(logits, dim=2), counts)
        self._drawn = mixed, counts
        return Proposal(tokens, scores, None, counts, max(proposal.read for proposal in made))

    def keep(self, rows: Sequence[int]) -> None:
        for each in (*self.members, self.weights):
            each.keep(rows)

    def join(self, other: EnsembleSession) -> None:
        for each, theirs in zip((*self.members, self.weights), (*other.members, other.weights), strict=True):
            each.join(theirs)

    def _mixed(self, draw: Draw) -> MixedDraw:
        return MixedDraw(draw, self.weights.now, keep=self.drafter.weights is None)


class AssistantsSession(EnsembleSession, TokenByToken):
    """Members that draft token after token: each reads what the mixture drafted."""

    @property
    def readers(self) -> list[AutoregressiveSession]:
        return [member for member in self.members if isinstance(member, AutoregressiveSession)]

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        mixed = self._mixed(draw)
        made = TokenByToken.draft(self, block_size, mixed, go_on)
        self._drawn = (mixed, made.counts) if max(made.counts) else None
        return Proposal(made.tokens, made.scores, None, made.counts, made.read)

    def room(self, block_size: Sequence[int]) -> list[int]:
        return [min(row) for row in zip(*(reader.room(block_size) for reader in self.readers), strict=True)]

    def waiting(self) -> int:
        return max(reader.waiting() for reader in self.readers)

    def first(self) -> tuple[Tensor, Tensor]:
        return _together([reader.first() for reader in self.readers])

    def following(self, tokens: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return _together([reader.following(tokens, counts) for reader in self.readers])

    def nothing(self) -> Proposal:
        return self.readers[0].nothing()


def _together(read: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits of all, [rows, 1, members, vocab], and hidden states of the first."""
    return torch.stack([logits for logits, _ in read], dim=2), read[0][1]


def _refuse_unlike(members: Sequence[Drafter], weights: Sequence[float] | None) -> None:
    if len(members) < 2:
        raise ValueError(f"an ensemble needs two members or more, got {len(members)}")
    if weights is None and len(members) > MOST:
        raise ValueError(
            f"weights follow the target's tokens for up to {MOST} members, and these are {len(members)}: fix them, "
            f"as in weights={'+'.join('1' for _ in members)}"
        )
    first = members[0]
    for member in members:
        if getattr(member, "branches", 1) > 1:
            raise ValueError(f"drafter {member.name} drafts trees, and members of an ensemble draft chains: branches=1")
        scored = Feature.DRAFT_PROBABILITY in member.provides
        alone = member.work.passes == "each" and not isinstance(member, AutoregressiveDrafter)
        if not scored or alone or isinstance(member, EnsembleDrafter):
            raise ValueError(
                f"drafter {member.name} ({member.kind}) cannot be a member of an ensemble: members are drafters that "
                "give a distribution for a block in one pass, or assistant models"
            )
        if member.work != first.work:
            raise ValueError(
                f"members {first.name} ({first.kind}) and {member.name} ({member.kind}) cannot draft together: one "
                "drafts a block in one pass and the other token after token; use members of one kind"
            )
