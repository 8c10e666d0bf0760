"""The context store: what followed each n-gram of a text, the latest last."""

from __future__ import annotations

from collections.abc import Sequence

from bpkit.decode.drafter import Offer
from bpkit.draft.stores.trees import Continuations, Counted

Ngram = tuple[int, ...]


class ContextStore:
    """Continuations by the n-gram that they followed: a short list for each, of which the least recent goes first.

    Args:
        span: tokens of a continuation.
        candidates: continuations that are kept for each n-gram.
        max_entries: continuations that are kept in all; beyond them the n-gram that was met least recently goes.
    """

    def __init__(self, span: int, candidates: int, max_entries: int) -> None:
        self.span, self.candidates, self.max_entries = span, candidates, max_entries
        self.entries = 0
        # Dicts keep the order in which keys were put in, and find and remove them fast: lists that are sorted by use.
        self._lists: dict[Ngram, dict[Ngram, None]] = {}

    def add(self, ngram: Ngram, continuation: Ngram) -> None:
        """Note that an n-gram was followed by these tokens, just now."""
        kept = self._lists.pop(ngram, {})
        self._lists[ngram] = kept
        before = len(kept)
        kept.pop(continuation, None)
        kept[continuation] = None
        if len(kept) > self.candidates:
            del kept[next(iter(kept))]
        self.entries += len(kept) - before
        while self.entries > self.max_entries:
            self.entries -= len(self._lists.pop(next(iter(self._lists))))

    def find(self, ngram: Ngram) -> list[Ngram]:
        """What followed an n-gram, the latest first."""
        return list(reversed(self._lists.get(ngram, {})))


class TextIndex:
    """A row's running text in a context store.

    What it offers is a function of the text alone, not of the steps in which it came.

    Args:
        store: of this row, or shared with others.
        sizes: lengths of the n-grams that are looked up, the longest first.
    """

    def __init__(self, store: ContextStore, sizes: Sequence[int], tokens: list[int]) -> None:
        self.store, self.sizes, self.tokens = store, sizes, tokens
        self.indexed = 1
        """Up to where n-grams may end whose continuations are whole, and in the store."""

    def advance(self) -> None:
        """Take in what the text has grown by."""
        tokens, span = self.tokens, self.store.span
        whole = len(tokens) - span + 1
        for end in range(self.indexed, whole):
            continuation = tuple(tokens[end : end + span])
            for size in self.sizes:
                if size <= end:
                    self.store.add(tuple(tokens[end - size : end]), continuation)
        self.indexed = max(self.indexed, whole)

    def find(self, tail: list[int]) -> Offer:
        """What followed the longest n-gram at the end of `tail`, the latest time; its share is of what is kept."""
        found, size = self._longest(tail)
        if not found:
            return Offer([])
        agreeing = sum(other[0] == found[0][0] for other in found)
        return Offer(list(found[0]), size, agreeing / (len(found) + 1))

    def find_all(self, tail: list[int]) -> Counted:
        """All that is kept of what followed it, as the place of a tree. What came several times is kept once."""
        found, size = self._longest(tail)
        return Counted.at(Continuations(found, latest_first=True), size)

    def _longest(self, tail: list[int]) -> tuple[list[Sequence[int]], int]:
        """What followed the longest n-gram at the end of `tail`, the latest first, and the length of that."""
        for size in self.sizes:
            if size > len(tail):
                continue
            ngram = tail[-size:]
            found: list[Sequence[int]] = [*self.store.find(tuple(ngram))]
            # The newest n-grams, whose continuations are still growing, are not in the store yet.
            for end in range(self.indexed, len(self.tokens)):
                if end >= size and self.tokens[end - size : end] == ngram:
                    found.insert(0, self.tokens[end:])
            if found:
                return found, size
        return [], 0
