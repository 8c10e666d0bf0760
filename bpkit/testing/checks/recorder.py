"""Records a policy at work: what each method was handed, answered, read and changed, and what came of it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from torch import Tensor

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.guard import OutOfRange, PolicyFault
from bpkit.decode.result import Generation
from bpkit.policy import Policy, overrides
from bpkit.testing.checks.records import DECIDES, Decided, Given, NotedFeatures, copied, differences, numbers
from bpkit.testing.checks.setup import Case
from bpkit.testing.checks.surroundings import seed_everything
from bpkit.types import Context, Draft, FeatureNotWanted, Plan


class Fault(NamedTuple):
    """Why a decision could not be used.

    Attributes:
        kind: `raised` an exception; `feature`: read one that is not there; `answer`: it is no decision (shape, type,
            NaN); `size`: it is one, but out of range.
        text: what the policy did.
    """

    method: str
    kind: Literal["raised", "feature", "answer", "size"]
    text: str


def raised(error: Exception) -> str:
    """What a policy did that raised, or answered something that it may not."""
    return str(error) if isinstance(error, PolicyFault) else f"it raised {type(error).__name__}: {error}"


def _fault_behind(error: Exception) -> Fault:
    """What ended decoding with a strict decoder."""
    cause = error.__cause__
    if not isinstance(error, PolicyFault):  # the policy left something behind that the runtime stumbled over
        return Fault("a method", "raised", f"decoding ended with {type(error).__name__}: {error}")
    assert isinstance(cause, Exception)
    if isinstance(cause, PolicyFault):
        return Fault(error.method, "size" if isinstance(cause, OutOfRange) else "answer", raised(cause))
    return Fault(error.method, "feature" if isinstance(cause, FeatureNotWanted) else "raised", raised(cause))


@dataclass
class Call:
    """One call of a method.

    Attributes:
        given: a copy of what was handed over, made before; None for `end`.
        answer: of `select` and `truncate` the numbers (of a Plan pairs of block size and source), of `extend` the truth
            values, else None.
        seconds: that the call took.
    """

    method: str
    given: Given | None
    answer: Decided | None = None
    seconds: float = 0.0


@dataclass
class Recording:
    """One generation.

    Attributes:
        drafter: its name in the setup. calls: of the policy for this request alone, in order.
        made: what was generated, or None if the policy's fault ended it, or if requests overlapped.
        beside: whether it ran in a batch, beside others.
    """

    drafter: str
    case: Case
    calls: list[Call] = field(default_factory=list)
    made: Generation | None = None
    fault: Fault | None = None
    beside: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of the output; none if there is no output."""
        return () if self.made is None else tuple(self.made.tokens[0].tolist())

    @property
    def decisions(self) -> list[tuple[str, Decided]]:
        """Every decision in order: the method and its answer."""
        return [(call.method, call.answer) for call in self.calls if call.answer is not None]

    def __str__(self) -> str:
        return f"drafter {self.drafter}, {self.case}{', beside others in a batch' if self.beside else ''}"


class Difference(NamedTuple):
    """The first decision in which recordings of one case differ: its place in words, both answers, the step."""

    where: str
    one: str
    other: str
    step: int


def first_difference(one: Recording, other: Recording, methods: Collection[str] = DECIDES) -> Difference | None:
    """Which decision differs, if one does. Every step, from 1, begins with `select`."""
    ours, theirs = ([made for made in each.decisions if made[0] in methods] for each in (one, other))
    place = next((i for i, (mine, yours) in enumerate(zip_longest(ours, theirs)) if mine != yours), len(ours))
    asked = [method for method, _ in ours[: place + 1]]
    step = asked.count("select")
    if other.fault is not None:
        return Difference(f"the answer of {other.fault.method}", "a decision", f"none ({other.fault.text})", step)
    if place < min(len(ours), len(theirs)):
        (method, mine), (instead, yours) = ours[place], theirs[place]
        got = str(yours) if method == instead else f"one of {instead} instead"
        return Difference(f"answer {asked.count(method)} of {method}", str(mine), got, step)
    if len(ours) != len(theirs):
        return Difference("the number of decisions", str(len(ours)), str(len(theirs)), step)
    return None


