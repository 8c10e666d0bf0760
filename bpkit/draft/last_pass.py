"""Jacobi drafting: propose what the target's last pass said about the positions after its first wrong token.

Santilli et al. 2023 (2305.10427) decode greedily by such iterations; with noise, Teng et al. 2024 (2410.01699) draw it
anew in every pass, and So et al. 2025 (2510.24211) keep it, so that the same token tends to come again. Under the
coupled rule a position has one noise in all passes; under rejection the target's most likely tokens are handed over,
which depend on no noise.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from bpkit.decode.drafter import EachRow, GoOn, Offer, Proposal, proposed
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.config import LAST_PASS_WINDOW
from bpkit.types import DraftWork, Feature


class LastPassDrafter:
    """Drafts what passes said after a wrong token. It has no model and no distribution.

    Args:
        window: drafted tokens, where the policy has no other size.
        repeat: a position that no pass has read yet repeats the token so many positions before it (1: the last token;
            the width of an image: the pixel above); 0 leaves it out, so that only passes over the drafts of others
            give it something to draft.
    """

    kind, work = "last-pass", DraftWork("nothing", "none")
    name = "last pass"
    feature_layers: tuple[int, ...] = ()
    provides = frozenset({Feature.DRAFT_TOKENS})
    depends_on_steps = True

    def __init__(self, *, window: int = LAST_PASS_WINDOW, repeat: int = 1) -> None:
        if window < 1 or repeat < 0:
            raise ValueError(f"the last pass needs window >= 1 and repeat >= 0; got {window} and {repeat}")
        self.repeat = repeat
        self.trained_block_size, self.max_block_size = window + 1, max(32, window + 1)

    @classmethod
    def load(cls, path: str, target: Any, **options: int) -> LastPassDrafter:
        """Make one; `path` and `target` are not needed."""
        return cls(**options)

    def begin(self, text: RunningText) -> EachRow:
        return EachRow(text, partial(LastPassSession, self.repeat))


class LastPassSession:
    """What the target said last of each position after a row's text, as far as any pass has read."""

    def __init__(self, repeat: int, text: RowText) -> None:
        self.repeat, self.text = repeat, text
        self.said: list[int] = []
        self.start = text.length
        """Position of the first of them in the text."""

    @property
    def ahead(self) -> list[int]:
        """Those of positions that are not decided yet."""
        return self.said[self.text.length - self.start :]

    def passed(self, chosen: list[int]) -> None:
        # Positions behind those that were read now keep what an earlier pass said.
        self.said, self.start = [*chosen, *self.ahead[len(chosen) :]], self.text.length

    def advance(self, features: Tensor | None) -> None:
        pass

    def offer(self, most: int) -> Offer:
        """Up to `most` tokens; beyond what passes said, repeats."""
        known = self.ahead[:most]
        if self.repeat == 0:
            return Offer(known)
        back = self.repeat if self.repeat <= self.text.length else 1
        tokens = [*self.text.tokens[-back:], *known]
        for _ in range(most - len(known)):
            tokens.append(tokens[-back])
        return Offer(tokens[back:])

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        return proposed(self.offer(block_size - 1))
