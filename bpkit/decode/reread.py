"""Which accepted tokens a target with recurrent states reads again, in counts alone.

Where a pass had tokens rejected, its session goes back to the states before the pass; the accepted tokens are then
*pending* and go before the tokens of the next pass. Live decoding and replay count them with the same object.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_PENDING = 16
"""Pending tokens beyond which they get a committing pass of their own.

With `a` accepted tokens a step and a pass that costs `r` positions beside its own, reading again for k steps costs
a * k^2 / 2 positions and committing r once: least for each step at a * k = sqrt(2 * a * r), which is 9 to 31 for the
usual a of 2 to 6 and r of 20 to 80, and flat around it.
"""


def commits(reread: int, count: int) -> bool:
    """Whether `reread` pending tokens get a pass of their own before one of `count` new tokens.

    A single new token is never rejected: its pass commits what is pending.
    """
    return count > 1 and reread > LONGEST_PENDING


@dataclass(slots=True)
class Rereading:
    """The pending tokens of one request.

    Attributes:
        pending: accepted tokens that the states do not hold.
        reread: tokens read again in the verify step just made, its committing pass included.
        fed: tokens of the last pass, those read again included.
    """

    pending: int = 0
    reread: int = 0
    fed: int = 0

    def verify(self, count: int) -> bool:
        """Note a pass over `count` new tokens; whether a committing pass goes first."""
        first = commits(self.pending, count)
        self.reread = self.pending
        self.fed = count if first else self.pending + count
        self.pending = 0
        return first

    def reject(self, count: int) -> None:
        """Note that the last `count` tokens of that pass do not stand."""
        if count > 0:
            self.pending = self.fed - count
