"""The requests that one policy decides for, as rows of one batch.

vLLM plans a step before the one that runs has ended. A row's calls come in this order, one line a step:

    truncate the draft of the step before, select the length of the next draft      schedule
    observe what this step's pass accepted                                          update_from_output

so that `select` knows the row as it was before the pass that runs, and `observe` of that pass comes after it. With two
steps in flight it comes one step later still. What a context says is what is known: counts, and features of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.decode.guard import GuardedPolicy
from bpkit.policy import Policy, State
from bpkit.types import (
    OF_PREFILL,
    OF_THE_DRAFT,
    Context,
    DecoderSpec,
    Draft,
    Feature,
    Prefill,
    Seconds,
    Step,
)
from bpkit_vllm.features import StepFeatures
from bpkit_vllm.pause import Pause
from bpkit_vllm.records import Records

Ints = NDArray[np.int64]
P = ParamSpec("P")
R = TypeVar("R")
NOTHING: Ints = np.zeros((3, 0), np.int64)
GROWTH: Ints = np.array([[1], [-1], [1]])
"""Of position, remaining tokens and context length, by a token."""


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """Rows whose drafts are verified in a step, if it has room for them.

    Attributes:
        ids: of their requests. block_size: as selected. draft_length: what the drafter made of it.
    """

    ids: list[str]
    block_size: list[int]
    draft_length: list[int]


def timed(method: Callable[Concatenate[EngineRows, P], R]) -> Callable[Concatenate[EngineRows, P], R]:
    """Count the time of a method as that of decisions."""

    @wraps(method)
    def measured(self: EngineRows, *args: P.args, **kwargs: P.kwargs) -> R:
        started = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - started

    return measured  # type: ignore[return-value]  # its first argument has a name


class EngineRows:
    """Rows of one policy.

    Args:
        text: the policy as it was written.
        policy: bound to `spec`.
        provided: features that the engine has, of those that the policy wants.
        seed: of the policy's random numbers. max_decision: seconds that it may take a step, or None.
        records: that are told of requests and steps. numbers: of requests to come, all different.

    Attributes:
        requests: vLLM's, in the order of the rows.
        waiting: requests that run and did not begin: their policy rests, or reads features of a token yet to come.
        seconds: that decisions took, with all that is done for them. steps: that were decided; rows: of all steps.
    """

    def __init__(
        self,
        text: str,
        policy: Policy,
        spec: DecoderSpec,
        *,
        provided: frozenset[Feature] = frozenset(),
        seed: int = 0,
        max_decision: float | None = None,
        records: Records,
        numbers: Iterator[int],
    ) -> None:
        self.text, self.policy, self.spec = text, policy, spec
        self.guard = GuardedPolicy(policy, spec)
        self.provided = provided & (policy.wants | policy.wants_optional)
        self.begins_late = bool(self.provided - OF_THE_DRAFT)
        self.generator = torch.Generator().manual_seed(seed)
        self.pause = Pause(max_decision)
        self.default_length = min(spec.trained_block_size, spec.max_block_size) - 1
        self.requests: list[Any] = []
        self.ids: list[str] = []
        self.places: dict[str, int] = {}
        self.numbers: list[int] = []
        self.chosen: list[int] = []
        self.counts: Ints = NOTHING
        self.waiting: dict[str, Any] = {}
        self.parked: dict[str, tuple[State, int]] = {}
        self.records, self._next_number = records, numbers
        self._unseen: set[int] = set()
        self.seconds, self.steps, self.rows = 0.0, 0, 0
        self._told, self._in_policy = 0.0, 0.0

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.places or request_id in self.waiting

    @property
    def idle(self) -> bool:
        """Whether nothing runs."""
        return not self.ids and not self.waiting

    @property
    def fallbacks(self) -> int:
        """Faults of the policy that were mended, those of its time included."""
        return self.guard.fallbacks + self.pause.faults

    # Rows come and go

    @timed
    def join(self, requests: Sequence[Any], features: StepFeatures | None) -> None:
        """Requests whose prompts end in the step that is planned: they begin, or wait until they can."""
        if self.begins_late or self.pause.paused:
            self.waiting.update((request.request_id, request) for request in requests)
        else:
            self.begin(requests, features, ahead=1)

    @timed
    def begin_late(self, features: StepFeatures | None) -> None:
        """Rows begin that had to wait, if their first token is known by now."""
        if not self.pause.paused:
            known = [request for request in self.waiting.values() if request.num_output_tokens]
            if known:
                self.begin(known, features, ahead=0)

    def begin(self, requests: Sequence[Any], features: StepFeatures | None, *, ahead: int) -> None:
        """Requests join the rows, after those that are there; preempted ones take up their state.

        Args:
            features: of the tokens that were decided last.
            ahead: tokens that the running pass decides of each beside those that are known: 1 where it ends a prompt.
        """
        fresh = [request for request in requests if request.request_id not in self.parked]
        for request in (*fresh, *(request for request in requests if request.request_id in self.parked)):
            self.waiting.pop(request.request_id, None)
            self.places[request.request_id] = len(self.ids)
            self.ids.append(request.request_id)
            self.requests.append(request)
            self.chosen.append(self.default_length)
        new = self.requests[len(self.counts[0]) :]
        known = [(request.num_output_tokens + ahead, request.max_tokens, request.num_tokens + ahead) for request in new]
        position, most, length = np.array(known, np.int64).T
        self.counts = np.concatenate([self.counts, [position, most - position, length]], axis=1)
        if fresh:
            self._number(fresh)
            places = range(len(self) - len(new), len(self) - len(new) + len(fresh))
            with self._asked():
                self.guard.begin(self._context(places, features, len(self), with_prefill=True))
        for request in new[len(fresh) :]:
            state, number = self.parked.pop(request.request_id)
            self.numbers.append(number)
            self.guard.resume(state)

    def _number(self, fresh: Sequence[Any]) -> None:
        """Give requests that begin their numbers."""
        for request in fresh:
            number = next(self._next_number)
            self.numbers.append(number)
            self._unseen.add(number)
            length, most = request.num_prompt_tokens, request.max_tokens
            self.records.begin(number, self.text, self.policy, self.spec, length, most, request.sampling_params)

    def park(self, request_id: str) -> None:
        """A request was preempted: its state waits until it runs again."""
        self.waiting.pop(request_id, None)
        place = self.places.get(request_id)
        if place is not None:
            self.parked[request_id] = self.guard.rows_of([place]), self.numbers[place]
            self._keep([i for i in range(len(self)) if i != place])

    def forget(self, request_id: str) -> None:
        """A request ended: it will not begin or go on."""
        self.waiting.pop(request_id, None)
        parked = self.parked.pop(request_id, None)
        if parked is not None:
            self._end(parked[1], complete=False)

    def drop(self, request_id: str) -> None:
        """The row of a request that was given up leaves."""
        place = self.places.get(request_id)
        if place is not None:
            self._end(self.numbers[place], complete=False)
            self._keep([i for i in range(len(self)) if i != place])

    def leave(self, ended: Sequence[int]) -> None:
        """Rows at these places ended by themselves."""
        with self._asked():
            self.guard.end(ended)
        gone = set(ended)
        for place in ended:
            self._end(self.numbers[place], complete=True)
        self._keep([place for place in range(len(self)) if place not in gone])

    def _end(self, number: int, *, complete: bool) -> None:
        self._unseen.discard(number)
        self.records.end(number, complete=complete, fallbacks=self._new_faults())

    def _new_faults(self) -> int:
        return self.guard.new_fallbacks() + self.pause.new_faults()

    def _keep(self, places: list[int]) -> None:
        self.guard.keep(places)
        for name in ("requests", "ids", "numbers", "chosen"):
            held = getattr(self, name)
            setattr(self, name, [held[place] for place in places])
        self.places = dict(zip(self.ids, range(len(self)), strict=True))
        self.counts = self.counts[:, places]

    # A step

    @timed
    def truncate(self, features: StepFeatures | None) -> PlannedRows:
        """Cut the drafts that wait in vLLM to what is worth verifying, and to what may still be generated."""
        waiting = [len(request.spec_token_ids) for request in self.requests]
        drafted = list(map(min, waiting, self.chosen))
        planned = PlannedRows(list(self.ids), [length + 1 for length in self.chosen], drafted)
        kept = drafted
        if any(drafted) and self.guard.truncates and not self.pause.paused:
            with self._asked():
                kept = self.guard.truncate(self._draft(planned, features))
        most = (self.counts[1] - 1).tolist()
        for request, made, keeps, left in zip(self.requests, waiting, kept, most, strict=True):
            if keeps > left:
                keeps = max(left, 0)
            if keeps < made:  # a new list: with two steps in flight vLLM shares one between requests
                request.spec_token_ids = request.spec_token_ids[:keeps]
        return planned

    @timed
    def select(self, scheduled: Mapping[str, int], features: StepFeatures | None) -> int:
        """Choose the length of the draft that this step makes of each row in it; the longest of them."""
        places = [place for place, name in enumerate(self.ids) if name in scheduled]
        first = self.default_length if any(name in scheduled for name in self.waiting) else 0
        if not places:
            return first
        if not self.pause.paused:
            with self._asked(), self._only(places):
                sizes, *_ = self.guard.select(self._context(places, features, len(self)))
            for place, size in zip(places, sizes, strict=True):
                self.chosen[place] = size - 1
        return max(first, *(self.chosen[place] for place in places))

    @timed
    def observe(
        self, planned: PlannedRows, scheduled: Mapping[str, int], verified: Mapping[str, Sequence[int]], seconds: float
    ) -> None:
        """Count what the rows of a step yield; tell the policy, and the observers.

        Args:
            scheduled: tokens in the step, by request. verified: the drafted tokens that were verified, by request.
            seconds: of the step, of which these rows are charged their share.
        """
        observed = self.records.observers.active
        if observed:
            self._record_first(seconds)
        joined = self._joined(planned, scheduled, verified)
        if not len(joined):
            return
        places = joined[0].tolist()
        seconds *= len(places) / len(scheduled)
        decisions, self._told = self.seconds - self._told, self.seconds
        if observed or self.guard.observes:
            step = self._step(places, joined, Seconds(verify=max(seconds - decisions, 0.0), policy=decisions))
            if not self.pause.paused:
                with self._asked(), self._only(places):
                    self.guard.observe(step)
            self.records.record(step)
        self.counts[:, places] += joined[1] * GROWTH
        self.steps += 1
        self.rows += len(places)
        in_policy, self._in_policy = self._in_policy, 0.0
        self.pause.after(in_policy)

    def _joined(
        self, planned: PlannedRows, scheduled: Mapping[str, int], verified: Mapping[str, Sequence[int]]
    ) -> Ints:
        """Of rows that yield something: place, tokens, block size, draft length, verified tokens; int64 [5, rows]."""
        position, joined = self.counts[0].tolist(), []
        for name, size, drafted in zip(planned.ids, planned.block_size, planned.draft_length, strict=True):
            place = self.places.get(name)
            if place is None or name not in scheduled:
                continue
            more, width = self.requests[place].num_output_tokens - position[place], len(verified.get(name, ()))
            if more > width + 1:  # some are of a pass before a preemption
                self.counts[:, place] += more * GROWTH[:, 0]
            elif more > 0:
                joined.append((place, more, size, drafted, width))
        return np.array(joined, np.int64).T

    def _record_first(self, seconds: float) -> None:
        """Tell observers of the first tokens of rows."""
        seen = [
            place
            for place, (number, request) in enumerate(zip(self.numbers, self.requests, strict=True))
            if number in self._unseen and request.num_output_tokens
        ]
        if not seen:
            return
        requests, ids = [self.requests[place] for place in seen], tuple(self.numbers[place] for place in seen)
        self._unseen.difference_update(ids)
        first = torch.tensor([[request.output_token_ids[0]] for request in requests])
        ended = tuple(request.is_finished() and request.num_output_tokens == 1 for request in requests)
        self.records.record(Prefill(first, Seconds(verify=seconds), (0,) * len(ids), ids, ended))

    def _step(self, places: list[int], joined: Ints, seconds: Seconds) -> Step:
        _, count, *lengths = joined
        block_size, draft_length, verify_length = map(torch.from_numpy, lengths)
        requests = [self.requests[place] for place in places]
        new = [request.output_token_ids[-more:] for request, more in zip(requests, count.tolist(), strict=True)]
        tokens = np.zeros((len(places), max(map(len, new))), np.int64)
        tokens[np.arange(tokens.shape[1]) < count[:, None]] = [*chain.from_iterable(new)]
        return Step(
            block_size=block_size,
            draft_length=draft_length,
            verify_length=verify_length,
            num_accepted=torch.from_numpy(count - 1),
            tokens=torch.from_numpy(tokens),
            position=torch.from_numpy(self.counts[0, places]),
            seconds=seconds,
            fallbacks=self._new_faults(),
            near_ties=(0,) * len(places),
            row_ids=tuple(self.numbers[place] for place in places),
            stopped=tuple(request.is_finished() for request in requests),
        )

    # What the policy is handed

    def _context(
        self, places: Sequence[int], features: StepFeatures | None, running: int, *, with_prefill: bool = False
    ) -> Context:
        whole = len(places) == len(self)
        position, remaining, length = (torch.from_numpy(row) for row in self.counts[:, places])
        names = self.provided - OF_THE_DRAFT - (frozenset() if with_prefill else OF_PREFILL)
        return Context(
            self.spec,
            position,
            remaining,
            length,
            self.generator,
            features=features.of_target([self.ids[place] for place in places], names) if features and names else {},
            row_ids=tuple(self.numbers if whole else [self.numbers[place] for place in places]),
            running=running,
        )

    def _draft(self, planned: PlannedRows, features: StepFeatures | None) -> Draft:
        length, width = planned.draft_length, max(planned.draft_length)
        names, known = self.provided & OF_THE_DRAFT, dict[Feature, Tensor]()
        if names:
            known = (features or StepFeatures.none()).of_draft(self.requests, self.ids, length, names)
        context = self._context(range(len(self)), None, len(self))
        return Draft(
            context,
            torch.from_numpy(np.array(planned.block_size)),
            torch.from_numpy(np.array(length)),
            context.position.new_zeros(1, 1).expand(len(self), width),
            features=known,
        )

    @contextmanager
    def _only(self, places: Sequence[int]) -> Iterator[None]:
        """Within this, the policy's state is that of some rows."""
        if len(places) == len(self):
            yield
            return
        with self.guard.only(places):
            yield

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Within this the policy itself works."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._in_policy += time.perf_counter() - started
