"""Interleaved runs: every contestant on every prompt, one after the other, in an order shuffled for each prompt."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bpkit.judge.wall_clock.contestants import Contestant, Outcome
from bpkit.prompts import Prompt


class Progress(Protocol):
    """Is told how far a bench has come."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` runs begins."""
        ...

    def tick(self) -> None:
        """A run is done."""
        ...


class NoProgress:
    """Tells nobody."""

    def start(self, phase: str, total: int) -> None: ...

    def tick(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: what one contestant did with one prompt in one repeat."""

    contestant: str
    prompt: str
    domain: str
    repeat: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt ready to run: token ids int64 [1, length], and the number that tells its noise from others'."""

    prompt: Prompt
    ids: Tensor
    stream_id: int


def measure(
    contestants: Sequence[Contestant],
    tasks: Sequence[Task],
    *,
    repeats: int,
    seed: int,
    threads: Mapping[str, int],
    progress: Progress | None = None,
) -> list[Measurement]:
    """Run everything. Each repeat goes through all prompts, so that drift of the machine meets all of them.

    Args:
        seed: of the order of contestants.
        threads: by contestant; those that are missing run with the current number.
    """
    ticker = progress or NoProgress()
    ticker.start("measuring", repeats * len(tasks) * len(contestants))
    rng = random.Random(seed)
    usual, rows = torch.get_num_threads(), []
    try:
        for repeat in range(repeats):
            for task in tasks:
                for contestant in rng.sample(contestants, len(contestants)):
                    use_threads(threads.get(contestant.name, usual))
                    outcome = contestant.run(task.ids, task.stream_id)
                    rows.append(Measurement(contestant.name, task.prompt.id, task.prompt.domain, repeat, outcome))
                    ticker.tick()
    finally:
        use_threads(usual)
    return rows


def use_threads(count: int) -> None:
    """Set torch's number of threads, if it is another."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
