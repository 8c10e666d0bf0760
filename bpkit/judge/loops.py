"""Outputs that end in a loop: small models repeat themselves, and what repeats is easily drafted."""

from __future__ import annotations

from collections.abc import Sequence

LOOP_TAIL, LOOP_PERIOD = 64, 32
"""An output loops if its last 64 tokens repeat with a period of at most 32: a word, a line or a whole record."""


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the output ended in a loop, which inflates acceptance. Shorter outputs than 64 tokens never do.

    >>> ends_in_loop([7, 8, 9] * 22), ends_in_loop([7, 8, 9] * 21), ends_in_loop(range(64))
    (True, False, False)
    """
    tail = list(tokens[-LOOP_TAIL:])
    if len(tail) < LOOP_TAIL:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1))
