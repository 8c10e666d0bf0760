"""A server under load, replayed: the live loop over many rows of a trace, with a cost model's time.

No text depends on policy, batch or neighbours, so what a row accepts is in the trace whatever runs beside it. What
is simulated is time alone: requests arrive, are admitted, read their prompts, and share steps that a cost model prices.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bpkit.decode.admission import Admission
from bpkit.decode.clock import CostClock, GuardedClock
from bpkit.decode.loop import decode
from bpkit.decode.request import Request
from bpkit.decode.rows import Rows, Shared
from bpkit.decode.target import TargetOutput
from bpkit.decode.timing import Stopwatch, TimedPolicy
from bpkit.trace.load import Load
from bpkit.trace.records import PromptTrace
from bpkit.trace.replay import Replayer, offered, traced_request, traced_rows
from bpkit.trace.traced import TracedPrompts, TracedTarget
from bpkit.types import CostModel, Prefill, Record, Seconds, Step, Work

RECENT_DECISIONS = 31
"""Decisions whose median time is charged for one: a hiccup of the machine that simulates is none of the server's."""


class ServerClock(CostClock):
    """Simulated time of a server.

    Args:
        charges_decisions: whether the decision time of policies, measured here and now, takes time there. With it no
            two runs are alike to the last digit; decisions of a closed loop are.
        mixes_passes: whether prompts are read in the passes of rows that run, as in vLLM, and take what their tokens
            add to those, or in passes of their own, as in bpkit's loop.

    Attributes:
        time: seconds since the first request could begin.
        read_tokens: tokens of prompts that were read.
        beside: positions of the step that comes, as far as they are known: those of the last, and of prompts.
        work, charged: of the last step, and what it took. decision: seconds that were charged for the policy in it.
    """

    def __init__(self, cost: CostModel, *, charges_decisions: bool, mixes_passes: bool) -> None:
        super().__init__(cost)
        self.mixes_passes = mixes_passes
        self.beside = self.read_tokens = 0
        self.time, self.decision = 0.0, 0.0
        self.work, self.charged = Work(0, 0, 1, 0), Seconds()
        self._charges, self._recent = charges_decisions, dict[int, deque[float]]()

    def read(self, tokens: int, context_length: int) -> None:
        """A pass read so many tokens of prompts."""
        self.read_tokens += tokens
        before = self.beside if self.mixes_passes else 0
        self.time += self.cost.seconds("prefill", before + tokens, context_length)
        if before:
            self.time -= self.cost.seconds("prefill", before, context_length)
            self.beside += tokens

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        self.decision = self._charged(0 if work is None else work.rows, measured.policy) if self._charges else 0.0
        seconds = super().charge(measured, work)
        self.time += seconds.total + self.decision
        if work is not None:
            self.work, self.charged, self.beside = work, seconds, work.verified
        return seconds

    def _charged(self, rows: int, measured: float) -> float:
        """Median of the last decisions about as many rows."""
        recent = self._recent.setdefault(rows.bit_length(), deque(maxlen=RECENT_DECISIONS))
        recent.append(measured)
        return statistics.median(recent)


class _Unguarded(GuardedClock):
    """A step that cannot be priced ends a simulation: measured time would be no server's."""

    def charge(self, measured: Seconds, work: Work | None) -> Seconds:
        return self.clock.charge(measured, work)


