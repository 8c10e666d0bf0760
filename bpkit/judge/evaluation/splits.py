"""Disjoint prompts to train, tune and judge on, the same mix of domains in each; `docs/evaluation.md` says how."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

PARTS = ("train", "validation", "test")
FRACTIONS = (0.4, 0.2, 0.4)
SplitRule = Sequence[float] | Mapping[str, str]
"""Fractions of train, validation and test, or the part of each prompt by its id."""


@dataclass(frozen=True)
class Split:
    """Indices of prompts, ascending; no index is in two parts.

    Attributes:
        seed, fractions: what the split was made from; fractions of train, validation and test, which sum to 1. Of parts
            that were given by name the fractions that they came to.
    """

    seed: int
    fractions: tuple[float, float, float]
    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    def exchanged(self) -> Split:
        """The same split with training and test prompts in each other's place."""
        train, validation, test = self.fractions
        return replace(self, fractions=(test, validation, train), train=self.test, test=self.train)

    def as_json(self, ids: Sequence[str]) -> dict[str, Any]:
        """Plain JSON values; prompts by id."""
        parts = {part: [ids[i] for i in getattr(self, part)] for part in PARTS}
        return {"seed": self.seed, "fractions": dict(zip(PARTS, self.fractions, strict=True)), **parts}


def split_prompts(ids: Sequence[str], domains: Sequence[str], *, seed: int = 0, rule: SplitRule = FRACTIONS) -> Split:
    """Split prompts into train, validation and test, each domain by itself.

    Args:
        ids: of the prompts, all different.
        domains: of the prompts, in the same order.
        rule: fractions of train, validation and test, which sum to 1; within a domain the counts are less than one
            off. Or a part for each id; prompts of another part than these three are in none.

    Raises:
        ValueError: the fractions are no fractions, an id stands twice, or has no part.

    >>> split_prompts(list("abcde"), ["d"] * 5, seed=1, rule=(0.4, 0.2, 0.4)).validation
    (1,)
    """
    if len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if list(ids).count(i) > 1})
        raise ValueError(f"prompts must have ids of their own; these stand more than once: {', '.join(twice[:5])}")
    if isinstance(rule, Mapping):
        return _by_name(ids, rule, seed)
    shares = checked_fractions(rule)
    parts: tuple[list[int], ...] = ([], [], [])
    for domain in dict.fromkeys(domains):
        members = [i for i, other in enumerate(domains) if other == domain]
        members.sort(key=lambda i: hashlib.sha256(f"{seed}\0{ids[i]}".encode()).digest())  # the same on every machine
        start = 0
        for part, count in zip(parts, _counts(len(members), shares), strict=True):
            part.extend(members[start : start + count])
            start += count
    train, validation, test = (tuple(sorted(part)) for part in parts)
    return Split(seed, shares, train, validation, test)


def _by_name(ids: Sequence[str], part_of: Mapping[str, str], seed: int) -> Split:
    unknown = [name for name in ids if name not in part_of]
    if unknown:
        raise ValueError(
            f"{len(unknown)} prompts have no part (train, validation or test), such as {', '.join(unknown[:3])}: give "
            "each a `split` in the file of --split, or give fractions"
        )
    train, validation, test = (tuple(i for i, name in enumerate(ids) if part_of[name] == part) for part in PARTS)
    sizes = [len(train), len(validation), len(test)]
    shares = tuple(size / max(1, sum(sizes)) for size in sizes)
    return Split(seed, (shares[0], shares[1], shares[2]), train, validation, test)


def checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """The three fractions, if they are some. Raises ValueError."""
    if len(fractions) != 3 or any(not 0 <= f <= 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        shown = ",".join(f"{f:g}" for f in fractions)
        raise ValueError(
            f"a split is three fractions that sum to 1, train, validation and test, such as 0.4,0.2,0.4; got {shown}"
        )
    train, validation, test = fractions
    return train, validation, test


def _counts(count: int, fractions: tuple[float, float, float]) -> list[int]:
    """Whole numbers that sum to `count`, as near to the fractions as can be: the largest remainders are rounded up."""
    exact = [count * fraction for fraction in fractions]
    # A product such as 10 * 0.3 may lie just below the whole number that it is.
    counts = [math.floor(value + 1e-9) for value in exact]
    # Of equal claims the later part's first: without a test prompt there is no result, without training there is.
    claims = sorted((2, 1, 0), key=lambda part: -round(exact[part] - counts[part], 9))
    for part in claims[: count - sum(counts)]:
        counts[part] += 1
    return counts
