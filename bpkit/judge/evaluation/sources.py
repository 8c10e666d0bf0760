"""Several sources of drafts in an evaluation: what they are called, and how much of the text each one drafted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bpkit.trace.oracle.paths import FixedChoice
from bpkit.trace.records import Taken
from bpkit.types import DecoderSpec

PLAIN = "no draft"
"""Steps in which nothing was drafted, whatever was asked for."""


def source_names(spec: DecoderSpec) -> tuple[str, ...]:
    """What the sources are called, each otherwise: by their drafters, and by their places where these are alike."""
    drafters = [source.drafter for source in spec.sources]
    counts = Counter(drafters)
    return tuple(name if counts[name] == 1 else f"{name} ({place})" for place, name in enumerate(drafters))


def label(names: Sequence[str], choice: FixedChoice) -> str:
    """What a fixed choice is called: its block size, with its source if there are several.

    >>> label(["dflash", "n-gram"], FixedChoice(6, 1)), label(["dflash"], FixedChoice(6))
    ('n-gram:6', '6')
    """
    size = str(choice.block_size)
    return size if len(names) == 1 or choice.block_size == 1 else f"{names[choice.source]}:{size}"


def described(names: Sequence[str], choice: FixedChoice) -> dict[str, Any]:
    """A fixed choice as plain JSON values: its source is named if there are several, and is null for no drafting."""
    if len(names) == 1:
        return {"block_size": choice.block_size}
    return {"source": None if choice.block_size == 1 else names[choice.source], "block_size": choice.block_size}


def called(entry: Mapping[str, Any]) -> str:
    """The label of a fixed choice that was described."""
    return f"{entry['source']}:{entry['block_size']}" if entry.get("source") else str(entry["block_size"])


def shares(names: Sequence[str], taken: Iterable[Taken]) -> dict[str, dict[str, float]]:
    """Shares of steps and of the tokens that they yield, by the source that drafted; they sum to 1."""
    steps, tokens = np.zeros(1 + len(names)), np.zeros(1 + len(names))
    for one in taken:
        place = np.where(one.draft_length > 0, one.source + 1, 0)
        steps += np.bincount(place, minlength=len(steps))
        tokens += np.bincount(place, weights=one.num_accepted + 1, minlength=len(steps))
    parts = {"steps": steps, "tokens": tokens}
    return {
        name: dict(zip((PLAIN, *names), (values / values.sum()).tolist(), strict=True))
        for name, values in parts.items()
    }