class ServerAdmission(Admission):
    """Admits requests when they have arrived and the load leaves room for them.

    Args:
        max_tokens: positions of a step at most. Rows that run come first, as in vLLM; what the last step left over is
            read of the next prompts, in chunks. None reads whole prompts.
    """

    def __init__(
        self,
        requests: Iterator[Request],
        begin: Callable[[list[Request], int], Rows],
        load: Load,
        clock: ServerClock,
        count: int,
        *,
        max_tokens: int | None,
        together: bool,
    ) -> None:
        super().__init__(requests, begin, together=together, chunk=max_tokens)
        self.load, self.clock, self.count, self.max_tokens = load, clock, count, max_tokens
        self.begun = 0

    def read(self, running: int) -> Iterator[tuple[Rows, TargetOutput, list[Tensor] | None]]:
        if not running:
            self.clock.beside = 0
        if self.max_tokens is None:
            yield from super().read(running)
            return
        left = self.max_tokens - self.clock.beside
        self._admit(running)
        while self.reading and left > 0:
            prompts, before = self.reading[0], self.clock.read_tokens
            prompts.chunk = max(1, left // len(prompts.rows))
            output = prompts.read()
            left -= self.clock.read_tokens - before
            if output is not None:
                self.reading.pop(0)
                yield prompts.rows, output, prompts.all_features()

    def _admit(self, running: int) -> None:
        busy = running + sum(len(prompts.rows) for prompts in self.reading)
        if not busy and self.begun < self.count:  # nobody runs: time goes on to the next arrival
            self.clock.time = max(self.clock.time, self.load.arrival(self.begun))
        due, most = 0, self.load.most(self.begun, self.clock.time)
        while busy + due < most and self.begun + due < self.count and self._arrived(self.begun + due):
            due += 1
        self.begun += due
        self.most = busy + due + (self.begun == self.count)  # one more shows that nobody is left
        super()._admit(running)

    def _arrived(self, number: int) -> bool:
        return self.load.arrival(number) <= self.clock.time


@dataclass(frozen=True)
class Served:
    """What a server did.

    Attributes:
        places: of each request, its prompt's place among the prompts: int64 [requests], as are all of these.
        output_lengths: tokens of each.
        arrived, first, ended: seconds at which each arrived, had its first token, and ended: float64 [requests].
        time: seconds at the end of each step, float64 [steps]. seconds: of the step without decisions.
        decisions: seconds of the policy's decisions in each step, as charged.
        rows, drafted, verified, tokens: of each step: rows that ran, drafted tokens, positions of the target without
            padding, tokens that it yielded; int64 [steps].
        filled, full: steps before the first in which all rows ran that may, and before the first in which a row was
            missing because no request was left.
        tested, accepted: drafted tokens by position in the draft that were verified after none was rejected, and of
            them those that stand: int64 [longest draft].
        fallbacks: policy faults that were mended.
    """

    places: NDArray[np.int64]
    output_lengths: NDArray[np.int64]
    arrived: NDArray[np.float64]
    first: NDArray[np.float64]
    ended: NDArray[np.float64]
    time: NDArray[np.float64]
    seconds: NDArray[np.float64]
    decisions: NDArray[np.float64]
    rows: NDArray[np.int64]
    drafted: NDArray[np.int64]
    verified: NDArray[np.int64]
    tokens: NDArray[np.int64]
    filled: int
    full: int
    tested: NDArray[np.int64]
    accepted: NDArray[np.int64]
    fallbacks: int


_OF_STEPS = ("time", "seconds", "decisions", "rows", "drafted", "verified", "tokens")


class ServerReplayer(Replayer):
    """Replays a server of one decoder and policy. Arguments as of `Replayer`, and:

    Args:
        max_tokens: as in `ServerAdmission`.
        charges_decisions, mixes_passes: as in `ServerClock`; by default passes are mixed if the cost model's engine
            does that (`mixes_prompts`).
    """

    def __init__(
        self,
        *args: Any,
        max_tokens: int | None = None,
        charges_decisions: bool = False,
        mixes_passes: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.max_tokens = max_tokens
        self.charges_decisions = charges_decisions
        self.mixes_passes = getattr(self.cost, "mixes_prompts", False) if mixes_passes is None else mixes_passes

    def serve(
        self,
        prompts: Sequence[PromptTrace],
        places: Sequence[int],
        load: Load,
        on_record: Callable[[Record, ServerClock], None] | None = None,
    ) -> Served:
        """Serve requests until all have ended.

        Args:
            prompts: of one trace.
            places: of each request, which prompt it asks for, in the order of arrival.
            on_record: is called with each record of the loop.

        Raises:
            ValueError: there are no requests; or the cost model cannot price a step.
            PolicyError, TraceError: as of `Replayer.run`.
        """
        if not len(places):
            raise ValueError("a server without requests: give at least one place of a prompt")
        there = offered(prompts[0]) | (self.fill.offers if self.fill is not None else frozenset())
        wants = self.policy.wants | (self.policy.wants_optional & there)
        joined = TracedPrompts([self._filled(prompt, wants) for prompt in prompts], wants)
        clock = ServerClock(self.cost, charges_decisions=self.charges_decisions, mixes_passes=self.mixes_passes)
        watch = Stopwatch(_Unguarded(clock))
        shared = Shared(TimedPolicy(self.policy, self.spec, watch, strict=self.strict), watch, self.spec, wants)
        record = _Records(joined, places, load, clock, self.spec.max_block_size)

        def begin(requests: list[Request], slots: int) -> Rows:
            return traced_rows(requests, joined, shared, partial(_PricedTarget, clock))

        admission = ServerAdmission(
            self._requests(joined, places, record),
            begin,
            load,
            clock,
            len(places),
            max_tokens=self.max_tokens,
            together=not self.spec.stateful,
        )
        for each in decode(admission, shared.policy):
            record.add(each)
            if on_record is not None:
                on_record(each, clock)
        return record.served(shared.policy.fallbacks)

    def _requests(self, joined: TracedPrompts, places: Sequence[int], record: _Records) -> Iterator[Request]:
        for number, place in enumerate(places):
            self.requests += 1
            record.begins(number)
            yield traced_request(joined.text(place), number, self.seed, self.requests)


class _PricedTarget(TracedTarget):
    """A traced target whose reading of prompts takes time."""

    def __init__(self, clock: ServerClock, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.clock = clock

    def prefill(self, tokens: Tensor, counts: Sequence[int], *, last: bool, **inputs: Any) -> TargetOutput:
        self.clock.read(sum(counts), max(self.text.length))
        return super().prefill(tokens, counts, last=last, **inputs)


class _Records:
    """Collects what `Served` says."""

    def __init__(
        self, joined: TracedPrompts, places: Sequence[int], load: Load, clock: ServerClock, max_block_size: int
    ) -> None:
        self.places, self.load, self.clock = np.asarray(places, np.int64), load, clock
        self.lengths = np.array([joined.prompts[place].output_length for place in places], np.int64)
        self.arrived, self.first, self.ended = np.zeros((3, len(places)))
        self.steps: list[tuple[float, float, float, int, int, int, int]] = []
        self.by_position = np.zeros((2, max_block_size + 1), np.int64)
        self.filled: int | None = None
        self.full = 0
        self.begun = 0

    def begins(self, number: int) -> None:
        """A request was admitted."""
        self.begun = number + 1
        self.arrived[number] = self.load.arrival(number) or self.clock.time

    def add(self, record: Record) -> None:
        rows = list(record.row_ids)
        ended = [row for row, stopped in zip(rows, record.stopped, strict=True) if stopped]
        self.ended[ended] = self.clock.time
        if isinstance(record, Prefill):
            self.first[rows] = self.clock.time
            return
        self._add_step(record, len(rows))

    def _add_step(self, step: Step, rows: int) -> None:
        clock, stands = self.clock, step.num_accepted.numpy()
        drafted, tokens = int(step.draft_length.sum()), int(stands.sum()) + rows
        price = clock.charged.total
        self.steps.append((clock.time, price, clock.decision, rows, drafted, clock.work.verified, tokens))
        if drafted:
            verified = step.verify_length.numpy()
            self.by_position[0] += np.bincount(np.minimum(stands + 1, verified), minlength=len(self.by_position[0]))
            self.by_position[1] += np.bincount(stands, minlength=len(self.by_position[1]))
        all_run = rows >= self.load.most(self.begun)
        if all_run and self.filled is None:
            self.filled = len(self.steps) - 1
        if all_run or self.begun < len(self.places):
            self.full = len(self.steps)

    def served(self, fallbacks: int) -> Served:
        columns = np.array(self.steps, np.float64).reshape(-1, len(_OF_STEPS)).T
        times, counted = columns[:3], columns[3:].astype(np.int64)
        # How often a draft got so far, from how often it ended there.
        tested, accepted = self.by_position[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        return Served(
            places=self.places,
            output_lengths=self.lengths,
            arrived=self.arrived,
            first=self.first,
            ended=self.ended,
            **dict(zip(_OF_STEPS, (*times, *counted), strict=True)),
            filled=self.filled or 0,
            full=self.full,
            tested=tested,
            accepted=accepted,
            fallbacks=fallbacks,
        )
