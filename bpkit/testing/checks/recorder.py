"""Records a policy at work: what each method was handed, answered, read and changed, and what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bpkit.decode.decoder import SpeculativeDecoder
from bpkit.decode.guard import PolicyFault
from bpkit.decode.result import Generation
from bpkit.policy import overrides
from bpkit.testing.checks.answers import DECIDES, Fault, Kind, raised, wrong_answer
from bpkit.testing.checks.records import Given, NotedFeatures, copied, differences
from bpkit.testing.checks.setup import Case
from bpkit.testing.checks.surroundings import seed_everything
from bpkit.types import Context, Draft, FeatureNotWanted


@dataclass
class Call:
    """One call of a method.

    Attributes:
        given: a copy of what was handed over, made before; None for `end`.
        answer: of `select` and `truncate` the numbers, of `extend` the truth values, else None.
        seconds: that the call took.
    """

    method: str
    given: Given | None
    answer: list[int] | None = None
    seconds: float = 0.0


@dataclass
class Recording:
    """One generation.

    Attributes:
        drafter: its name in the setup. calls: of the policy, in order.
        made: what was generated, or None if the policy's fault ended it, or if requests overlapped.
    """

    drafter: str
    case: Case
    calls: list[Call] = field(default_factory=list)
    made: Generation | None = None
    fault: Fault | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of the output; none if there is no output."""
        return () if self.made is None else tuple(self.made.tokens[0].tolist())

    @property
    def decisions(self) -> list[tuple[str, list[int]]]:
        """Every decision in order: the method and its answer."""
        return [(call.method, call.answer) for call in self.calls if call.answer is not None]

    def __str__(self) -> str:
        return f"drafter {self.drafter}, {self.case}"


class Difference(NamedTuple):
    """The first decision that differs between two recordings of one case: its place in words, and both answers."""

    where: str
    one: str
    other: str


def first_difference(one: Recording, other: Recording, methods: Collection[str] = DECIDES) -> Difference | None:
    """Which decision differs, if one does."""
    if other.fault is not None:
        return Difference(f"the answer of {other.fault.method}", "a decision", f"none ({other.fault.text})")
    ours, theirs = ([made for made in each.decisions if made[0] in methods] for each in (one, other))
    for place, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        if mine != yours:
            count = sum(method == mine[0] for method, _ in ours[: place + 1])
            got = str(yours[1]) if mine[0] == yours[0] else f"one of {yours[0]} instead"
            return Difference(f"answer {count} of {mine[0]}", str(mine[1]), got)
    if len(ours) != len(theirs):
        return Difference("the number of decisions", str(len(ours)), str(len(theirs)))
    return None


class Change(NamedTuple):
    """Something that was handed over and is not what it was: `what` after `method`."""

    method: str
    what: str
    before: str
    after: str


class CallRecorder:
    """Stands between a decoder and its policy, on the policy's own instance, so that names in messages stay its own.

    Args:
        decoder: strict. drafter: name of its drafter, for messages.
        force: block size that is drafted whatever `select` answers, as an engine with limits of its own might.
        blamed: errors in decoding that are the policy's; with tiny models any is, by what it left behind.

    Attributes:
        read, missed: features by method, over all requests. changes: over all requests.
        fault: the first, if there was one.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        drafter: str,
        *,
        force: int | None = None,
        blamed: type[Exception] = Exception,
    ) -> None:
        self.decoder, self.policy, self.drafter = decoder, decoder.policy, drafter
        self.force, self.blamed = force, blamed
        self.read: dict[str, set[str]] = {}
        self.missed: dict[str, set[str]] = {}
        self.changes: list[Change] = []
        self.fault: Fault | None = None
        self._calls: list[Call] = []
        self._handed: list[tuple[str, Given, Given]] = []
        self._inside = False
        for method in ("begin", "select", "extend", "truncate", "observe", "end"):
            if method in ("begin", "select", "end") or overrides(self.policy, method):
                setattr(self.policy, method, self._recorded(method, getattr(self.policy, method)))
        if overrides(self.policy, "predict"):
            self.policy.predict = self._noting(self.policy.predict)  # type: ignore[method-assign]

    def record(self, case: Case, *, surroundings: int = 0) -> Recording:
        """Decode; a fault of the policy ends it and is noted.

        Args:
            surroundings: seed of the global generators while it decodes.
        """
        seed_everything(surroundings)
        recording = Recording(self.drafter, case)
        try:
            recording.made = self.decoder.generate(case.prompt, **case.options())
        except self.blamed as error:
            recording.fault = self._fault_behind(error)
        recording.calls = self._taken()
        return recording

    def record_in_turn(self, cases: Sequence[Case], after: Callable[[], None]) -> list[Recording]:
        """Decode several requests at the same time, a record of each in turn; the first fault ends them all.

        Args:
            after: is called after every record.
        """
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
                        recording.fault = self._fault_behind(error)
                    recording.calls += self._taken()
                    after()
                    if recording.fault is not None:
                        return recordings
        return recordings

    def _taken(self) -> list[Call]:
        """The calls since the last time this was asked."""
        calls, self._calls, self._handed = self._calls, [], []
        return calls

    def _fault_behind(self, error: Exception) -> Fault:
        """What was recorded, else what the runtime says."""
        text = str(error)
        if not isinstance(error, PolicyFault):  # the policy left something behind that the runtime stumbled over
            text = f"decoding ended with {type(error).__name__}: {error}"
        return self.fault or Fault("a method", "raised", text)

    def _recorded(self, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._inside:  # one method of the policy calls another
                return original(*arguments)
            self._inside = True
            try:
                return self._call(method, original, arguments)
            finally:
                self._inside = False

        return call

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`predict`: features are noted as read; nothing is decided yet, so it is no call of its own."""

        def predict(features: Any) -> Any:
            try:
                return original(features if isinstance(features, NotedFeatures) else self._noted("predict", features))
            except Exception as error:
                self._faulty(Fault("predict", "raised", raised(error)))
                raise

        return predict

    def _call(self, method: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        given = None if method == "end" else arguments[-1]
        made = Call(method, None if given is None else copied(given))
        self._calls.append(made)
        if given is not None:
            given = self._hand_over(method, given)
            arguments = (*arguments[:-1], given)
        begun = time.perf_counter()
        try:
            answer = original(*arguments)
        except Exception as error:
            kind: Kind = "feature" if isinstance(error, FeatureNotWanted) else "raised"
            self._faulty(Fault(method, kind, raised(error)))
            raise
        made.seconds = time.perf_counter() - begun
        self._compare(method)
        wrong = wrong_answer(method, answer, given, self.decoder.spec.max_block_size)
        if wrong is not None:
            self._faulty(wrong)
        elif method in DECIDES:
            made.answer = [int(number) for number in answer.tolist()]
            if method == "select" and self.force is not None:
                return torch.full_like(answer, self.force)
        return answer

    def _hand_over(self, method: str, given: Given) -> Given:
        """The object that the policy gets: the runtime's tensors, with features that note who reads them."""
        handed = given
        if isinstance(handed, Draft):
            context = dataclasses.replace(handed.context, features=self._noted(method, handed.context.features))
            handed = dataclasses.replace(handed, context=context)
        if isinstance(handed, Context | Draft):
            handed = dataclasses.replace(handed, features=self._noted(method, handed.features))
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
                self.changes.append(Change(method, f"{what} (handed to `{handed_to}`)", was, is_now))
                self._handed[place] = (handed_to, now, copied(now))

    def _faulty(self, fault: Fault) -> None:
        self.fault = self.fault or fault
