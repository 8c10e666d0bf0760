"""Loads that a simulated server is put under: how many requests it may run at once, and when they arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Load(Protocol):
    """When requests come, by their number from 0 in the order of arrival."""

    def most(self, begun: int, now: float = math.inf) -> int:
        """Rows that may run at once, after so many requests began and so many seconds."""
        ...

    def arrival(self, number: int) -> float:
        """Seconds at which a request arrives; 0 of a closed loop, whose requests come when there is room for them."""
        ...


@dataclass(frozen=True)
class ClosedLoop:
    """So many clients, each of which sends its next request when its last one ended.

    Attributes:
        concurrency: rows that run, as long as requests are left.
        spread: seconds over which the clients begin, one after the other. Rows that begin at once, with outputs of one
            length, would end at once, so that their successors' prompts were read together: no server can count on it.
    """

    concurrency: int
    spread: float = 0.0

    def most(self, begun: int, now: float = math.inf) -> int:
        if now >= self.spread:
            return self.concurrency
        return 1 + int(now / self.spread * (self.concurrency - 1))

    def arrival(self, number: int) -> float:
        return 0.0


@dataclass(frozen=True)
class ChangingLoad:
    """A closed loop whose concurrency changes: a level of so many rows for `requests_per_row` times as many requests.

    Rows that run when a level ends run on to their ends.
    """

    levels: tuple[int, ...]
    requests_per_row: int = 2

    @property
    def requests(self) -> int:
        """Requests of all levels."""
        return sum(self.levels) * self.requests_per_row

    def most(self, begun: int, now: float = math.inf) -> int:
        for level in self.levels:
            if begun < level * self.requests_per_row:
                return level
            begun -= level * self.requests_per_row
        return self.levels[-1]

    def arrival(self, number: int) -> float:
        return 0.0


class PoissonLoad:
    """Requests that arrive by themselves: independent, `rate` a second, of whom up to `max_rows` run at once.

    Args:
        count: requests. seed: of the times between them.
    """

    def __init__(self, rate: float, count: int, *, max_rows: int, seed: int = 0) -> None:
        self.rate, self.max_rows, self.seed = rate, max_rows, seed
        gaps = np.random.default_rng(seed).exponential(1 / rate, count)
        self.times: Sequence[float] = np.cumsum(gaps).tolist()

    def most(self, begun: int, now: float = math.inf) -> int:
        return self.max_rows

    def arrival(self, number: int) -> float:
        return self.times[number]
