"""Several sources of drafts in reports: what they are called, and how much of the text each of them drafted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from bpkit.types import DecoderSpec, Step

PLAIN = "no draft"
"""Steps in which nothing was drafted, whatever was asked for."""

Counts = Mapping[str, tuple[int, int]]
"""Steps, and the tokens that they yield, by source; empty where there is one source only."""


def source_names(spec: DecoderSpec) -> tuple[str, ...]:
    """What the sources are called: by their drafters, and by their places too where these are alike."""
    drafters = [source.drafter for source in spec.sources]
    counts = Counter(drafters)
    return tuple(name if counts[name] == 1 else f"{name} ({place})" for place, name in enumerate(drafters))


def counts_of(names: Sequence[str], source: ArrayLike, draft_length: ArrayLike, num_accepted: ArrayLike) -> Counts:
    """Steps and tokens by source, of the columns of a step record: each [steps]."""
    if len(names) == 1:
        return {}
    place = np.where(np.asarray(draft_length) > 0, np.asarray(source) + 1, 0)
    steps = np.bincount(place, minlength=1 + len(names))
    tokens = np.bincount(place, weights=np.asarray(num_accepted) + 1, minlength=1 + len(names))
    return dict(zip((PLAIN, *names), zip(steps.tolist(), map(int, tokens), strict=True), strict=True))


def counts_of_steps(spec: DecoderSpec, steps: Iterable[Step]) -> Counts:
    """Of live steps, of one row or of many."""
    columns = [
        (source, length, accepted)
        for step in steps
        for source, length, accepted in zip(
            step.source.tolist(), step.draft_length.tolist(), step.num_accepted.tolist(), strict=True
        )
    ]
    return counts_of(source_names(spec), *np.array(columns, np.int64).reshape(-1, 3).T)


def shares(counts: Iterable[Counts]) -> dict[str, dict[str, float]]:
    """Shares of steps and of the tokens that they yield, by source; they sum to 1. Empty where nothing was counted."""
    listed = list(counts)
    if not listed or not listed[0]:
        return {}
    sums = {name: np.sum([one[name] for one in listed], axis=0) for name in listed[0]}
    total = np.maximum(np.sum(list(sums.values()), axis=0), 1)
    return {
        part: {name: float(values[place] / total[place]) for name, values in sums.items()}
        for place, part in enumerate(("steps", "tokens"))
    }


def told(found: Mapping[str, Mapping[str, float]]) -> str:
    """Shares in words: percent of steps / percent of tokens.

    >>> told(shares([{"no draft": (1, 1), "n-gram": (3, 9)}]))
    'no draft 25/10, n-gram 75/90'
    """
    steps, tokens = found["steps"], found["tokens"]
    return ", ".join(f"{name} {100 * steps[name]:.0f}/{100 * tokens[name]:.0f}" for name in steps)
