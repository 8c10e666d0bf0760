"""Where in the output the oracle's choices lie, and how often they differ from the best fixed size's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.trace.oracle import Path
from bpkit.trace.records import PromptTrace

Ints = NDArray[np.int32]
STRETCHES = 8
"""Stretches of the output that are told apart, at most."""


@dataclass
class Choices:
    """Steps of the oracle over many prompts.

    Attributes:
        best_fixed: the block size to compare with.
    """

    best_fixed: int
    _position: list[Ints] = field(default_factory=list)
    _block_size: list[Ints] = field(default_factory=list)
    _verify_length: list[Ints] = field(default_factory=list)
    _usual_verify: list[Ints] = field(default_factory=list)

    def add(self, prompt: PromptTrace, path: Path) -> None:
        """The steps of one prompt."""
        usual = np.zeros(path.steps, np.int64)
        if self.best_fixed > 1:
            drafted = prompt.drafts.draft_length[path.position - 1, prompt.drafts.column(self.best_fixed)]
            usual = np.minimum(drafted, prompt.most_verified(0) - path.position)
        self._position.append(path.position)
        self._block_size.append(path.block_size)
        self._verify_length.append(path.verify_length)
        self._usual_verify.append(usual.astype(np.int32))

    def as_json(self) -> dict[str, Any]:
        """Histograms of all steps, and of those in each stretch of the output; `differs` are shares of steps.

        `block_size` and `verify_length` map a value to its number of steps. A stretch counts output tokens decided
        before the step, from `start` up to but without `end`.
        """
        position = np.concatenate(self._position)
        columns = [np.concatenate(c) for c in (self._block_size, self._verify_length, self._usual_verify)]
        width = stretch_width(int(position.max()))
        stretches = []
        for start in range(0, int(position.max()) + 1, width):
            inside = (position >= start) & (position < start + width)
            if inside.any():
                stretches.append(
                    {"start": start, "end": start + width, **self._describe(*(c[inside] for c in columns))}
                )
        return {"best_fixed": self.best_fixed, **self._describe(*columns), "positions": stretches}

    def _describe(self, block_size: Ints, verify_length: Ints, usual_verify: Ints) -> dict[str, Any]:
        other_size, other_length = block_size != self.best_fixed, verify_length != usual_verify
        return {
            "steps": len(block_size),
            "differs": {
                "block_size": float(other_size.mean()),
                "verify_length": float(other_length.mean()),
                "either": float((other_size | other_length).mean()),
            },
            "block_size": _histogram(block_size),
            "verify_length": _histogram(verify_length),
        }


def stretch_width(last: int) -> int:
    """Width of stretches, a power of two, so that positions 0 .. `last` need no more than `STRETCHES`.

    >>> stretch_width(127), stretch_width(128), stretch_width(5)
    (16, 32, 1)
    """
    width = 1
    while width * STRETCHES <= last:
        width *= 2
    return width


def _histogram(values: Ints) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items())}
