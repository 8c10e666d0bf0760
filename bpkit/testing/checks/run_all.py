"""`check_policy`: all checks on one policy."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from bpkit.progress import Progress
from bpkit.testing.checks.check import without
from bpkit.testing.checks.report import Report, Result
from bpkit.testing.checks.subject import PolicyToCheck, Subject
from bpkit.testing.checks.surroundings import undisturbed


def check_policy(policy: PolicyToCheck, *, seed: int = 0, skip: Collection[str] = ()) -> Report:
    """Run all checks of a policy on the tiny pair.

    Args:
        policy: a Policy class, or what `bpkit.resolve_policy` takes: `"name:key=value"`, `"./file.py:Class"`, a
            mapping, an instance (of which copies are checked). One with trained weights is checked with fresh ones.
        seed: of everything that is drawn.
        skip: names of checks to leave out.

    Raises:
        PolicyCheckError: a check failed; the text lists each failure.
        PolicyError: there is no such policy, or no drafter of the tiny pair can serve it.
        ValueError: there is no check of a name in `skip`.

    >>> check_policy("fixed:4", skip=["survival"]).ok
    True
    """
    report = report_on(policy, seed=seed, skip=skip)
    report.raise_for_failures()
    return report


def report_on(
    policy: PolicyToCheck, *, seed: int = 0, skip: Collection[str] = (), progress: Progress | None = None
) -> Report:
    """The same without raising for what the checks find."""
    checks = without(tuple(skip))
    with undisturbed():
        subject = Subject(policy, seed)
        results: list[Result] = []
        for check in checks:
            if progress is not None:
                progress.start(check.name, len(checks))
                for _ in results:
                    progress.tick()
            results.append(check.run(subject))
        return Report(subject.shown, seed, tuple(results), *subject.served)


def subject_of(policy: PolicyToCheck, seed: int) -> Subject:
    """The policy with what is needed to check it; of a class it is made once, for checks that are called one by one."""
    if not isinstance(policy, type):
        return Subject(policy, seed)
    kind: Any = policy
    return _of_class(kind, seed)


@functools.lru_cache(maxsize=8)
def _of_class(policy: Any, seed: int) -> Subject:
    return Subject(policy, seed)
