"""The decoder's clock: what a step costs, by the wall or by a cost model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Protocol

import torch

from bpkit.decode.reread import commits
from bpkit.types import CostModel, Seconds, Work, of_source


class Clock(Protocol):
    """Turns what was measured into what a step is said to have cost."""

    def now(self) -> float:
        """Seconds, from any origin."""
        ...

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        """Cost of a step that did `work`, or of prefill (None)."""
        ...


class WallClock:
    """Wall-clock seconds.

    A step ends with a read of the device, so its total is right without waiting. Its parts are then the time of the
    host: what the device still works on is counted where the host next reads.

    Args:
        device: of the decoder. other: of its drafter, where that is another.
        wait: let each reading wait for the work that was queued on the device before it, so that the parts of a step
            are right as well. It slows decoding down; measurements of parts ask for it.
    """

    def __init__(self, device: torch.device, other: torch.device | None = None, *, wait: bool = False) -> None:
        self.device, self.other = device, other
        self.devices = [each for each in (device, other) if each is not None and each.type != "cpu"]
        self.waits = wait and bool(self.devices)

    def waiting(self) -> WallClock:
        """The clock of the same device that waits for it."""
        return WallClock(self.device, self.other, wait=True)

    @property
    def tells_parts(self) -> bool:
        """Whether the parts of a step are the time of the device."""
        return self.waits or not self.devices

    def now(self) -> float:
        if self.waits:
            for device in self.devices:
                torch.accelerator.synchronize(device)
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


class GuardedClock:
    """A clock that cannot end a generation: where it raises, the step is charged what the wall clock says.

    Attributes:
        faults: of the clock so far.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.faults = clock, 0
        self._fallback = False
        if type(clock) is WallClock and not clock.waits:  # which cannot fail, and is read many times a step
            self.now = time.perf_counter  # type: ignore[method-assign]

    def now(self) -> float:
        if not self._fallback:
            try:
                return self.clock.now()
            except Exception as error:
                self._fallback = True  # for good: readings of two clocks have no difference
                self._say(error)
        return time.perf_counter()

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        try:
            return self.clock.charge(measured, work)
        except Exception as error:
            self._say(error)
            return measured

    def _say(self, error: Exception) -> None:
        self.faults += 1
        if self.faults == 1:
            warnings.warn(
                f"the decoder's clock {type(self.clock).__name__} cannot price a step ({type(error).__name__}: "
                f"{error}); such steps are charged the measured time (said once)",
                ClockFaultWarning,
                stacklevel=4,
            )


class ClockFaultWarning(UserWarning):
    """A clock or its cost model failed; the text is not affected."""


def price(cost: CostModel, work: Work) -> Seconds:
    """What a cost model says of a step of one row or of many, decision time left out.

    Raises:
        ValueError: the step has several rows, and the cost model has no `batch_seconds` (see `BatchCostModel`). A cost
            model may raise what it likes where it has no figure.
    """
    seconds, rows, at = asked(cost, work.rows), work.rows, work.context_length
    draft = 0.0
    for made in work.drafts:
        priced = seconds if made.source == 0 else asked(of_source(cost, made.source), rows)
        draft += priced("draft", made.draft_size, at, made.drafted) + priced("catch_up", made.waiting, at, 0)
        if made.features:
            draft += priced("features", made.draft_size, at, made.drafted)
    width, reread = work.verify_width, work.reread
    if commits(reread, width):
        passes = [(reread, rows * reread), (width, work.verified)]
    else:
        passes = [(reread + width, rows * reread + work.verified)]
    verify = sum(seconds("verify", wide, at, positions) for wide, positions in passes)
    return Seconds(draft=draft, verify=verify, rest=seconds("rest", 1, at, 0))


def asked(cost: CostModel, rows: int) -> Callable[[str, int, int, int], float]:
    """Cost of a phase by its name, size, context length and positions without padding."""
    if rows == 1:
        return lambda phase, size, at, _: cost.seconds(phase, size, at)
    of_rows: Callable[[str, int, int, int, int], float] | None = getattr(cost, "batch_seconds", None)
    if of_rows is None:
        raise ValueError(
            f"cost model {type(cost).__name__} prices steps of one row, and this step had {rows}: give it a method "
            "batch_seconds(phase, size, context_length, rows, positions) (bpkit.types.BatchCostModel)"
        )
    return lambda phase, size, at, positions: of_rows(phase, size, at, rows, positions)
