"""The checks, and `check_policy`, which runs them all. Listing them imports no torch: each is imported when it runs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from bpkit.progress import NoProgress, Progress
from bpkit.testing.checks.report import Findings, Report, Result, Skip

if TYPE_CHECKING:
    from bpkit.testing.checks.checked_policy import CheckedPolicy, PolicyToCheck


@dataclass(frozen=True)
class Check:
    """One thing that is checked.

    Attributes:
        name: also of the function in `module`, one of `bpkit.testing.checks`.
        summary: what holds for a policy that passes.
    """

    name: str
    module: str
    summary: str

    def __call__(self, policy: PolicyToCheck, *, seed: int = 0) -> Result:
        """Run this check alone. A class is decoded with once for all checks that are called like this.

        Args:
            policy: as `check_policy` takes it. seed: of everything that is drawn.

        Raises:
            PolicyCheckError: the policy fails it. PolicyError: there is no such policy, or no drafter serves it.
        """
        others = [check.name for check in _CHECKS if check.name != self.name]
        return check_policy(policy, seed=seed, skip=others).results[0]

    def run(self, policy: CheckedPolicy) -> Result:
        """What this check finds, without raising."""
        function = getattr(importlib.import_module(f"bpkit.testing.checks.{self.module}"), self.name)
        out, skipped = Findings(), None
        try:
            function(policy, out)
        except Skip as reason:
            skipped = str(reason)
        return out.result(self.name, self.summary, skipped)


_CHECKS = (
    Check("lossless", "usual", "whatever it decides, the text is that of plain decoding; it is never overruled"),
    Check("sizes", "usual", "block sizes are 1 .. max_block_size, verified lengths 0 .. draft_length, whole numbers"),
    Check("features", "usual", "it reads the features that `wants` declares, all of them and no others"),
    Check("mutation", "usual", "it changes nothing that it is handed but its own state"),
    Check("determinism", "repeated", "the same seed and the same clock give the same decisions"),
    Check("rows", "rows", "what it decides for a request does not depend on the requests beside it"),
    Check("overlap", "overlap", "what it decides for a request does not depend on those that run at the same time"),
    Check("memory", "repeated", "its memory across requests is plain JSON, and takes up where it left off"),
    Check("survival", "edge_cases", "it copes with the shortest prompts and outputs, and drafts of any length"),
    Check("sources", "sources", "with several sources of drafts it names those that are there, or none"),
    Check("device", "device", "it decides on an accelerator as on the host, and seldom makes the host wait"),
    Check("timing", "timing", "how long a decision takes (for information; nothing is required)"),
    Check("export", "repeated", "what it exports decides in onnxruntime as it does itself"),
)


def policy_checks() -> tuple[Check, ...]:
    """All checks of `check_policy`, in order; each has a `name` and can be called with a policy."""
    return _CHECKS


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
    from bpkit.testing.checks.surroundings import undisturbed

    names = [check.name for check in _CHECKS]
    for name in sorted(set(skip) - set(names)):
        raise ValueError(f"there is no check {name!r} to skip; the checks are: {', '.join(names)}")
    checks, progress = [check for check in _CHECKS if check.name not in skip], progress or NoProgress()
    with undisturbed():
        # A class is decoded with once for checks that are called one by one.
        once, given = isinstance(policy, type) and len(checks) == 1, cast("Any", policy)
        checked = (_checked if once else _checked.__wrapped__)(given, seed)
        results: list[Result] = []
        for check in checks:
            progress.start(check.name, len(checks))
            for _ in results:
                progress.tick()
            results.append(check.run(checked))
    return Report(checked.shown, seed, tuple(results), tuple(checked.drafters), tuple(checked.left_out.items()))


@functools.lru_cache(maxsize=8)
def _checked(policy: Any, seed: int) -> CheckedPolicy:
    from bpkit.testing.checks.checked_policy import CheckedPolicy

    return CheckedPolicy(policy, seed)
