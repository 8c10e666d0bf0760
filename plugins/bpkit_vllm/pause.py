"""A policy that takes too long is left out for some steps, for more each time."""

from __future__ import annotations

import warnings

from bpkit.decode.guard import PolicyFaultWarning

MOST = 1024
"""Steps of the longest pause."""


class Pause:
    """Counts the steps in which a policy is not asked.

    After a step whose decisions took longer than allowed, the policy is left out for 1 step, then for 2, 4, ... up to
    1024, so that the time it takes of a long run goes to nothing. A quick step halves the next pause.

    Args:
        most: seconds that the decisions of a step may take; None allows any.

    Attributes:
        faults: steps that took longer.
    """

    def __init__(self, most: float | None) -> None:
        self.most = most
        self.faults = self._left = self._reported = 0
        self._next = 1

    @property
    def paused(self) -> bool:
        return self._left > 0

    def after(self, seconds: float) -> None:
        """A step ended whose decisions took so long."""
        if self._left:
            self._left -= 1
        elif self.most is not None and seconds > self.most:
            self.faults += 1
            self._left, self._next = self._next, min(2 * self._next, MOST)
            if self.faults == 1:
                warnings.warn(
                    f"decisions of a step took {seconds * 1e6:.0f} us, above max_decision_us ({self.most * 1e6:.0f}): "
                    "the policy is left out for some steps after each such step (said once)",
                    PolicyFaultWarning,
                    stacklevel=3,
                )
        else:
            self._next = max(1, self._next // 2)

    def new_faults(self) -> int:
        """Faults since the last time this was asked."""
        new, self._reported = self.faults - self._reported, self.faults
        return new
