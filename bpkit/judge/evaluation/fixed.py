"""Fixed choices of source and block size in an evaluation: what they are called, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpkit.trace.oracle.paths import FixedChoice


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
