"""What a generation returns: tokens, and the record of every step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from bpkit.decode.guard import GuardedPolicy
from bpkit.decode.observers import ObservedRequest, Observers, Watching
from bpkit.decode.request import Request
from bpkit.decode.rows import Rows
from bpkit.decode.timing import Stopwatch
from bpkit.types import Prefill, Record, Seconds, Step

Asked = TypeVar("Asked")


@dataclass
class Generation:
    """A finished generation.

    Attributes:
        sequences: prompt and output, int64 [1, length].
        tokens: the output, int64 [1, new].
        text: the decoded output, if the decoder has a tokenizer.
        seed: of the noise, or None for greedy decoding.
        records: of the turns that this row took part in, each with its place there. Of many rows, the time of a record
            is all rows'.
        fallbacks: policy faults that the runtime mended while it ran.
        observer_faults: observers of this decoder that failed so far; they were warned of and are left out.
        observer_seconds: wall-clock time that observers took, which is in no step's seconds.
        clock_faults: steps that the decoder's clock could not price; they were charged the measured time.
        error: of many rows, what ended this one before its end; the tokens are those decided until then.
    """

    sequences: Tensor
    tokens: Tensor
    text: str | None
    seed: int | None
    records: list[tuple[Record, int]] = field(repr=False)
    fallbacks: int = 0
    observer_faults: int = 0
    observer_seconds: float = 0.0
    clock_faults: int = 0
    error: Exception | None = None

    @cached_property
    def prefill(self) -> Prefill:
        """The record of this row's first token. Raises IndexError if it failed before."""
        record, place = self.records[0]
        assert isinstance(record, Prefill)
        return record.row(place)

    @cached_property
    def steps(self) -> list[Step]:
        """The records of this row's steps."""
        return [record.row(place) for record, place in self.records if isinstance(record, Step)]

    @property
    def acceptance_length(self) -> float:
        """Mean acceptance length: tokens of the steps over steps. The token that prefill decides is no step's."""
        steps = len(self.records) - 1
        return (self.tokens.shape[1] - 1) / steps if steps > 0 else float("nan")

    @property
    def seconds(self) -> Seconds:
        """Time by phase, prefill included (in `verify`)."""
        total = Seconds()
        for record, _ in self.records:
            total += record.seconds
        return total

    @property
    def tokens_per_second(self) -> float:
        """Output tokens over all time, prefill included."""
        total = self.seconds.total
        return self.tokens.shape[1] / total if total > 0 else float("nan")

    @property
    def near_ties(self) -> int:
        """Positions whose top-2 gap was below tolerance, where another verify width might have chosen otherwise."""
        return sum(record.near_ties[place] for record, place in self.records)


@dataclass(eq=False)
class Seen:
    """A request, and what was seen of it.

    Attributes:
        fallbacks: policy faults before it began.
    """

    request: Request
    watching: Watching
    fallbacks: int
    records: list[tuple[Record, int]] = field(default_factory=list)


