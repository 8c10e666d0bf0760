"""The checks by name. Listing them imports no torch: each is imported when it runs."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from bpkit.testing.checks.report import Findings, PolicyCheckError, Report, Result, Skip

if TYPE_CHECKING:
    from bpkit.testing.checks.subject import PolicyToCheck, Subject


@dataclass(frozen=True)
class Check:
    """One thing that is checked.

    Attributes:
        name: also of its module in `bpkit.testing.checks`, and of the function there.
        summary: what holds for a policy that passes.
    """

    name: str
    summary: str

    def __call__(self, policy: PolicyToCheck, *, seed: int = 0) -> Result:
        """Run this check alone.

        Args:
            policy: as `check_policy` takes it. seed: of everything that is drawn.

        Raises:
            PolicyCheckError: the policy fails it. PolicyError: there is no such policy, or no drafter serves it.
        """
        from bpkit.testing.checks.run_all import subject_of
        from bpkit.testing.checks.surroundings import undisturbed

        with undisturbed():
            subject = subject_of(policy, seed)
            report = Report(subject.shown, seed, (self.run(subject),), *subject.served)
        report.raise_for_failures()
        return report.results[0]

    def run(self, subject: Subject) -> Result:
        """What this check finds, without raising."""
        function = getattr(importlib.import_module(f"bpkit.testing.checks.{self.name}"), self.name)
        begun, out, skipped = time.perf_counter(), Findings(), None
        try:
            cast("Callable[[Subject, Findings], None]", function)(subject, out)
        except Skip as reason:
            skipped = str(reason)
        return out.result(self.name, self.summary, time.perf_counter() - begun, skipped)


_CHECKS = (
    Check("lossless", "whatever it decides, the text is that of plain decoding; it is never overruled"),
    Check("sizes", "block sizes are 1 .. max_block_size, verified lengths 0 .. draft_length, whole numbers"),
    Check("features", "it reads the features that `wants` declares, all of them and no others"),
    Check("mutation", "it changes nothing that it is handed but its own state"),
    Check("determinism", "the same seed and the same clock give the same decisions"),
    Check("rows", "what it decides for a request does not depend on the requests beside it"),
    Check("overlap", "what it decides for a request does not depend on those that run at the same time"),
    Check("memory", "its memory across requests is plain JSON, and takes up where it left off"),
    Check("survival", "it survives the shortest prompts and outputs, and drafts of any length"),
    Check("device", "it decides on an accelerator as on the host, and seldom makes the host wait"),
    Check("timing", "how long a decision takes (for information; nothing is required)"),
    Check("export", "what it exports decides in onnxruntime as it does itself"),
)


def policy_checks() -> tuple[Check, ...]:
    """All checks of `check_policy`, in order; each has a `name` and can be called with a policy."""
    return _CHECKS


def without(skip: tuple[str, ...] | list[str] | frozenset[str]) -> tuple[Check, ...]:
    """The checks but those of these names. Raises ValueError for a name that there is not."""
    names = [check.name for check in _CHECKS]
    for name in skip:
        if name not in names:
            raise ValueError(f"there is no check {name!r} to skip; the checks are: {', '.join(names)}")
    return tuple(check for check in _CHECKS if check.name not in skip)


__all__ = ["Check", "PolicyCheckError", "policy_checks", "without"]
