"""When to stop: per token and in order, as plain decoding would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from bpkit.decode.text import RowText


class OutputEnd(Protocol):
    """Says where the output of one row ends."""

    def cut(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """How many of `tokens`, which follow the row's text, are generated, 1 or more, and whether the row ends."""
        ...


class Stopping:
    """End tokens, length and any other criteria of a `StoppingCriteriaList`.

    End tokens and length are checked without calling their criteria, which would cost a tensor operation or more for
    each token; everything else is called once for each token with the prefix that plain decoding would have.
    """

    def __init__(self, criteria: StoppingCriteriaList, text: RowText) -> None:
        self.text = text
        self.ends = end_tokens(criteria)
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def cut(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """How many of `tokens`, which follow the row's text, are generated, 1 or more, and whether the row ends."""
        length, ids = self.text.length, None
        for count, token in enumerate(tokens, start=1):
            if token in self.ends or length + count >= self.text.max_length:
                return count, True
            if not self.others:
                continue
            if ids is None:
                before = self.text.ids
                ids = torch.cat([before, torch.tensor([list(tokens)], device=before.device)], dim=1)
            upto = ids[:, : ids.shape[1] - len(tokens) + count]
            # Every criterion is called, also when one has spoken: some keep state. Some answer with a plain bool.
            said = [bool(torch.as_tensor(criterion(upto, None)).any()) for criterion in self.others]
            if any(said):
                return count, True
        return len(tokens), False


def end_tokens(criteria: StoppingCriteriaList) -> frozenset[int]:
    """Tokens that end a text."""
    found = [c.eos_token_id.flatten().tolist() for c in criteria if type(c) is EosTokenCriteria]
    return frozenset(token for tokens in found for token in tokens)


def length_limit(criteria: StoppingCriteriaList) -> int:
    """Prompt and output tokens at most, left padding included. Raises ValueError if there is no limit."""
    lengths: list[int] = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    if not lengths:
        raise ValueError("no length limit: pass max_new_tokens or max_length")
    return min(lengths)
