"""What a generation returns: tokens, and the record of every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bpkit.runtime.request import Request
from bpkit.types import Prefill, Record, Seconds, Step


@dataclass
class Generation:
    """A finished generation.

    Attributes:
        sequences: prompt and output, int64 [batch, length].
        tokens: the output, int64 [batch, new].
        text: the decoded output, if the decoder has a tokenizer.
        seed: of the noise, or None for greedy decoding.
        prefill, steps: the records.
        fallbacks: policy faults that the runtime mended.
    """

    sequences: Tensor
    tokens: Tensor
    text: str | None
    seed: int | None
    prefill: Prefill
    steps: list[Step] = field(repr=False)
    fallbacks: int = 0

    @property
    def acceptance_length(self) -> float:
        """Mean acceptance length: tokens of the steps over steps. The token that prefill decides is no step's."""
        return (self.tokens.shape[1] - 1) / len(self.steps) if self.steps else float("nan")

    @property
    def seconds(self) -> Seconds:
        """Time by phase, prefill included (in `verify`)."""
        total = self.prefill.seconds
        for step in self.steps:
            total += step.seconds
        return total

    @property
    def tokens_per_second(self) -> float:
        """Output tokens over all time, prefill included."""
        total = self.seconds.total
        return self.tokens.shape[1] / total if total > 0 else float("nan")

    @property
    def near_ties(self) -> int:
        """Positions whose top-2 gap was below tolerance, where another verify width might have chosen otherwise."""
        return self.prefill.near_ties + sum(step.near_ties for step in self.steps)


class Run(Iterator[Record]):
    """A running generation: iterate over its records, then ask for the result.

    Attributes:
        request: what the loop reads from.
    """

    def __init__(self, records: Iterator[Record], request: Request, seed: int | None) -> None:
        self.request, self.prompt = request, request.prompt
        self._records, self._seed = records, seed
        self._seen: list[Record] = []

    def __next__(self) -> Record:
        record = next(self._records)
        self._seen.append(record)
        return record

    def finish(self) -> Generation:
        """Run to the end."""
        for _ in self:
            pass
        prefill, *steps = self._seen
        assert isinstance(prefill, Prefill)
        tokens = torch.cat([record.tokens for record in self._seen], dim=1)
        return Generation(
            sequences=torch.cat([self.prompt, tokens], dim=1),
            tokens=tokens.clone(),  # made outside inference mode: users may write to it
            text=None,
            seed=self._seed,
            prefill=prefill,
            steps=[step for step in steps if isinstance(step, Step)],
            fallbacks=self.request.policy.fallbacks,
        )
