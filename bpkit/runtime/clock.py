"""The decoder's clock: what a step costs, by the wall or by a cost model."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from bpkit.types import CostModel, Seconds


class Clock(Protocol):
    """Turns what was measured into what a step is said to have cost."""

    def now(self) -> float:
        """Seconds, from any origin."""
        ...

    def charge(self, measured: Seconds, *, block_size: int, verify_width: int, context_length: int) -> Seconds:
        """Cost of a step that drafted `block_size` and verified `verify_width` positions, anchor included."""
        ...


class WallClock:
    """Wall-clock seconds. On a GPU each reading waits for the work that was queued before it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def charge(self, measured: Seconds, *, block_size: int, verify_width: int, context_length: int) -> Seconds:
        return measured


class CostClock:
    """Seconds from a cost model, so that a policy that learns from time decides the same on every run."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost

    def now(self) -> float:
        return 0.0

    def charge(self, measured: Seconds, *, block_size: int, verify_width: int, context_length: int) -> Seconds:
        return Seconds(
            draft=self.cost.seconds("draft", block_size, context_length) if block_size > 1 else 0.0,
            verify=self.cost.seconds("verify", verify_width, context_length),
            rest=self.cost.seconds("rest", 1, context_length),
        )


class Watch:
    """Splits time into phases, lap by lap. The time that the consumer of a record takes is nobody's."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.last = clock.now()
        self.spent: dict[str, float] = {}

    def resume(self) -> None:
        """Time that passed since the last lap is not counted."""
        self.last = self.clock.now()

    def lap(self, phase: str) -> None:
        """The time since the last lap went into `phase`."""
        now = self.clock.now()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self.last
        self.last = now

    def take(self) -> Seconds:
        """Everything since the last time this was asked."""
        spent, self.spent = Seconds(**self.spent), {}
        return spent
