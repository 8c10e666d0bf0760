"""Look-ups in the tables of a store: the target's commonest n-grams, and a corpus by its suffixes.

Token ids lie in the files as four bytes, the highest first. Then comparing bytes compares sequences of ids, and
bisection needs neither copies nor numpy's calls: a look-up takes microseconds, and reads little of a mapped file.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import pack, unpack

import numpy as np
from numpy.typing import NDArray

from bpkit.decode.drafter import Offer
from bpkit.draft.stores.trees import COUNTED, Branch, Continuations, Counted

TOKEN = np.dtype(">u4")
"""How a token id lies in a file."""
BYTES = TOKEN.itemsize
SEPARATOR = 2**32 - 1
"""Stands between the texts of a corpus: the token id that no vocabulary has."""


def as_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as they lie in files."""
    return pack(f">{len(tokens)}I", *tokens)


def as_tokens(data: memoryview) -> list[int]:
    """Token ids from how they lie in files."""
    return list(unpack(f">{len(data) // BYTES}I", data))


class Sorted:
    """Rows in the order of their bytes, found by what they begin with.

    Args:
        read: the first bytes of a row, so many.
        firsts: for each token id the first row that begins with it or a higher one, and at last the number of rows.
    """

    def __init__(self, read: Callable[[int, int], bytes], firsts: NDArray[np.uint32]) -> None:
        self._read, self._firsts = read, firsts.data

    def find(self, wanted: bytes) -> range:
        """The rows that begin with `wanted`, which are one after the other."""
        first = int.from_bytes(wanted[:BYTES])
        if first >= len(self._firsts) - 1:
            return range(0)
        start, end = self._firsts[first], self._firsts[first + 1]
        size, read = len(wanted), self._read
        if size == BYTES or start == end:
            return range(start, end)
        start = bisect_left(range(end), wanted, lo=start, key=lambda row: read(row, size))
        if start == end or read(start, size) != wanted:
            return range(0)
        return range(start, bisect_right(range(end), wanted, lo=start, key=lambda row: read(row, size)))


class NgramTable:
    """N-grams in the order of their tokens.

    Args:
        ngrams: [rows, n], in the dtype `TOKEN`.
        likeliest: for the first 1, 2, ... n - 1 tokens of each the row that goes on best from them, [rows, n - 1].
        firsts: [vocabulary + 1], as in `Sorted`.
        counts: texts that each was in, [rows]; trees need them.
    """

    def __init__(
        self,
        ngrams: NDArray[np.uint32],
        likeliest: NDArray[np.uint32],
        firsts: NDArray[np.uint32],
        counts: NDArray[np.uint32] | None = None,
    ) -> None:
        self.ngrams, self.counts = ngrams, counts
        self.n = ngrams.shape[1]
        self._step = step = self.n * BYTES
        self._data = data = ngrams.reshape(-1).view(np.uint8).data
        self._likeliest = likeliest.reshape(-1).data
        self._rows = Sorted(lambda row, size: bytes(data[row * step : row * step + size]), firsts)

    def find(self, tail: Sequence[int]) -> Offer:
        """What mostly follows as much of the end of `tail` as an n-gram begins with.

        Returns:
            the rest of that n-gram; the match is how many tokens of the tail it begins with.
        """
        found, match = self._longest(tail)
        if not match:
            return Offer([])
        begin = self._likeliest[found.start * (self.n - 1) + match - 1] * self._step
        return Offer(as_tokens(self._data[begin + match * BYTES : begin + self._step]), match)

    def find_all(self, tail: Sequence[int]) -> Counted:
        """The same of all n-grams that begin so, as the place of a tree. Where there are `counts` only."""
        found, match = self._longest(tail)
        return Counted.at(NgramRows(self, found, match), match)

    def _longest(self, tail: Sequence[int]) -> tuple[range, int]:
        """The n-grams that begin with the longest end of `tail` that any begins with, and its length."""
        wanted = as_bytes(tail[-(self.n - 1) :])
        while wanted:
            if found := self._rows.find(wanted):
                return found, len(wanted) // BYTES
            wanted = wanted[BYTES:]
        return range(0), 0


