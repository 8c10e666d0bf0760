"""The decoder's clock: what a step costs, by the wall or by a cost model."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from bpkit.types import CostModel, Seconds, Work


class Clock(Protocol):
    """Turns what was measured into what a step is said to have cost."""

    def now(self) -> float:
        """Seconds, from any origin."""
        ...

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        """Cost of a step that did `work`, or of prefill (None)."""
        ...


class WallClock:
    """Wall-clock seconds. On a GPU each reading waits for the work that was queued before it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        return measured


class CostClock:
    """Seconds from a cost model, so that a policy that learns from time decides the same on every run.

    Prefill costs nothing: no policy can change it. A policy's own time depends on the machine's mood, so that no step
    is charged for it. It is measured all the same:

    Attributes:
        policy_seconds: measured decision time of every step (of `begin`, for prefill) since the list was last cleared.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.policy_seconds: list[float] = []

    def now(self) -> float:
        return time.perf_counter()

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        self.policy_seconds.append(measured.policy)
        return Seconds() if work is None else price(self.cost, work)


def price(cost: CostModel, work: Work) -> Seconds:
    """What a cost model says of a step, decision time left out."""
    at = work.context_length
    draft = 0.0
    if work.draft_size > 1:
        draft = cost.seconds("draft", work.draft_size, at) + cost.seconds("catch_up", work.waiting, at)
        if work.features:
            draft += cost.seconds("features", work.draft_size, at)
    return Seconds(draft=draft, verify=cost.seconds("verify", work.verify_width, at), rest=cost.seconds("rest", 1, at))


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
