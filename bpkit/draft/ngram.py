"""Prompt-lookup drafting: propose what followed the last occurrence of the latest n-gram.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding, as also in transformers' `prompt_lookup_num_tokens`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from bpkit.decode.drafter import EachRow, GoOn, Offer, Proposal, proposed
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RowText, RunningText
from bpkit.draft.config import NGRAM_BLOCK_SIZE
from bpkit.types import NGRAM, Feature, work_of


class NgramDrafter:
    """Copies from prompt and output. It has no model and no distribution, and may propose fewer tokens than asked.

    Args:
        max_ngram: longest n-gram looked up; shorter ones down to `min_ngram` follow if it is not found.
    """

    kind, work = NGRAM, work_of(NGRAM)
    name = "n-gram"
    feature_layers: tuple[int, ...] = ()
    provides = frozenset({Feature.DRAFT_TOKENS})

    def __init__(self, *, max_ngram: int = 3, min_ngram: int = 1, block_size: int = NGRAM_BLOCK_SIZE) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"n-gram sizes need 1 <= min_ngram <= max_ngram; got {min_ngram} and {max_ngram}")
        self.sizes = range(max_ngram, min_ngram - 1, -1)
        self.trained_block_size, self.max_block_size = block_size, max(32, 2 * block_size)

    @classmethod
    def load(cls, path: str, target: Any, **options: int) -> NgramDrafter:
        """Make one; `path` and `target` are not needed."""
        return cls(**options)

    def begin(self, text: RunningText) -> EachRow:
        return EachRow(text, partial(NgramSession, self.sizes))


class NgramSession:
    """For each n-gram of a row's text where its last occurrence ends. The one at the very end is left out."""

    def __init__(self, sizes: range, text: RowText) -> None:
        self.sizes, self.tokens = sizes, text.tokens
        self.indexed = 1
        """Up to where n-grams may end that are in `ends`."""
        self.ends: dict[tuple[int, ...], int] = {}

    def advance(self, features: Tensor | None) -> None:
        # Index n-grams that have a successor by now: those that end before the last token.
        for end in range(self.indexed, len(self.tokens)):
            for size in self.sizes:
                if size <= end:
                    self.ends[tuple(self.tokens[end - size : end])] = end
        self.indexed = len(self.tokens)

    def offer(self, most: int) -> Offer:
        for size in self.sizes:
            end = self.ends.get(tuple(self.tokens[-size:])) if size <= len(self.tokens) else None
            if end is not None:
                return Offer(self.tokens[end : end + most], size)
        return Offer([])

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None) -> Proposal:
        return proposed(self.offer(block_size - 1))
