"""The drafter protocol: what proposes tokens, and its memory of one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bpkit.decode.sampling import Draw
from bpkit.decode.text import RunningText
from bpkit.types import DraftWork, Feature


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens, before a policy sees them.

    Attributes:
        tokens: int64 [1, count], count at most block_size - 1.
        scores: the drafter's processed scores, float32 [1, count, vocab], or None if it has no distribution.
        hidden: its last hidden states, [1, count, hidden], or None.
        read: decided positions that the drafter read before it drafted; 0 without a model.
        features: what policies may see of it, where that is known already (in replay); else it is computed.
    """

    tokens: Tensor
    scores: Tensor | None
    hidden: Tensor | None
    read: int = 0
    features: Mapping[Feature, Tensor] | None = None

    def after(self, count: int) -> Proposal:
        """Without the first `count` tokens."""
        if count == 0:
            return self
        return Proposal(
            self.tokens[:, count:],
            None if self.scores is None else self.scores[:, count:],
            None if self.hidden is None else self.hidden[:, count:],
            self.read,
            None if self.features is None else {name: value[:, count:] for name, value in self.features.items()},
        )


GoOn = Callable[[Proposal], bool]
"""Asks the policy's `extend` whether to draft another token. It is handed only the tokens that were drafted since it
was last asked, so that each is looked at once."""


class DrafterSession(Protocol):
    """A drafter's state for one running text."""

    def advance(self, features: Tensor | None) -> None:
        """Take in what was appended to the text: `text.newest`, of which the last token is the new anchor.

        First called when prefill has decided the first token: the prompt is new, too. After a draft those of the newest
        tokens that come before the last are drafted tokens that stand.

        Args:
            features: target features of the positions that were read to decide them, [1, count, layers * hidden]
                (of the first call: of the prompt), or None if the drafter has no `feature_layers`.
        """
        ...

    def draft(self, block_size: Sequence[int], draw: Draw, go_on: GoOn | None) -> Proposal:
        """Propose up to `block_size - 1` tokens after the anchor of each row; at least one row has 2 or more."""
        ...


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
    hold for one order of prompts only.
    """

    name: str
    kind: str
    work: DraftWork
    trained_block_size: int
    max_block_size: int
    feature_layers: tuple[int, ...]
    provides: frozenset[Feature]

    def begin(self, text: RunningText) -> DrafterSession:
        """A session for a new request, whose prompt is the text so far."""
        ...
