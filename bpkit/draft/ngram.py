"""Prompt-lookup drafting: propose what followed earlier occurrences of the latest n-gram.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding, as also in transformers' `prompt_lookup_num_tokens`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from bpkit.decode.drafter import EachRow, GoOn, Offer, Proposal, proposed
from bpkit.decode.sampling import Draw
from bpkit.decode.text import RowText, RunningText
from bpkit.decode.trees import TreeShape
from bpkit.draft.config import NGRAM_BLOCK_SIZE
from bpkit.draft.stores.trees import COUNTED, Continuations, ContinuationTree
from bpkit.types import NGRAM, Feature, work_of


class NgramDrafter:
    """Copies from prompt and output. It has no model and no distribution, and may propose fewer tokens than asked.

    What followed the last occurrence is drafted. With `branches` it is the trie of what followed the last 32: the
    `block_size - 1` nodes with the highest products of chances, at most `trained_block_size - 1` deep. A child's chance
    is the number of occurrences that go on with it after the node's path, over the number of all that go on and one;
    the latest of them counts twice. An offer is the best path: of each node the first child.

    Args:
        max_ngram: longest n-gram looked up; shorter ones down to `min_ngram` follow if it is not found.
        branches: most children of a node.
    """

    kind, work = NGRAM, work_of(NGRAM)
    name = "n-gram"
    feature_layers: tuple[int, ...] = ()
    provides = frozenset({Feature.DRAFT_TOKENS})

    def __init__(
        self, *, max_ngram: int = 3, min_ngram: int = 1, block_size: int = NGRAM_BLOCK_SIZE, branches: int = 1
    ) -> None:
        if branches < 1:
            raise ValueError(f"branches must be 1 or more; got {branches}")
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"n-gram sizes need 1 <= min_ngram <= max_ngram; got {min_ngram} and {max_ngram}")
        self.sizes = range(max_ngram, min_ngram - 1, -1)
        self.branches = branches
        self.trained_block_size, self.max_block_size = block_size, max(32, max(2, branches) * block_size)

    @classmethod
    def load(cls, path: str, target: Any, **options: int) -> NgramDrafter:
        """Make one; `path` and `target` are not needed."""
        return cls(**options)

    def begin(self, text: RunningText) -> EachRow:
        return EachRow(text, partial(NgramSession, self))


class NgramSession:
    """For each n-gram of a row's text where its last occurrences end. The one at the very end is left out."""

    def __init__(self, drafter: NgramDrafter, text: RowText) -> None:
        self.sizes, self.branches, self.tokens = drafter.sizes, drafter.branches, text.tokens
        self.deepest = drafter.trained_block_size - 1
        self.kept = 1 if self.branches == 1 else COUNTED
        self.grown: ContinuationTree | None = None
        self.indexed = 1
        """Up to where n-grams may end that are in `ends`."""
        self.ends: dict[tuple[int, ...], list[int]] = {}

    def advance(self, features: Tensor | None) -> None:
        # Index n-grams that have a successor by now: those that end before the last token.
        for end in range(self.indexed, len(self.tokens)):
            for size in self.sizes:
                if size <= end:
                    ends = self.ends.setdefault(tuple(self.tokens[end - size : end]), [])
                    ends.append(end)
                    del ends[: -self.kept]
        self.indexed, self.grown = len(self.tokens), None

    def tree(self) -> ContinuationTree:
        """What followed, of which the latest comes first."""
        if self.grown is None:
            ends, size = self.find()
            texts = [self.tokens[end : end + self.deepest] for end in reversed(ends)]
            root = Continuations(texts, latest_first=True)
            self.grown = ContinuationTree(root, size, self.deepest, self.branches)
        return self.grown

    def find(self) -> tuple[list[int], int]:
        """Where the longest n-gram at the end of the text that was there before ended, and its length."""
        for size in self.sizes:
            ends = self.ends.get(tuple(self.tokens[-size:])) if size <= len(self.tokens) else None
            if ends:
                return ends, size
        return [], 0

    def offer(self, most: int) -> Offer:
        if self.branches > 1:
            return self.tree().offer(most)
        ends, size = self.find()
        return Offer(self.tokens[ends[-1] : ends[-1] + most], size) if ends else Offer([])

    def draft(self, block_size: int, draw: Draw, go_on: GoOn | None, shape: TreeShape | None = None) -> Proposal:
        if self.branches > 1:
            return self.tree().proposal(shape or block_size - 1)
        return proposed(self.offer(block_size - 1))
