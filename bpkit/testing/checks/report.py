"""What checks found: failures that say what was done, what was expected and what the policy did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["passed", "failed", "skipped"]
SHOWN = 5
"""Failures of one check that a report keeps; more would say the same again."""


@dataclass(frozen=True)
class Failure:
    """One thing that a policy does wrong.

    Attributes:
        did: what the check did, with drafter, prompt and step.
        expected: what should have come of it.
        got: what the policy did instead, and how to mend it where that is known.
    """

    did: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"what was done:   {self.did}\nexpected:        {self.expected}\nwhat happened:   {self.got}"


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        name, summary: of the check.
        said: what was tried, or why it was skipped.
        notes: what is worth knowing and no failure.
        seconds: that the check took.
    """

    name: str
    summary: str
    state: State
    said: str = ""
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        """The failures in full."""
        lines = [f"{self.name}: {self.summary}"]
        for failure in self.failures:
            lines += ["", *(f"    {line}" for line in str(failure).splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What all checks found.

    Attributes:
        policy: as it shows itself. seed: of everything that was drawn.
        drafters: that it was checked with. left_out: drafters that cannot serve it, and why.
    """

    policy: str
    seed: int
    results: tuple[Result, ...]
    drafters: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def failed(self) -> tuple[Result, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if result.state == "failed")

    @property
    def ok(self) -> bool:
        """Whether none failed."""
        return not self.failed

    def __getitem__(self, name: str) -> Result:
        """The result of a check by name. Raises KeyError."""
        return {result.name: result for result in self.results}[name]

    def __str__(self) -> str:
        """The verdict, and every failure in full."""
        run = [result for result in self.results if result.state != "skipped"]
        if self.ok:
            return f"{self.policy}: {len(run)} checks passed"
        return "\n\n".join([f"{self.policy}: {len(self.failed)} of {len(run)} checks failed", *map(str, self.failed)])

    def raise_for_failures(self) -> None:
        """Raise PolicyCheckError if a check failed."""
        if not self.ok:
            raise PolicyCheckError(self)

    def with_results(self, more: Iterable[Result]) -> Report:
        """The same with further results."""
        return Report(self.policy, self.seed, (*self.results, *more), self.drafters, self.left_out)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema_version": 1, "ok": self.ok, **asdict(self), "left_out": dict(self.left_out)}


class PolicyCheckError(AssertionError):
    """A policy failed a check; the text lists each failure. `report` has all results."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


class Skip(Exception):
    """A check does not apply; the message says why."""


class Findings:
    """Where a check writes what it finds. The first failures are kept, and equal ones once."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.notes: list[str] = []
        self.said = ""
        self._more = 0

    def fail(self, did: str, expected: str, got: str) -> None:
        """The policy does something wrong."""
        failure = Failure(did, expected, got)
        if failure in self.failures:
            return
        if len(self.failures) < SHOWN:
            self.failures.append(failure)
        else:
            self._more += 1

    def note(self, text: str) -> None:
        """Something worth knowing that is no failure."""
        if text not in self.notes:
            self.notes.append(text)

    def result(self, name: str, summary: str, seconds: float, skipped: str | None = None) -> Result:
        """What was found, as a whole."""
        notes = [*self.notes, f"{self._more} more failures of this kind"] if self._more else self.notes
        state: State = "failed" if self.failures else "passed"
        said = self.said
        if skipped is not None and not self.failures:
            state, said = "skipped", skipped
        return Result(name, summary, state, said, tuple(self.failures), tuple(notes), seconds)
