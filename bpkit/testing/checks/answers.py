"""Is it a decision? What is wrong with an answer, by the protocol of `Policy`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bpkit.decode.guard import kind_of
from bpkit.testing.checks.copies import Given
from bpkit.types import Context, Draft

Kind = Literal["raised", "feature", "answer", "size"]


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


def wrong_answer(method: str, answer: Any, given: Given | None, largest: int) -> Fault | None:
    """What is wrong with an answer, by the protocol of `Policy`; None if nothing is."""
    if method == "begin":
        if isinstance(answer, dict):
            return None
        return Fault(method, "answer", f"it returned {kind_of(answer)}, not a dict of tensors")
    if method not in ("select", "truncate", "extend"):
        return None
    assert isinstance(given, Context | Draft)
    batch = given.batch_size if isinstance(given, Context) else len(given.draft_length)
    what = "a bool tensor [batch]" if method == "extend" else "int64 [batch], as context.full(8) is"
    if not isinstance(answer, Tensor):
        shown = "None" if answer is None else f"{kind_of(answer)} ({answer!r})"
        return Fault(method, "answer", f"it returned {shown}, not {what}")
    if answer.shape != (batch,):
        return Fault(method, "answer", f"it returned shape {list(answer.shape)} for a batch of {batch}, not {what}")
    if method == "extend":
        return None
    if answer.dtype == torch.bool or answer.is_complex():
        return Fault(method, "answer", f"it returned dtype {answer.dtype}, not {what}")
    numbers = answer.tolist()
    if not all(math.isfinite(number) for number in numbers):
        return Fault(method, "answer", f"it returned {numbers}, which is no number of positions")
    return _out_of_range(method, numbers, given, largest)


def _out_of_range(method: str, numbers: list[float], given: Context | Draft, largest: int) -> Fault | None:
    if any(number != int(number) for number in numbers):
        return Fault(method, "size", f"it returned {numbers}, which are not whole numbers")
    if isinstance(given, Context):
        if any(not 1 <= number <= largest for number in numbers):
            advice = "no draft is block size 1"
            if max(numbers) > largest:
                advice = "keep `decoder.max_block_size` in `bind`, and clamp to it"
            return Fault(method, "size", f"it returned {numbers}: {advice}")
        return None
    lengths = given.draft_length.tolist()
    if any(not 0 <= number <= most for number, most in zip(numbers, lengths, strict=True)):
        return Fault(method, "size", f"it returned {numbers} where {lengths} tokens were drafted")
    return None
