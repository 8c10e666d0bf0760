"""Watches a policy at work: what each method was handed, what it answered, what it read, drew and changed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bpkit.policy import Policy, overrides
from bpkit.testing.checks.answers import Fault, Kind, wrong_answer
from bpkit.testing.checks.copies import Given, copied, differences, generator_of
from bpkit.types import Context, Draft, Feature, FeatureNotWanted


@dataclass
class Call:
    """One call of a method.

    Attributes:
        given: a copy of what was handed over, made before; None for `end`.
        answer: of `select` and `truncate` the numbers, of `extend` the truth values, else None.
        drew: whether it took numbers from `context.generator`.
        seconds: that the call took.
    """

    method: str
    given: Given | None
    answer: list[int] | None = None
    drew: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Change:
    """Something that was handed over and is not what it was: `what` after `method`."""

    method: str
    what: str
    before: str
    after: str


class Reads(dict[Feature, Tensor]):
    """Features that note who reads them.

    Args:
        seen: features read. missed: names that were asked for and are not there.
    """

    def __init__(self, features: Any, seen: set[str], missed: set[str]) -> None:
        super().__init__(features)
        self.seen, self.missed = seen, missed

    def __getitem__(self, name: Any) -> Tensor:
        self._note(name)
        return super().__getitem__(name)

    def get(self, name: Any, default: Any = None) -> Any:
        self._note(name)
        return super().get(name, default)

    def items(self) -> Any:
        self.seen.update(map(str, self))
        return super().items()

    def values(self) -> Any:
        self.seen.update(map(str, self))
        return super().values()

    def _note(self, name: Any) -> None:
        (self.seen if name in self else self.missed).add(str(name))


class Witness:
    """Stands between runtime and policy, on the policy's own instance, so that names in messages stay its own.

    Args:
        force: block size that is drafted whatever `select` answers, as an engine with limits of its own might.

    Attributes:
        calls: of the request that runs. read, missed: features by method, over all requests.
        fault: the first, if there was one.
    """

    def __init__(self, policy: Policy, largest: int, *, force: int | None = None) -> None:
        self.policy, self.largest, self.force = policy, largest, force
        self.calls: list[Call] = []
        self.read: dict[str, set[str]] = {}
        self.missed: dict[str, set[str]] = {}
        self.changes: list[Change] = []
        self.fault: Fault | None = None
        self._handed: list[tuple[str, Given, Given]] = []
        self._inside = False
        for method in ("begin", "select", "extend", "truncate", "observe", "end"):
            if method in ("begin", "select", "end") or overrides(policy, method):
                setattr(policy, method, self._watched(method, getattr(policy, method)))
        if overrides(policy, "predict"):
            policy.predict = self._watched_predict(policy.predict)  # type: ignore[method-assign]

    def take(self) -> list[Call]:
        """The calls since the last time this was asked."""
        calls, self.calls = self.calls, []
        self._handed = []
        return calls

    def _watched(self, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self._inside:  # one method of the policy calls another
                return original(*arguments)
            self._inside = True
            try:
                return self._call(method, original, arguments)
            finally:
                self._inside = False

        return call

    def _watched_predict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Features are noted as read; nothing is decided yet, so it is no call of its own."""

        def predict(features: Any) -> Any:
            seen, missed = self.read.setdefault("predict", set()), self.missed.setdefault("predict", set())
            try:
                return original(features if isinstance(features, Reads) else Reads(features, seen, missed))
            except Exception as error:
                self._faulty(Fault("predict", "raised", f"it raised {type(error).__name__}: {error}"))
                raise

        return predict

    def _call(self, method: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        given = None if method == "end" else arguments[-1]
        made = Call(method, None if given is None else copied(given))
        self.calls.append(made)
        if given is not None:
            given = self._hand_over(method, given)
            arguments = (*arguments[:-1], given)
        generator = generator_of(given)
        before = None if generator is None else generator.get_state()
        begun = time.perf_counter()
        try:
            answer = original(*arguments)
        except Exception as error:
            kind: Kind = "feature" if isinstance(error, FeatureNotWanted) else "raised"
            self._faulty(Fault(method, kind, f"it raised {type(error).__name__}: {error}"))
            raise
        made.seconds = time.perf_counter() - begun
        made.drew = generator is not None and before is not None and not torch.equal(before, generator.get_state())
        self._compare(method)
        wrong = wrong_answer(method, answer, given, self.largest)
        if wrong is not None:
            self._faulty(wrong)
        elif method in ("select", "truncate", "extend"):
            made.answer = [int(number) for number in answer.tolist()]
            if method == "select" and self.force is not None:
                return torch.full_like(answer, self.force)
        return answer

    def _hand_over(self, method: str, given: Given) -> Given:
        """The object that the policy gets: the runtime's tensors, with features that note who reads them."""
        seen, missed = self.read.setdefault(method, set()), self.missed.setdefault(method, set())
        handed: Given
        if isinstance(given, Draft):
            context = dataclasses.replace(given.context, features=Reads(given.context.features, seen, missed))
            handed = dataclasses.replace(given, context=context, features=Reads(given.features, seen, missed))
        elif isinstance(given, Context):
            handed = dataclasses.replace(given, features=Reads(given.features, seen, missed))
        else:
            handed = given
        if method == "select":  # of earlier steps only what `begin` got is still looked at
            self._handed = [entry for entry in self._handed if entry[0] == "begin"]
        self._handed.append((method, handed, copied(handed)))
        return handed

    def _compare(self, method: str) -> None:
        """Note what is no longer as it was handed over, to this method or to an earlier one of the step."""
        for place, (handed_to, now, before) in enumerate(self._handed):
            for what, was, is_now in differences(before, now):
                self.changes.append(Change(method, f"{what} (handed to `{handed_to}`)", was, is_now))
                self._handed[place] = (handed_to, now, copied(now))

    def _faulty(self, fault: Fault) -> None:
        if self.fault is None:
            self.fault = fault