@dataclass(frozen=True, slots=True)
class NgramRows:
    """N-grams of a table that begin with the same tokens, so many. Each counts once for each text that it was in."""

    table: NgramTable
    rows: range
    size: int

    def children(self, most: int) -> list[Branch]:
        table, rows = self.table, slice(self.rows.start, self.rows.stop)
        if self.size == table.n or not self.rows:
            return []
        assert table.counts is not None
        tokens = table.ngrams[rows, self.size]
        starts = np.append(True, tokens[1:] != tokens[:-1]).nonzero()[0]
        counts = np.add.reduceat(table.counts[rows].astype(np.int64), starts)
        ends, all_and_one = [*starts[1:].tolist(), len(tokens)], 1 + int(counts.sum())
        found = []
        for place in np.argsort(-counts, kind="stable")[:most].tolist():
            below = NgramRows(table, self.rows[int(starts[place]) : ends[place]], self.size + 1)
            chance = int(counts[place]) / all_and_one
            found.append(Branch(int(tokens[starts[place]]), chance, chance, below))
        return found


class Corpus:
    """Texts one after the other, and where each of their suffixes begins, in the order of their tokens.

    Args:
        tokens: [length], in the dtype `TOKEN`, with `SEPARATOR` between texts.
        suffixes: [length], sorted by at least as many tokens as are looked up.
        firsts: [vocabulary + 1], of the suffixes, as in `Sorted`.
    """

    def __init__(self, tokens: NDArray[np.uint32], suffixes: NDArray[np.uint32], firsts: NDArray[np.uint32]) -> None:
        self._data = data = tokens.view(np.uint8).data
        self._starts = starts = suffixes.data
        self._rows = Sorted(lambda row, size: bytes(data[(at := starts[row] * BYTES) : at + size]), firsts)
        self._vocabulary = len(firsts) - 1

    def find(self, tail: Sequence[int], sizes: range, most: int) -> Offer:
        """What the longest match of the end of `tail` was followed by, most often.

        Args:
            sizes: lengths of a match, the longest first.

        Returns:
            at most `most` tokens.
        """
        found, size = self._longest(tail, sizes)
        return self._vote(self._texts(found, size, most), size, most) if size else Offer([])

    def find_all(self, tail: Sequence[int], sizes: range, most: int) -> Counted:
        """The same of all that followed it, as the place of a tree."""
        found, size = self._longest(tail, sizes)
        texts = self._texts(found, size, most) if size else []
        return Counted.at(Continuations(texts, vocabulary=self._vocabulary), size)

    def _longest(self, tail: Sequence[int], sizes: range) -> tuple[range, int]:
        """The suffixes that begin with the longest match, and its length; 0 if there is none."""
        wanted = as_bytes(tail[-sizes[0] :])
        possible = [size for size in reversed(sizes) if size * BYTES <= len(wanted)]
        matches: dict[int, range] = {}

        def fails(size: int) -> bool:
            matches[size] = self._rows.find(wanted[-size * BYTES :])
            return not matches[size]

        # What ends a long match is a shorter one, so the longest is bisected for.
        place = bisect_left(possible, True, key=fails)
        if place == 0:
            return range(0), 0
        size = possible[place - 1]
        return matches[size], size

    def _texts(self, found: range, size: int, most: int) -> list[list[int]]:
        """What comes after so many tokens of suffixes, `most` tokens of each."""
        step = -(-len(found) // COUNTED)
        begins = [(self._starts[row] + size) * BYTES for row in found[::step]]
        return [as_tokens(self._data[at : at + most * BYTES]) for at in begins]

    def _vote(self, left: list[list[int]], size: int, most: int) -> Offer:
        """Token after token what most occurrences go on with, of those that agreed so far.

        It ends before an id that the vocabulary lacks, which is a separator or a fault in the file.
        """
        chosen: list[int] = []
        all_of_them, agreeing = len(left), 0
        while len(chosen) < most:
            place = len(chosen)
            votes = Counter(text[place] if place < len(text) else SEPARATOR for text in left)
            token = votes.most_common(1)[0][0]
            if token >= self._vocabulary:
                break
            chosen.append(token)
            left = [text for text in left if place < len(text) and text[place] == token]
            agreeing = agreeing or len(left)
        return Offer(chosen, size, agreeing / (all_of_them + 1))
