"""When to stop: per token and in order, as plain decoding would."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList


class Stopping:
    """End tokens, length and any other criteria of a `StoppingCriteriaList`.

    End tokens and length are checked without calling their criteria, which would cost a tensor operation or more for
    each token; everything else is called once for each token with the prefix that plain decoding would have.

    Attributes:
        max_length: prompt and output tokens at most.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt_length: int) -> None:
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        if not lengths:
            raise ValueError("no length limit: pass max_new_tokens or max_length")
        self.max_length: int = min(lengths)
        self.prompt_length = prompt_length
        self.ends: set[int] = set()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.ends.update(criterion.eos_token_id.flatten().tolist())
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def cut(self, prefix: Tensor, tokens: list[int]) -> tuple[int, bool]:
        """How many of `tokens` are generated, 1 .. all of them, and whether generation ends with the last."""
        stop = self.first_stop(prefix, tokens)
        return (len(tokens), False) if stop is None else (stop + 1, True)

    def first_stop(self, prefix: Tensor, tokens: list[int]) -> int | None:
        """Index of the first of `tokens` after which generation ends, or None.

        Args:
            prefix: decided tokens, int64 [1, length]. tokens: those that follow.
        """
        room, ids = self.max_length - prefix.shape[1], prefix
        if self.others:
            ids = torch.cat([prefix, torch.tensor([tokens], device=prefix.device)], dim=1)
        for i, token in enumerate(tokens):
            if token in self.ends or i + 1 >= room:
                return i
            upto = ids[:, : prefix.shape[1] + i + 1]
            # Every criterion is called, also when one has spoken: some keep state. Some answer with a plain bool.
            said = [bool(torch.as_tensor(criterion(upto, None)).any()) for criterion in self.others]
            if any(said):
                return i
        return None
