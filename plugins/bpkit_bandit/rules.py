"""Stop rules, the arms of `tapout`: each says how far a draft is trusted. None of them learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bpkit.policy.stop_rules import high_entropy_bound, low_entropy, sure
from bpkit.types import Draft, Feature

if TYPE_CHECKING:
    from torch import Tensor

DEFAULTS: dict[str, float | None] = {
    "fixed": None,
    "confidence": 0.8,
    "svip": 0.6,
    "svip_difference": 0.2,
    "adaedl": 0.7,
}
"""Kinds of rules, and the value where none is given; `fixed` then takes the block size of the policy."""

ADAEDL_GAMMA = 0.2


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
        return int(self.value) if self.kind == "fixed" and self.value is not None else usual

    def trusted(self, draft: Draft) -> Tensor:
        """Which positions are trusted, bool [batch, width]."""
        if self.kind == "fixed" or self.value is None:
            return draft.tokens == draft.tokens  # all of them
        if self.kind == "confidence":
            return sure(draft, self.value)
        if self.kind == "svip":
            return low_entropy(draft, self.value)
        if self.kind == "adaedl":
            return high_entropy_bound(draft, self.value, ADAEDL_GAMMA)
        root = draft[Feature.DRAFT_ENTROPY].clamp(min=0).sqrt()  # rounding may have left it just below 0
        trusted = root.isfinite()
        trusted[:, 1:] &= root.diff(dim=1) <= self.value
        return trusted

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}@{self.value:g}"


def parse_rule(text: str) -> Rule:
    """A rule from text such as `svip@0.6`. Raises ValueError that lists the rules.

    >>> str(parse_rule("svip"))
    'svip@0.6'
    """
    kind, _, value = text.strip().partition("@")
    if kind not in DEFAULTS:
        raise ValueError(f"there is no rule {kind!r}; the rules are: {', '.join(DEFAULTS)}")
    try:
        number = float(value) if value else DEFAULTS[kind]
    except ValueError:
        raise ValueError(f"rule {text!r}: {value!r} is not a number") from None
    if number is not None and kind == "fixed" and (number < 1 or number != int(number)):
        raise ValueError(f"rule {text!r}: a block size is a whole number from 1")
    if number is not None and not (0 <= number <= 1 or kind in ("fixed", "svip", "svip_difference")):
        raise ValueError(f"rule {text!r}: the threshold is between 0 and 1")
    return Rule(kind, number)
