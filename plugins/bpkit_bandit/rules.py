"""Stop rules, the arms of `tapout`: each says how far a draft is trusted. None of them learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bpkit.policy.stop_rules import high_entropy_bound, low_entropy, sure
from bpkit.types import Draft, Feature

if TYPE_CHECKING:
    from torch import Tensor


def small_rise(draft: Draft, most: float) -> Tensor:
    """The root of the entropy exceeds that of the position before by at most `most`: bool [batch, width]."""
    root = draft[Feature.DRAFT_ENTROPY].clamp(min=0).sqrt()  # rounding may have left it just below 0
    trusted = root.isfinite()
    trusted[:, 1:] &= root.diff(dim=1) <= most
    return trusted


FIXED = "fixed"
THRESHOLDS: dict[str, tuple[float, float, Callable[[Draft, float], Tensor]]] = {
    "confidence": (0.8, 1.0, sure),
    "svip": (0.6, math.inf, low_entropy),
    "svip_difference": (0.2, math.inf, small_rise),
    "adaedl": (0.7, 1.0, partial(high_entropy_bound, gamma=0.2)),
}
"""Kinds of rules with a threshold: where none is given, the largest, and which positions are trusted."""


@dataclass(frozen=True)
class Rule:
    """One stop rule.

    - `fixed@B`: a block of B positions, all of it; `fixed@1` is no draft.
    - `confidence@h`: up to the first token whose probability is below h.
    - `svip@h`: up to the first position whose sqrt(entropy) exceeds h (SVIP, 2411.18462).
    - `svip_difference@h`: up to the first position whose sqrt(entropy) exceeds that of the one before by more than h.
    - `adaedl@h`: up to the first position with 1 - sqrt(0.2 entropy) below h (AdaEDL, 2410.18351).
    """

    kind: str
    value: float | None

    def block_size(self, usual: int) -> int:
        """Positions to draft."""
        return int(self.value) if self.kind == FIXED and self.value is not None else usual

    def trusted(self, draft: Draft) -> Tensor:
        """Which positions are trusted, bool [batch, width]."""
        if self.kind == FIXED or self.value is None:
            return draft.draft_length.new_ones(draft.tokens.shape) > 0  # on the host, where the counts are
        return THRESHOLDS[self.kind][2](draft, self.value)

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}@{self.value:g}"


def parse_rule(text: str) -> Rule:
    """A rule from text such as `svip@0.6`. Raises ValueError that lists the rules.

    >>> str(parse_rule("svip"))
    'svip@0.6'
    """
    kind, _, value = text.strip().partition("@")
    if kind != FIXED and kind not in THRESHOLDS:
        raise ValueError(f"there is no rule {kind!r}; the rules are: {', '.join((FIXED, *THRESHOLDS))}")
    default, most, _ = THRESHOLDS.get(kind, (None, math.inf, None))
    try:
        number = float(value) if value else default
    except ValueError:
        raise ValueError(f"rule {text!r}: {value!r} is not a number") from None
    if number is not None and kind == FIXED and (number < 1 or number != int(number)):
        raise ValueError(f"rule {text!r}: a block size is a whole number from 1")
    if number is not None and most == 1 and not 0 <= number <= 1:
        raise ValueError(f"rule {text!r}: the threshold is between 0 and 1")
    return Rule(kind, number)
