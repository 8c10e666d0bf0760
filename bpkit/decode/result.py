"""What a generation returns: tokens, and the record of every step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bpkit.decode.observers import Observers, Watching
from bpkit.decode.request import Request
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
        observer_faults: observers of this decoder that failed so far; they were warned of and are left out.
        observer_seconds: wall-clock time that observers took, which is in no step's seconds.
        clock_faults: steps that the decoder's clock could not price; they were charged the measured time.
    """

    sequences: Tensor
    tokens: Tensor
    text: str | None
    seed: int | None
    prefill: Prefill
    steps: list[Step] = field(repr=False)
    fallbacks: int = 0
    observer_faults: int = 0
    observer_seconds: float = 0.0
    clock_faults: int = 0

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
        return sum(self.prefill.near_ties) + sum(sum(step.near_ties) for step in self.steps)


class Run(Iterator[Record]):
    """A running generation: iterate over its records, then ask for the result.

    One that is not read to its end should be closed (`run.close()`, or `with decoder.run(...) as run:`), so that its
    observers learn of it now and not when Python gets round to it.

    Attributes:
        request: what the loop reads from.
    """

    def __init__(
        self, records: Generator[Record], request: Request, seed: int | None, watching: Watching | None = None
    ) -> None:
        self.request, self.prompt = request, request.text.prompt
        self._records, self._seed = records, seed
        self._seen: list[Record] = []
        self._watching = watching or Watching(Observers(), None)
        self._state: Literal["running", "ended", "closed"] = "running"

    def __next__(self) -> Record:
        self._watching.begin()
        try:
            record = next(self._records)
        except StopIteration:
            self._end("ended")
            raise
        except BaseException:
            self._end("closed")
            raise
        self._seen.append(record)
        self._watching.record(record)
        return record

    def close(self) -> None:
        """Give up what was not read. Does nothing once the end was reached."""
        self._records.close()
        self._end("closed")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "ended") == "running":  # no state: the constructor failed
            self.close()

    def _end(self, state: Literal["ended", "closed"]) -> None:
        if self._state == "running":
            self._state = state
            self._watching.end(complete=state == "ended", fallbacks=self.request.policy.fallbacks)

    def finish(self) -> Generation:
        """Run to the end. Raises ValueError if the run was closed before."""
        for _ in self:
            pass
        if self._state == "closed":
            raise ValueError("this run was closed before its end: start another with decoder.run(...)")
        prefill, *steps = self._seen
        assert isinstance(prefill, Prefill)
        tokens = torch.cat([record.tokens for record in self._seen], dim=1).to(self.prompt.device)
        return Generation(
            sequences=torch.cat([self.prompt, tokens], dim=1),
            tokens=tokens.clone(),  # made outside inference mode: users may write to it
            text=None,
            seed=self._seed,
            prefill=prefill,
            steps=[step for step in steps if isinstance(step, Step)],
            fallbacks=self.request.policy.fallbacks,
            observer_faults=self._watching.observers.left_out,
            observer_seconds=self._watching.seconds,
            clock_faults=self.request.watch.clock.faults,
        )
