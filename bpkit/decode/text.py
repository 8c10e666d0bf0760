"""The running text: what target, drafter and verify rule read and the loop appends to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RowText:
    """Prompt and decided tokens of one request.

    Args:
        prompt: int64 [1, length], on the device.
        max_length: tokens of prompt and output at most.
        padding: tokens before the prompt that only processors and criteria see, int64 [1, count], on the device: the
            left padding of a batch that the caller made.
        tokens: the prompt on the host, where it is known.

    Attributes:
        tokens: all of them, on the host; the last is the anchor, which the target has not read yet.
        newest: those that were appended last, on the host; before any were, the prompt.
        prompt_length: tokens of the prompt.
    """

    def __init__(
        self, prompt: Tensor, max_length: int, *, padding: Tensor | None = None, tokens: list[int] | None = None
    ) -> None:
        self.prompt, self.max_length = prompt, max_length
        self.tokens = prompt[0].tolist() if tokens is None else tokens
        self.newest = list(self.tokens)
        self.prompt_length = len(self.tokens)
        self.padding = 0 if padding is None else padding.shape[1]
        self._ids = prompt if padding is None else torch.cat([padding, prompt], dim=1)

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.tokens)

    @property
    def position(self) -> int:
        """Output tokens, which is the output index of the next one."""
        return len(self.tokens) - self.prompt_length

    @property
    def ids(self) -> Tensor:
        """What plain decoding would hand to processors and criteria now, int64 [1, padding + length], on the device."""
        missing = self.padding + len(self.tokens) - self._ids.shape[1]
        if missing > 0:  # made when asked for: most requests never ask
            tail = torch.tensor([self.tokens[-missing:]], device=self._ids.device)
            self._ids = torch.cat([self._ids, tail], dim=1)
        return self._ids

    def on(self, device: torch.device) -> RowText:
        """A copy for another device of a text of which only the prompt is there; tokens on the host are shared."""
        prompt = torch.tensor([self.tokens]).to(device, non_blocking=True)
        padding = self._ids[:, : self.padding].to(device) if self.padding else None
        return RowText(prompt, self.max_length, padding=padding, tokens=self.tokens)

    def append(self, tokens: Sequence[int]) -> None:
        """Take in decided tokens."""
        self.newest = list(tokens)
        self.tokens += self.newest


class RunningText:
    """The texts of rows that run together: counts and tokens on the host, what models read on the device.

    Args:
        rows: of one device.
        slots: rows that may come to run together, if more.

    Attributes:
        rows: the text of each.
        newest: what was appended last, int64 [rows, width], on the device; of row *i* the first `counts[i]` tokens
            count, the rest is padding. Before anything was appended, the prompts.
        counts: how many tokens were appended to each row.
        anchor: the last token of each row, int64 [rows, 1], on the device.
    """

    def __init__(self, rows: Sequence[RowText], *, slots: int = 1) -> None:
        self.rows, self.slots = list(rows), max(slots, len(rows))
        self.counts = [row.length for row in rows]
        self.newest = padded([row.prompt for row in rows])
        self.anchor = torch.cat([row.prompt[:, -1:] for row in rows])

    @property
    def length(self) -> list[int]:
        """Tokens of each row, prompt and output."""
        return [row.length for row in self.rows]

    @property
    def position(self) -> list[int]:
        """Output tokens of each row, which is the output index of its next token."""
        return [row.position for row in self.rows]

    @property
    def max_length(self) -> int:
        """Tokens that the longest row may come to."""
        return max(row.max_length for row in self.rows)

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def append(self, ids: Tensor, anchor: Tensor, tokens: Sequence[Sequence[int]]) -> None:
        """Take in decided tokens.

        Args:
            ids: as they lie on the device, int64 [rows, width], with anything behind those that count.
            anchor: the last of each row, int64 [rows, 1], on the device.
            tokens: the same on the host, those that count.
        """
        self.newest, self.anchor, self.counts = ids, anchor, [len(row) for row in tokens]
        for row, more in zip(self.rows, tokens, strict=True):
            row.append(more)

    def follow(self, text: RunningText) -> None:
        """Take over what was appended to the text of which this is a copy on another device: `RowText.on`."""
        self.counts = list(text.counts)
        for row, original in zip(self.rows, text.rows, strict=True):
            row.newest = original.newest
        rows = [torch.tensor([row.newest + row.newest[-1:]]) for row in self.rows]  # the anchor once more, at the end
        ids = padded(rows)
        ids[:, -1] = torch.tensor([row.newest[-1] for row in self.rows])
        ids = ids.to(self.device, non_blocking=True)
        self.newest, self.anchor = ids[:, :-1], ids[:, -1:]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        at = to_device(rows, self.device)
        self.rows = [self.rows[row] for row in rows]
        self.counts = [self.counts[row] for row in rows]
        self.newest, self.anchor = self.newest[at], self.anchor[at]

    def join(self, other: RunningText) -> None:
        """Take in the rows of another text after one's own."""
        self.rows += other.rows
        self.counts += other.counts
        self.newest = padded([newest[None] for text in (self, other) for newest in text.newest])
        self.anchor = torch.cat([self.anchor, other.anchor])


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows [1, count, ...] of several counts side by side: [rows, largest count, ...], zeros behind the shorter."""
    if len({row.shape[1] for row in rows}) == 1:
        return rows[0] if len(rows) == 1 else torch.cat(list(rows))
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)


def to_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers of the host, int64 [count] or [rows, count], on a device, without a wait for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def counts(numbers: Sequence[int]) -> Tensor:
    """Counts as policies get them: int64 [rows], on the host."""
    if len(numbers) == 1:
        return torch.full((1,), numbers[0])  # several times as fast as `torch.tensor`
    return torch.tensor(numbers)
