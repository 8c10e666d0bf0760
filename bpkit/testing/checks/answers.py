"""Is it a decision? What is wrong with an answer, by the protocol of `Policy`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bpkit.decode.guard import kind_of
from bpkit.testing.checks.records import Given
from bpkit.types import Context, Draft

Kind = Literal["raised", "feature", "answer", "size"]
DECIDES = ("select", "extend", "truncate")


@dataclass(frozen=True)
class Fault:
    """Why a decision could not be used.

    Attributes:
        kind: `raised` an exception; `feature`: read one that is not there; `answer`: it is no decision (shape, type,
            NaN); `size`: it is one, but out of range.
        text: what the policy did.
    """

    method: str
    kind: Kind
    text: str


def raised(error: Exception) -> str:
    """What a policy did that raised."""
    return f"it raised {type(error).__name__}: {error}"


def wrong_answer(method: str, answer: Any, given: Given | None, largest: int) -> Fault | None:
    """What is wrong with an answer, by the protocol of `Policy`; None if nothing is."""
    if method == "begin" and not isinstance(answer, dict):
        return Fault(method, "answer", f"it returned {kind_of(answer)}, not a dict of tensors")
    if method not in DECIDES:
        return None
    assert isinstance(given, Context | Draft)
    batch = given.batch_size if isinstance(given, Context) else len(given.draft_length)
    what = "a bool tensor [batch]" if method == "extend" else "int64 [batch], as context.full(8) is"
    if not isinstance(answer, Tensor):
        got = "None" if answer is None else f"{kind_of(answer)} ({answer!r})"
        return Fault(method, "answer", f"it returned {got}, not {what}")
    if answer.shape != (batch,):
        return Fault(method, "answer", f"it returned shape {list(answer.shape)} for a batch of {batch}, not {what}")
    if method == "extend":
        return None
    if answer.dtype == torch.bool or answer.is_complex():
        return Fault(method, "answer", f"it returned dtype {answer.dtype}, not {what}")
    numbers = answer.tolist()
    if not all(math.isfinite(number) for number in numbers):
        return Fault(method, "answer", f"it returned {numbers}, which is no number of positions")
    wrong = _out_of_range(numbers, given, largest)
    return None if wrong is None else Fault(method, "size", f"it returned {numbers}{wrong}")


def _out_of_range(numbers: list[float], given: Context | Draft, largest: int) -> str | None:
    if any(number != int(number) for number in numbers):
        return ", which are not whole numbers"
    if isinstance(given, Draft):
        lengths = given.draft_length.tolist()
        fits = all(0 <= number <= most for number, most in zip(numbers, lengths, strict=True))
        return None if fits else f" where {lengths} tokens were drafted"
    if max(numbers) > largest:
        return ": keep `decoder.max_block_size` in `bind`, and clamp to it"
    return ": no draft is block size 1" if min(numbers) < 1 else None
