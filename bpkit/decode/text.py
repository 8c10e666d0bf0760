"""The running text: what target, drafter and verify rule read and the loop appends to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.decode.host import to_host


class RunningText:
    """Prompt and decided tokens of the running rows: tokens on the device, counts on the host.

    All rows have one length for now.

    Args:
        prompt: int64 [rows, length], on the device.

    Attributes:
        ids: decided tokens, int64 [rows, length], on the device; the last of each row is the anchor, which the target
            has not read yet.
        newest: what was appended last, int64 [rows, count], on the host; before anything was, the prompt.
        tokens: all of each row, on the host.
        prompt_length: tokens of the prompt of each row.
    """

    def __init__(self, prompt: Tensor) -> None:
        self.prompt = self.ids = prompt
        (self.newest,) = to_host([prompt])
        self.tokens: list[list[int]] = self.newest.tolist()
        self.prompt_length = [len(row) for row in self.tokens]

    @property
    def rows(self) -> int:
        """Running rows."""
        return len(self.tokens)

    @property
    def length(self) -> list[int]:
        """Tokens of each row, prompt and output."""
        return [len(row) for row in self.tokens]

    @property
    def position(self) -> list[int]:
        """Output tokens of each row, which is the output index of its next token."""
        return [len(row) - begin for row, begin in zip(self.tokens, self.prompt_length, strict=True)]

    @property
    def anchor(self) -> Tensor:
        """The last token of each row, int64 [rows, 1], on the device."""
        return self.ids[:, -1:]

    def append(self, ids: Tensor, newest: Tensor) -> None:
        """Take in decided tokens, int64 [rows, count], as they lie on the device and on the host."""
        self.ids, self.newest = torch.cat([self.ids, ids], dim=1), newest
        for row, more in zip(self.tokens, newest.tolist(), strict=True):
            row += more


def counts(numbers: Sequence[int]) -> Tensor:
    """Counts as policies get them: int64 [rows], on the host."""
    if len(numbers) == 1:
        return torch.full((1,), numbers[0])  # several times as fast as `torch.tensor`
    return torch.tensor(numbers)