class Running(Iterator[Record]):
    """The records of rows that run together, noted down by request.

    Attributes:
        records: set once by whoever makes the loop.
        rows: the last that began, which are all where one runs at a time.
        seen: requests that run, by their numbers. ended: those that ended and were not asked for yet.
    """

    records: Generator[Record]
    rows: Rows

    def __init__(
        self,
        policy: GuardedPolicy,
        watch: Stopwatch,
        observers: Observers,
        observed: Callable[[Request], ObservedRequest],
    ) -> None:
        self.policy, self.watch, self.observers, self.observed = policy, watch, observers, observed
        self.seen: dict[int, Seen] = {}
        self.ended: list[Seen] = []

    def watched(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Pass requests on as they are admitted."""
        for request in requests:
            watching = Watching(self.observers, self.observed(request) if self.observers.active else None)
            self.seen[request.number] = Seen(request, watching, self.policy.fallbacks)
            watching.begin()
            yield request

    def __next__(self) -> Record:
        try:
            record = next(self.records)
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise
        for place, number in enumerate(record.row_ids):
            seen = self.seen[number]
            if seen.request.failure is None:
                seen.records.append((record, place))
                seen.watching.record(record, place)
            if record.stopped[place]:
                self.ended.append(self.seen.pop(number))
                self._end(seen, complete=seen.request.failure is None)
        return record

    def close(self) -> None:
        """Give up what still runs."""
        self.records.close()
        while self.seen:
            _, seen = self.seen.popitem()
            self._end(seen, complete=False)

    def _end(self, seen: Seen, *, complete: bool) -> None:
        seen.watching.end(complete=complete, fallbacks=self.policy.fallbacks - seen.fallbacks)

    def generation(self, seen: Seen) -> Generation:
        """The result of a request that ended."""
        text, prompt = seen.request.text, seen.request.text.prompt
        count = sum(1 if isinstance(record, Prefill) else int(record.num_accepted[i]) + 1 for record, i in seen.records)
        output = text.tokens[text.prompt_length : text.prompt_length + count]
        tokens = torch.tensor([output], dtype=torch.long, device=prompt.device)
        return Generation(
            sequences=torch.cat([prompt, tokens], dim=1),
            tokens=tokens,
            text=None,
            seed=seen.request.seed,
            records=seen.records,
            fallbacks=self.policy.fallbacks - seen.fallbacks,
            observer_faults=self.observers.left_out,
            observer_seconds=seen.watching.seconds,
            clock_faults=self.watch.clock.faults,
            error=seen.request.failure,
        )


class Run(Iterator[Record]):
    """A running generation: iterate over its records, then ask for the result.

    One that is not read to its end should be closed (`run.close()`, or `with decoder.run(...) as run:`), so that its
    observers learn of it now and not when Python gets round to it.

    Attributes:
        running: what the loop works on. request: the prompt, and how its tokens are chosen.
    """

    def __init__(self, running: Running, request: Request) -> None:
        self.running, self.request, self.prompt = running, request, request.text.prompt
        self._state: Literal["running", "ended", "closed"] = "running"

    def __next__(self) -> Record:
        try:
            record = next(self.running)
        except StopIteration:
            if self._state == "running":
                self._state = "ended"
            raise
        except BaseException:
            self._state = "closed"
            raise
        if self.request.failure is not None:
            self.close()
            raise self.request.failure
        return record

    def close(self) -> None:
        """Give up what was not read. Does nothing once the end was reached."""
        if self._state == "running":
            self._state = "closed"
            self.running.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "ended") == "running":  # no state: the constructor failed
            self.close()

    def finish(self) -> Generation:
        """Run to the end. Raises ValueError if the run was closed before."""
        for _ in self:
            pass
        if self._state == "closed":
            raise ValueError("this run was closed before its end: start another with decoder.run(...)")
        (seen,) = self.running.ended
        return self.running.generation(seen)

    @torch.inference_mode()
    def cache(self) -> Any:
        """What the target keeps of the text, all but the last token, as a cache of transformers."""
        return self.running.rows.target.cache(0)


class Piece(NamedTuple):
    """A piece of one text among many: the place of its prompt, and with the last piece the finished generation."""

    place: int
    text: str
    generation: Generation | None = None


class RowFailure(RuntimeError):
    """One of many rows failed; the message names it, and the cause says why."""


class RunMany(Iterator[Record]):
    """Generations that share passes: iterate over the records of all, and ask in between what `ended`.

    Args:
        requests: made when there is room for them, each with the place of its prompt. A request that cannot be made
            ends at once, with its error.
        told: what becomes of a result before it is handed out.
    """

    running: Running

    def __init__(
        self,
        prompts: Iterable[Asked],
        request: Callable[[int, Asked], Request],
        start: Callable[[Iterable[Request]], Running],
        told: Callable[[Generation], Generation],
    ) -> None:
        self._told = told
        self._places: dict[int, int] = {}
        self._unmade: list[tuple[int, Exception]] = []
        self.running = start(self._made(prompts, request))

    def _made(self, prompts: Iterable[Asked], request: Callable[[int, Asked], Request]) -> Iterator[Request]:
        for place, prompt in enumerate(prompts):
            try:
                made = request(place, prompt)
            except Exception as error:
                self._unmade.append((place, error))
                continue
            self._places[made.number] = place
            yield made

    def __next__(self) -> Record:
        return next(self.running)

    def rows_of(self, record: Record) -> Iterator[tuple[int, Record]]:
        """The record of each row by itself, with the place of its prompt."""
        failed = {seen.request.number for seen in self.running.ended if seen.request.failure is not None}
        for row, number in enumerate(record.row_ids):
            if number not in failed:
                yield self._places[number], record.row(row)

    def ended(self) -> Iterator[tuple[int, Generation]]:
        """Generations that ended since this was last asked, with the places of their prompts."""
        while self._unmade:
            place, error = self._unmade.pop(0)
            empty = torch.empty((1, 0), dtype=torch.long)
            yield place, self._named(place, Generation(empty, empty.clone(), None, None, [], error=error))
        while self.running.ended:
            seen = self.running.ended.pop(0)
            place = self._places.pop(seen.request.number)
            yield place, self._named(place, self._told(self.running.generation(seen)))

    @staticmethod
    def _named(place: int, result: Generation) -> Generation:
        if result.error is not None:
            named = RowFailure(f"prompt {place}: {type(result.error).__name__}: {result.error}")
            named.__cause__ = result.error
            result.error = named
        return result

    def close(self) -> None:
        """Give up what still runs."""
        self.running.close()

    def __enter__(self) -> RunMany:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
