"""What `joint` learned from all rows, as plain JSON values."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bpkit.policy import PolicyMemory

Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Table = list[list[Count]]


class JointMemory(PolicyMemory):
    """Discounted counts of all rows, and what a second brought.

    Fields:
        pool: counts by position in the draft, [what is counted, longest draft].
        accepted, tested: drafted tokens by range of places and of the drafter's probability.
        newcomers: share of steps in which a row is new. joined, prompts: rows that join in a step, and their tokens.
        rates: tokens and seconds by range of rows, from `int.bit_length`.
    """

    pool: Table
    accepted: Table
    tested: Table
    newcomers: Annotated[float, Field(ge=0, le=1)]
    joined: Count
    prompts: Count
    rates: dict[int, tuple[Count, Count]]
