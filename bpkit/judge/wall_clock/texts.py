"""Comparing outputs: equal to plain decoding or not, and whether an output ends in a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpkit.judge.wall_clock.contestants import Outcome

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


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Output index of the first token that differs, also where one output ends early; None if they are equal.

    >>> first_difference([1, 2, 3], [1, 5, 3]), first_difference([1, 2], [1, 2, 3]), first_difference([1], [1])
    (1, 2, None)
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


Outputs = Mapping[str, Sequence[Outcome]]
"""prompt id -> the outcomes of its repeats."""


def differences(outputs: Outputs, reference: Outputs, near_ties: Outputs) -> list[dict[str, Any]]:
    """Prompts whose text is not that of `reference` in some repeat.

    Args:
        near_ties: outcomes of the plain loop, which knows the position of every near tie.

    Returns:
        `id`, `first_difference` (output index), and `near_tie`: whether a near tie stands there or earlier.
    """
    found = []
    for prompt, outcomes in outputs.items():
        expected = reference[prompt][0].tokens
        places = [i for o in outcomes if (i := first_difference(o.tokens, expected)) is not None]
        if places:
            ties = (tie for outcome in near_ties[prompt] for tie in outcome.near_ties)
            place = min(places)
            found.append({"id": prompt, "first_difference": place, "near_tie": any(tie <= place for tie in ties)})
    return found