class CallRecorder:
    """Stands between a decoder and its policy, on the policy's own instance, so that names in messages stay its own.

    Args:
        decoder: strict. drafter: name of its drafter, for messages.
        force: block sizes that are drafted by what `select` answers, as of an engine with limits of its own.
        blamed: errors in decoding that are the policy's; with tiny models any is, by what it left behind.

    Attributes:
        read, missed: features by method, over all requests.
        changes: over all requests, the method after which something was not what was handed over, and what.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        drafter: str,
        *,
        force: Callable[[Tensor], Tensor] | None = None,
        blamed: type[Exception] = Exception,
    ) -> None:
        self.decoder, self.policy, self.drafter = decoder, decoder.policy, drafter
        self.force, self.blamed = force, blamed
        self.read: dict[str, set[str]] = {}
        self.missed: dict[str, set[str]] = {}
        self.changes: list[tuple[str, str]] = []
        self._calls: list[Call] = []
        self._handed: list[tuple[str, Given, Given]] = []
        self._inside = False
        methods = ("begin", "predict", "select", "extend", "truncate", "observe", "end")
        self._listening = {
            method: functools.partial(self._call, method, getattr(self.policy, method))
            for method in methods
            if method in ("begin", "select", "end") or overrides(self.policy, method)
        }
        vars(self.policy).update(self._listening)

    def policy_now(self) -> Policy:
        """A copy of the policy that knows what it knows now, whose calls are not recorded."""
        for method in self._listening:
            del vars(self.policy)[method]
        try:
            return copy.deepcopy(self.policy)
        finally:
            vars(self.policy).update(self._listening)

    def record(self, case: Case, *, surroundings: int = 0) -> Recording:
        """Decode; a fault of the policy ends it and is noted. `surroundings` seeds the global generators meanwhile."""
        seed_everything(surroundings)
        recording = Recording(self.drafter, case)
        try:
            recording.made = self.decoder.generate(case.prompt, **case.options())
        except self.blamed as error:
            recording.fault = _fault_behind(error)
        recording.calls = self._taken()
        return recording

    def record_together(self, cases: Sequence[Case], most: int) -> list[Recording]:
        """Decode requests in one batch, `most` at a time; the first fault ends them all. Calls are of several rows."""
        seed_everything(0)
        recordings = [Recording(self.drafter, case, beside=True) for case in cases]
        prompts = [case.as_prompt() for case in cases]
        try:
            for recording, made in zip(recordings, self.decoder.generate(prompts, batch_size=most), strict=True):
                if made.error is not None:
                    raise made.error
                recording.made = made
        except self.blamed as error:
            for recording in recordings:
                recording.fault = _fault_behind(error)
        self._taken()
        return recordings

    def record_in_turn(self, cases: Sequence[Case], after: Callable[[], None]) -> list[Recording]:
        """Decode requests at the same time, a record of each in turn, `after` each; the first fault ends them all."""
        seed_everything(0)
        recordings = [Recording(self.drafter, case) for case in cases]
        with ExitStack() as opened:
            runs = [opened.enter_context(self.decoder.run(case.prompt, **case.options())) for case in cases]
            turns = list(zip(recordings, runs, strict=True))
            while turns:
                for recording, run in tuple(turns):
                    try:
                        if next(run, None) is None:
                            turns.remove((recording, run))
                    except Exception as error:
                        recording.fault = _fault_behind(error)
                    recording.calls += self._taken()
                    after()
                    if recording.fault is not None:
                        return recordings
        return recordings

    def _taken(self) -> list[Call]:
        """The calls since the last time this was asked."""
        calls, self._calls, self._handed = self._calls, [], []
        return calls

    def _call(self, method: str, original: Callable[..., Any], *arguments: Any) -> Any:
        if self._inside:  # one method of the policy calls another
            return original(*arguments)
        self._inside = True
        try:
            if method == "predict":  # nothing is decided yet, so it is no call of its own
                return original(self._noted(method, *arguments))
            return self._recorded(method, original, *arguments)
        finally:
            self._inside = False

    def _recorded(self, method: str, original: Callable[..., Any], *arguments: Any) -> Any:
        *state, given = (*arguments, None) if method == "end" else arguments
        made = Call(method, None if given is None else copied(given))
        self._calls.append(made)
        handed = () if given is None else (self._hand_over(method, given),)
        begun = time.perf_counter()
        answer = original(*state, *handed)
        made.seconds = time.perf_counter() - begun
        self._compare(method)
        if method in DECIDES:
            assert made.given is not None
            made.answer = numbers(method, answer, made.given)
            if method == "select" and self.force is not None:
                if isinstance(answer, Plan):
                    forced = self.force(answer.block_size)
                    return dataclasses.replace(answer, block_size=forced, parents=None, ranks=None)
                return self.force(answer)
        return answer

    def _hand_over(self, method: str, given: Given) -> Given:
        """The object that the policy gets: the runtime's tensors, with features that note who reads them."""
        handed: Given = given
        if isinstance(given, Context | Draft):
            handed = dataclasses.replace(given, features=self._noted(method, given.features))
        if isinstance(handed, Draft):
            context = handed.context
            handed.context = dataclasses.replace(context, features=self._noted(method, context.features))
        if method == "select":  # of earlier steps only what `begin` got is still looked at
            self._handed = [entry for entry in self._handed if entry[0] == "begin"]
        self._handed.append((method, handed, copied(handed)))
        return handed

    def _noted(self, method: str, features: Any) -> NotedFeatures:
        return NotedFeatures(features, self.read.setdefault(method, set()), self.missed.setdefault(method, set()))

    def _compare(self, method: str) -> None:
        """Note what is no longer as it was handed over, to this method or to an earlier one of the step."""
        for place, (handed_to, now, before) in enumerate(self._handed):
            for what, was, is_now in differences(before, now):
                self.changes.append((method, f"{what} (handed to `{handed_to}`) was {was} and is {is_now}"))
                self._handed[place] = (handed_to, now, copied(now))
