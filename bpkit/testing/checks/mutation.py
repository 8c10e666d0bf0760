"""The policy writes to its own state and to nothing else that it is handed."""

from __future__ import annotations

from bpkit.testing.checks.report import Findings, Skip
from bpkit.testing.checks.subject import Subject


def mutation(subject: Subject, out: Findings) -> None:
    """What contexts, drafts and steps of the usual runs looked like before and after."""
    calls = 0
    for drafter, player in subject.players.items():
        calls += sum(len(run.calls) for run in subject.usual[drafter])
        for change in player.witness.changes:
            out.fail(
                f"called {subject.name}.{change.method} while decoding, drafter {drafter}",
                "contexts, drafts and steps stay as they were: they are the runtime's, `state` alone is the policy's",
                f"{change.what} was {change.before} and is {change.after}: work on a copy (`.clone()`)",
                drafter=drafter,
            )
    if not calls:
        raise Skip("no method of the policy was ever called; mend the other failures first")
    out.said = f"{calls} calls looked at, before and after"
