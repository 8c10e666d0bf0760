"""Threads of torch, and how many are best for a decoder, found by a short interleaved run.

Plain decoding, a policy and a peer may each be fastest at another count, and judging all at one would favour some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from bpkit.progress import NoProgress, Progress

HOPELESS = 1 / 3
"""A thread count with less than this part of the best rate is not tried again."""

Task = TypeVar("Task")
Rated = tuple[int, float]
"""Tokens and seconds of a run."""
ThreadTable = dict[str, dict[int, float]]
"""decoder -> thread count -> tokens per second."""


def use_threads(count: int) -> None:
    """Set torch's number of threads, if it is another."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@contextmanager
def threads_restored() -> Iterator[int]:
    """Torch's number of threads, as it was and, afterwards, is again."""
    usual = torch.get_num_threads()
    try:
        yield usual
    finally:
        use_threads(usual)


def candidate_counts(cores: int) -> list[int]:
    """Thread counts worth trying: all up to 4, then powers of two, and all cores."""
    return sorted({n for n in (1, 2, 3, 4, *(2**k for k in range(3, 12)), cores) if n <= cores})


def try_thread_counts(
    decoders: Mapping[str, Callable[[Task], Rated]],
    tasks: Sequence[Task],
    counts: Sequence[int],
    progress: Progress | None = None,
) -> ThreadTable:
    """Tokens per second of each decoder at each count that was not dropped.

    A first round is not counted. On a busy machine two threads can be fifty times slower than one, and there is no
    point in waiting for them again: a count that falls below a third of the best is dropped.
    """
    ticker = progress or NoProgress()
    ticker.start("trying thread counts", len(decoders) * (len(tasks) + 1))
    left: dict[str, dict[int, list[Rated]]] = {name: {count: [] for count in counts} for name in decoders}
    with threads_restored():
        for number, task in enumerate([tasks[0], *tasks]):
            for name, run in decoders.items():
                tried = left[name]
                for count, outcomes in tried.items():
                    use_threads(count)
                    outcomes.append(run(task))
                rates = {count: _rate(outcomes) for count, outcomes in tried.items()}
                left[name] = {
                    count: outcomes if number else []
                    for count, outcomes in tried.items()
                    if rates[count] > HOPELESS * max(rates.values())
                }
                ticker.tick()
    return {name: {count: _rate(outcomes) for count, outcomes in tried.items()} for name, tried in left.items()}


def _rate(outcomes: Sequence[Rated]) -> float:
    """Tokens per second: a ratio of sums."""
    seconds = sum(spent for _, spent in outcomes)
    return sum(tokens for tokens, _ in outcomes) / seconds if seconds else 0.0


def best_counts(table: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """The count with the most tokens per second; of equals, the smallest."""
    return {name: max(sorted(rates), key=lambda n: rates[n]) for name, rates in table.items()}
