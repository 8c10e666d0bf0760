"""The best number of threads of each kind of contestant, found by a short interleaved run.

Plain decoding, a policy and a peer may each be fastest at another count; judging all at one count would favour some.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from bpkit.bench.contestants import Contestant
from bpkit.bench.measure import NoProgress, Progress, Task, use_threads

ThreadTable = dict[str, dict[int, float]]
"""contestant -> thread count -> tokens per second."""


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def candidate_counts(cores: int) -> list[int]:
    """Thread counts worth trying: all up to 4, then powers of two, and all cores."""
    return sorted({n for n in (1, 2, 3, 4, *(2**k for k in range(3, 12)), cores) if n <= cores})


def try_thread_counts(
    contestants: Sequence[Contestant], tasks: Sequence[Task], counts: Sequence[int], progress: Progress | None = None
) -> ThreadTable:
    """Tokens per second of each contestant at each count, over all tasks. A first run at each count is not timed."""
    ticker = progress or NoProgress()
    ticker.start("trying thread counts", len(counts) * len(contestants) * (len(tasks) + 1))
    tokens: dict[tuple[str, int], int] = defaultdict(int)
    seconds: dict[tuple[str, int], float] = defaultdict(float)
    usual = torch.get_num_threads()
    try:
        for i, task in enumerate([tasks[0], *tasks]):
            for count in counts:
                use_threads(count)
                for contestant in contestants:
                    outcome = contestant.run(task.ids, task.stream_id)
                    if i > 0:
                        tokens[contestant.name, count] += len(outcome.tokens)
                        seconds[contestant.name, count] += outcome.seconds
                    ticker.tick()
    finally:
        use_threads(usual)
    return {c.name: {n: tokens[c.name, n] / seconds[c.name, n] for n in counts} for c in contestants}


def best_counts(table: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """The count with the most tokens per second; of equals, the smallest."""
    return {name: max(sorted(rates), key=lambda n: rates[n]) for name, rates in table.items()}
