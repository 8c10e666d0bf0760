"""What checks found: failures that say what was done, what was expected and what the policy did."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

State = Literal["passed", "failed", "skipped"]
SHOWN = 5
"""Mistakes that a report tells of for one check; more would hide the first ones."""


@dataclass(frozen=True)
class Failure:
    """One thing that a policy does wrong.

    Attributes:
        did: what the check did, with drafter, prompt and step.
        expected: what should have come of it.
        got: what the policy did instead, and how to mend it where that is known.
        also: where else the same was found, if anywhere.
    """

    did: str
    expected: str
    got: str
    also: str = ""

    def __str__(self) -> str:
        text = f"what was done:   {self.did}\nexpected:        {self.expected}\nwhat happened:   {self.got}"
        return f"{text}\nalso:            {self.also}" if self.also else text


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


def gist(text: str) -> str:
    """A text without its numbers: what one mistake says of two prompts has the same.

    >>> gist("it returned [2.5, 3], above 16") == gist("it returned [4], above 8")
    True
    >>> gist("was [[0.5, 1e-05... and") == gist("was [[0.5]] and")
    True
    """
    without_lists = re.sub(r"\[(?:[-+\d., \[\]]|e[-+]\d|nan|inf)*", "[#]", text)
    return re.sub(r"-?\d+(\.\d+)?", "#", without_lists)


class Findings:
    """Where a check writes what it finds. Failures that differ in numbers alone are one, told as it was first met."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.said = ""
        self._begun = time.perf_counter()
        self._mistakes: dict[tuple[str, str], tuple[Failure, list[str]]] = {}

    @property
    def failures(self) -> list[Failure]:
        """One for each mistake, as it was first met, with where else it was."""
        return [replace(first, also=_elsewhere(*drafters)) for first, drafters in self._mistakes.values()]

    def fail(self, did: str, expected: str, got: str, *, drafter: str = "") -> None:
        """The policy does something wrong; with `drafter`, where it may be found with others as well."""
        _, drafters = self._mistakes.setdefault((gist(expected), gist(got)), (Failure(did, expected, got), []))
        drafters.append(drafter)

    def note(self, text: str) -> None:
        """Something worth knowing that is no failure."""
        if text not in self.notes:
            self.notes.append(text)

    def result(self, name: str, summary: str, skipped: str | None = None) -> Result:
        """What was found since this was made, as a whole."""
        failures, notes = self.failures, self.notes
        if len(failures) > SHOWN:
            notes = [*notes, f"{len(failures) - SHOWN} more failures, which may be of the same cause"]
        state: State = "failed" if failures else "passed" if skipped is None else "skipped"
        said = skipped if skipped is not None and not failures else self.said
        seconds = time.perf_counter() - self._begun
        return Result(name, summary, state, said, tuple(failures[:SHOWN]), tuple(notes), seconds)


def _elsewhere(first: str, *later: str) -> str:
    """How often the same was found after the first time, and with which drafters, by that of each time."""
    others = list(dict.fromkeys(name for name in later if name not in ("", first)))
    more = len(later) - len(others)
    parts = [f"with drafter{'s' if len(others) > 1 else ''} {', '.join(others)}"] if others else []
    if more:
        parts.append("once more" if more == 1 else f"{more} times more")
    return f"the same {', and '.join(parts)}" if parts else ""
