"""Who is admitted when: waiting requests, prompts that are being read, and room for them beside the running rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from bpkit.decode.request import Request
from bpkit.decode.rows import Rows
from bpkit.decode.target import TargetOutput

ALIKE = 32
"""Prompts whose lengths differ by no more, or by no more than a quarter, are read together: the shorter are padded."""


class PromptGroup:
    """Prompts that are read together, a chunk at a time.

    The last token of all is read in the same pass. Where prompts differ in length, all others are read before it, so
    that a pass computes scores of one position only.

    Args:
        chunk: tokens of each prompt that a pass reads at most; None reads a whole prompt.
    """

    def __init__(self, rows: Rows, chunk: int | None) -> None:
        self.rows, self.chunk = rows, chunk
        self.start, self.seconds = 0, 0.0
        self.features: list[list[Tensor]] = [[] for _ in rows.requests]
        lengths = rows.text.length
        self.alone = len(set(lengths)) > 1  # the last tokens get a pass of their own
        self.ends = [length - self.alone for length in lengths]
        self.inputs = rows.requests[0].of_prefill if len(rows) == 1 else {}
        if self.inputs:
            self.chunk = None

    def read(self) -> TargetOutput | None:
        """Make one pass; what it gives, if it was the last."""
        until = max(self.ends)
        if self.start < until:
            stop = min(until, self.start + (self.chunk or until))
            counts = [max(0, min(stop, end) - self.start) for end in self.ends]
            last = stop == until and not self.alone
            output = self._pass(self.rows.text.newest[:, self.start : stop], counts, last)
            self.start = stop
        else:
            last = True
            output = self._pass(self.rows.text.anchor, [1] * len(self.rows), last)
        if not last:
            self.seconds += self.rows.watch.take("verify")  # beside the steps of others
            return None
        self.rows.watch.give("verify", self.seconds)
        return output

    def _pass(self, tokens: Tensor, counts: Sequence[int], last: bool) -> TargetOutput:
        output = self.rows.target.prefill(tokens, counts, last=last, **self.inputs)
        for row, part in enumerate(output.features_of(counts) or ()):
            self.features[row].append(part)
        return output

    def all_features(self) -> list[Tensor] | None:
        """Features of the whole prompts, of each row [length, layers * hidden], or None if nobody reads them."""
        if not self.features[0]:
            return None
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self.features]


class Admission:
    """Waiting requests in their order, and the rules by which they join the running rows.

    Args:
        requests: may be made while others run.
        begin: makes sessions for requests that begin together, with room for so many rows.
        most: rows that may run at once.
        together: whether prompts of several lengths can be read in one pass.
        chunk: as in `PromptGroup`.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        begin: Callable[[list[Request], int], Rows],
        *,
        most: int = 1,
        together: bool = True,
        chunk: int | None = None,
    ) -> None:
        self.requests: Iterator[Request] = iter(requests)
        self.begin, self.most, self.together = begin, most, together
        self.chunk = chunk if together else None
        self.reading: list[PromptGroup] = []
        self.exhausted = False

    def read(self, running: int) -> Iterator[tuple[Rows, TargetOutput, list[Tensor] | None]]:
        """Fill the free places beside so many running rows, and read: rows whose prompts are read to their end.

        With chunks one pass is made, so that a long prompt does not stop the rows that run.
        """
        self._admit(running)
        while self.reading:
            prompts = self.reading[0]
            output = prompts.read()
            if output is not None:
                self.reading.pop(0)
                yield prompts.rows, output, prompts.all_features()
            if self.chunk is not None:
                return

    @property
    def done(self) -> bool:
        """Whether nobody waits and no prompt is being read."""
        return self.exhausted and not self.reading

    def _admit(self, running: int) -> None:
        free = self.most - running - sum(len(prompts.rows) for prompts in self.reading)
        admitted: list[Request] = []
        while len(admitted) < free and not self.exhausted:
            request = next(self.requests, None)
            if request is None:
                self.exhausted = True
            else:
                admitted.append(request)
        for group in self._groups(admitted):
            # The first rows take in all others.
            slots = len(group) if running or self.reading else self.most
            self.reading.append(PromptGroup(self.begin(group, slots), self.chunk))

    def _groups(self, requests: list[Request]) -> list[list[Request]]:
        """Requests that are read together: of similar lengths, each in the order of arrival."""
        if not self.together:
            return [[request] for request in requests]
        groups: list[list[Request]] = []
        for request in sorted(requests, key=lambda request: request.text.length):
            shortest = groups[-1][0].text.length if groups else 0
            if groups and not request.of_prefill and request.text.length - shortest <= max(ALIKE, shortest // 4):
                groups[-1].append(request)
            else:
                groups.append([request])
        return groups
