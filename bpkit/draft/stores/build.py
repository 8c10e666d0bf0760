"""From texts to the tables of a store: one sort of all suffixes serves both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bpkit.draft.stores.tables import SEPARATOR, TOKEN
from bpkit.progress import NoProgress, Progress

DEPTH = 16
"""Tokens by which suffixes are sorted: matches are shorter, and texts that agree in more stay in their order."""


@dataclass(frozen=True)
class StoreTables:
    """What a store holds; see `NgramTable` and `Corpus` for shapes."""

    ngrams: NDArray[np.uint32]
    counts: NDArray[np.uint32]
    likeliest: NDArray[np.uint32]
    ngram_firsts: NDArray[np.uint32]
    tokens: NDArray[np.uint32]
    suffixes: NDArray[np.uint32]
    suffix_firsts: NDArray[np.uint32]


def make_tables(
    texts: Sequence[Sequence[int]], *, vocab_size: int, n: int, most: int, progress: Progress | None = None
) -> StoreTables:
    """Both tables of texts.

    An n-gram counts once for each text that it is in, so that one text that repeats itself does not fill the table.

    Args:
        texts: token ids of each, below `vocab_size`.
        n: tokens of an n-gram, at most `DEPTH`.
        most: n-grams that are kept, the commonest; of equally common ones those of the lowest ids.
    """
    progress = progress or NoProgress()
    tokens = np.concatenate([np.append(np.asarray(text, dtype=np.uint32), np.uint32(SEPARATOR)) for text in texts])
    suffixes = sorted_suffixes(tokens, progress)
    text_of = np.repeat(np.arange(len(texts)), [len(text) + 1 for text in texts])
    ngrams, counts = count_ngrams(tokens, suffixes, text_of, n)
    kept = np.sort(np.argsort(-counts, kind="stable")[:most])
    ids = np.arange(vocab_size + 1)
    return StoreTables(
        ngrams=ngrams[kept].astype(TOKEN),
        counts=counts[kept].astype(np.uint32),
        likeliest=likeliest_rows(ngrams[kept], counts[kept]).astype(np.uint32),
        ngram_firsts=np.searchsorted(ngrams[kept, 0], ids).astype(np.uint32),
        tokens=tokens.astype(TOKEN),
        suffixes=suffixes.astype(np.uint32),
        suffix_firsts=np.searchsorted(tokens[suffixes], ids).astype(np.uint32),
    )


def sorted_suffixes(tokens: NDArray[np.uint32], progress: Progress | None = None) -> NDArray[np.int64]:
    """Where suffixes begin, in the order of their first `DEPTH` tokens: int64 [length].

    By prefix doubling (Manber & Myers 1993): ranks by the first *k* tokens, two of them side by side, give ranks by the
    first 2 *k*. Takes about 40 bytes of memory for each token.
    """
    progress = progress or NoProgress()
    width, rounds = 1, DEPTH.bit_length() - 1
    progress.start("sorting", rounds + 1)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    progress.tick()
    while width < DEPTH:
        second = np.zeros_like(rank)  # behind the end: before all tokens
        second[:-width] = rank[width:] + 1
        rank = np.unique(rank * (len(rank) + 1) + second, return_inverse=True)[1]
        width *= 2
        progress.tick()
    return np.argsort(rank, kind="stable")


def count_ngrams(
    tokens: NDArray[np.uint32], suffixes: NDArray[np.int64], text_of: NDArray[np.int64], n: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The different n-grams that lie within texts, in order, [rows, n], and the texts that each is in, [rows]."""
    starts = suffixes[suffixes <= len(tokens) - n]
    found = tokens[starts[:, None] + np.arange(n)]
    within = (found != SEPARATOR).all(axis=1)
    starts, found = starts[within], found[within]
    if not len(found):
        return found, np.zeros(0, dtype=np.int64)
    is_new = np.append(True, (found[1:] != found[:-1]).any(axis=1))
    group = np.cumsum(is_new) - 1
    pairs = np.unique(group * (int(text_of[-1]) + 1) + text_of[starts])
    return found[is_new], np.bincount(pairs // (int(text_of[-1]) + 1), minlength=int(group[-1]) + 1)


def likeliest_rows(ngrams: NDArray[np.uint32], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which n-gram goes on best, token after token, from the first tokens of each: [rows, n - 1].

    The next token is the one that most texts have there; of equally common ones that with the lowest id.

    Args:
        ngrams: in order, [rows, n]. counts: texts that each is in, [rows].
    """
    rows, n = ngrams.shape
    found = np.empty((rows, n - 1), dtype=np.int64)
    starts = best = np.arange(rows)  # of groups that begin with the same tokens: where they start, their likeliest row
    for size in range(n - 1, 0, -1):
        if rows:
            begins = ngrams[starts, :size]
            is_new = np.append(True, (begins[1:] != begins[:-1]).any(axis=1))
            heaviest = np.lexsort((-counts, np.cumsum(is_new)))  # each group's parts stay together
            best, starts = best[heaviest[is_new]], starts[is_new]
            counts = np.add.reduceat(counts, np.flatnonzero(is_new))
            found[:, size - 1] = np.repeat(best, np.diff(np.append(starts, rows)))
    return found
