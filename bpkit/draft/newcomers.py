"""Rows whose prompts a drafter has not read, beside rows that it has drafted for.

In one pass with the others' few tokens, every row would be padded to the longest prompt. So prompts are read apart,
into a memory of their own that then joins that of all rows; and only once somebody drafts: a policy may never ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

LONG = 32
"""Positions up to which padding costs less than a pass."""


class Memory(Protocol):
    """What a drafter's model keeps of rows: a cache, or a session."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        ...

    def join(self, other: Any) -> None:
        """Take in the rows of another one after one's own."""
        ...


def newcomers(held: Sequence[int], unread: Sequence[int]) -> list[int]:
    """Rows of which nothing was read yet and much is to be read, if there are others beside them."""
    found = [row for row, (has, lacks) in enumerate(zip(held, unread, strict=True)) if has == 0 and lacks > LONG]
    return found if len(found) < len(held) else []


def take_in(memory: Memory, count: int, new: Memory, rows: Sequence[int]) -> None:
    """Put `new`, which holds some rows, in their places among the `count` rows of a memory.

    Nothing moves where they are the last.
    """
    order = [row for row in range(count) if row not in rows]
    memory.keep(order)
    memory.join(new)
    order += rows
    memory.keep([order.index(row) for row in range(count)])
