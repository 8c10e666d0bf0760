"""When to stop: per token and in order, as plain decoding would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from bpkit.decode.text import RunningText


class OutputEnd(Protocol):
    """Says where the output of each row ends.

    Attributes:
        max_length: prompt and output tokens at most.
    """

    max_length: int

    def cut(self, row: int, tokens: Sequence[int]) -> tuple[int, bool]:
        """How many of `tokens`, which follow a row's text, are generated, 1 or more, and whether the row ends."""
        ...


class Stopping:
    """End tokens, length and any other criteria of a `StoppingCriteriaList`.

    End tokens and length are checked without calling their criteria, which would cost a tensor operation or more for
    each token; everything else is called once for each token with the prefix that plain decoding would have.

    Attributes:
        max_length: prompt and output tokens at most.
    """

    def __init__(self, criteria: StoppingCriteriaList, text: RunningText) -> None:
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        if not lengths:
            raise ValueError("no length limit: pass max_new_tokens or max_length")
        self.max_length: int = min(lengths)
        self.text = text
        self.ends: set[int] = set()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.ends.update(criterion.eos_token_id.flatten().tolist())
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def cut(self, row: int, tokens: Sequence[int]) -> tuple[int, bool]:
        """How many of `tokens`, which follow a row's text, are generated, 1 or more, and whether the row ends."""
        length, ids = len(self.text.tokens[row]), self.text.ids[row : row + 1]
        if self.others:
            ids = torch.cat([ids, torch.tensor([tokens], device=ids.device)], dim=1)
        for count, token in enumerate(tokens, start=1):
            if token in self.ends or length + count >= self.max_length:
                return count, True
            # Every criterion is called, also when one has spoken: some keep state. Some answer with a plain bool.
            upto = ids[:, : length + count]
            said = [bool(torch.as_tensor(criterion(upto, None)).any()) for criterion in self.others]
            if any(said):
                return count, True
        return len(tokens), False
