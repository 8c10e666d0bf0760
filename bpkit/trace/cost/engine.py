"""What an engine's plug-in is asked to measure: the steps of the engine itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bpkit.prompts import Prompt
from bpkit.trace.cost.named import NamedCost

CONCURRENCY = (1, 2, 4, 8, 16, 32)
"""Requests at a time that are measured by default."""


@dataclass(frozen=True)
class EngineSettings:
    """What to measure, and how long.

    Attributes:
        target, drafter: folders or names of models, as the engine loads them; None for its plug-in's default.
        arguments: of the engine, in its own words; they win over all else.
        concurrency: requests that run at once, each number for the same share of the steps.
        max_block_size: the largest; None for the drafter's own.
        options: of generation: `max_new_tokens`, `temperature` and the like.
        max_minutes: at most, without loading; the run in hand is finished.
        seed: of prompts' order and of the lengths that are drawn.
        command: to keep in the file.
    """

    target: str | None = None
    drafter: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    concurrency: tuple[int, ...] = CONCURRENCY
    max_block_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_minutes: float = 10.0
    seed: int = 0
    command: str | None = None


class CalibratesEngine(Protocol):
    """What `bpkit_register_engines` registers."""

    def __call__(
        self, prompts: Sequence[Prompt], settings: EngineSettings, progress: Callable[[str, int, int], None]
    ) -> NamedCost:
        """Serve the prompts with the engine, and say what its steps cost.

        Args:
            progress: is told what is going on, what is done of it, and what is all of it.

        Raises:
            ValueError: the engine is not installed, or cannot be started so; or too little could be measured.
        """
        ...
