"""The best number of threads of each kind of contestant, found by a short interleaved run.

Plain decoding, a policy and a peer may each be fastest at another count; judging all at one count would favour some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bpkit.judge.wall_clock.contestants import Contestant, Outcome
from bpkit.judge.wall_clock.measure import NoProgress, Progress, Task, use_threads

HOPELESS = 1 / 3

ThreadTable = dict[str, dict[int, float]]
"""contestant -> thread count -> tokens per second."""


@dataclass
class Sums:
    """Tokens and wall-clock seconds so far."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.tokens += len(outcome.tokens)
        self.seconds += outcome.seconds

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def candidate_counts(cores: int) -> list[int]:
    """Thread counts worth trying: all up to 4, then powers of two, and all cores."""
    return sorted({n for n in (1, 2, 3, 4, *(2**k for k in range(3, 12)), cores) if n <= cores})


def try_thread_counts(
    contestants: Sequence[Contestant], tasks: Sequence[Task], counts: Sequence[int], progress: Progress | None = None
) -> ThreadTable:
    """Tokens per second of each contestant at each count that was not dropped.

    A first round is not counted. On a busy machine two threads can be fifty times slower than one, and there is no
    point in waiting for them again: a count that falls below a third of the best is dropped.
    """
    ticker = progress or NoProgress()
    ticker.start("trying thread counts", len(contestants) * (len(tasks) + 1))
    left = {c.name: {count: Sums() for count in counts} for c in contestants}
    usual = torch.get_num_threads()
    try:
        for round_, task in enumerate([tasks[0], *tasks]):
            for contestant in contestants:
                sums = left[contestant.name]
                for count in sums:
                    use_threads(count)
                    sums[count].add(contestant.run(task.ids, task.stream_id))
                best = max(s.rate for s in sums.values())
                kept = {count: s for count, s in sums.items() if s.rate > HOPELESS * best}
                left[contestant.name] = {count: Sums() for count in kept} if round_ == 0 else kept
                ticker.tick()
    finally:
        use_threads(usual)
    return {name: {count: s.rate for count, s in sums.items()} for name, sums in left.items()}


def best_counts(table: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """The count with the most tokens per second; of equals, the smallest."""
    return {name: max(sorted(rates), key=lambda n: rates[n]) for name, rates in table.items()}
